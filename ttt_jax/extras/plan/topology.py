"""Opens TPU slices by name, as devices to compile for; libtpu describes slices without having them."""

import importlib.util
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from ttt_jax.errors import UserError

# Slices that clouds offer; the compiler also takes other whole numbers of hosts (2 x 2 chips).
_SLICES = {
  "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  "v5p": (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
  ),
  "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
# GiB of a chip's memory that a program can use, from the compiler's message when they do not suffice.
_HBM_GIB = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}


class Topology(NamedTuple):
  """Holds the devices of a slice, and the memory that a program can use on each."""

  name: str
  devices: Sequence[jax.Device]
  hbm_gib: float


def prepare_environment() -> None:
  """Sets environment variables so that libtpu looks for no TPU; call it before JAX's first use."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
  # Without these libtpu looks for the addresses of hosts, and complains at length.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def open_topology(name: str) -> Topology:
  """Opens a slice by its name, such as `v5p:4x4x4`.

  Raises:
    UserError: no slice has that name; libtpu is not installed.
  """
  chip = name.partition(":")[0]
  if chip not in _SLICES or ":" not in name:
    raise UserError(f"plan.topology={name!r} is none that is known: {_remedy()}")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "planning compiles with libtpu, which is not installed: pip install 'ttt_jax[tpu]'"
    )
  from jax.experimental import topologies

  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"plan.topology={name!r} is no slice ({reason}): {_remedy()}") from error
  return Topology(name, devices, _HBM_GIB[chip])


def _remedy() -> str:
  return "use one of " + "; ".join(
    ", ".join(f"{chip}:{shape}" for shape in shapes) for chip, shapes in _SLICES.items()
  )
