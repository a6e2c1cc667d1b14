"""TPU slices by name, as devices to compile for; libtpu knows them all and needs none."""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from ttt_jax.errors import UserError

# Slices that clouds offer. Any whole number of hosts (2 x 2 chips) can be compiled for.
_SLICES = {
  "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
  ),
  "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# GiB that a program can have of a chip's memory, as the compiler says when there is too little.
_HBM_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}


class Topology(NamedTuple):
  name: str
  devices: Sequence[jax.Device]
  hbm_gib: float


def prepare_environment() -> None:
  """Sets what libtpu reads when it is loaded, so that it looks for no TPU: before JAX's first use."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # Else it looks for a host's addresses, and says at length that there are none.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def open_topology(name: str) -> Topology:
  """The devices of a slice such as `v5p:4x4x4`.

  Raises:
    UserError: there is no such slice; libtpu is not installed.
  """
  chip = name.partition(":")[0]
  if chip not in _SLICES or ":" not in name:
    raise UserError(f"plan.topology={name!r} is none that is known: {_known()}")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "planning compiles with libtpu, which is not installed: pip install 'ttt_jax[tpu]'"
    )
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"plan.topology={name!r} is no slice ({reason}): {_known()}") from error
  return Topology(name, devices, _HBM_GIB[chip])


def _known() -> str:
  return "use one of " + "; ".join(
    ", ".join(f"{chip}:{shape}" for shape in shapes) for chip, shapes in _SLICES.items()
  )
