"""What devices can do, and for which device a program is traced."""

import dataclasses
import re

import jax
from jax.sharding import AbstractDevice

from ttt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
  """What a chip can do.

  Attributes:
    name: as in conversation. kind: how `jax.Device.device_kind` begins.
    peak: FLOP/s of a product of bfloat16 inputs.
    peak_float32: FLOP/s of a product of float32 inputs at JAX's default precision: one bfloat16 pass on
      TPU, TF32 on NVIDIA GPUs.
    memory: bytes/s of its memory.
    link: bytes/s to one neighbour, one way.
    latency: seconds a message takes that carries nothing. Not published; assumed unless the source
      says otherwise.
    torus: neighbours are linked, and farther messages occupy every link on their way; else a switch
      joins all devices.
    fuses: passes over a state go on during the product before or after them, as in programs compiled for
      TPU (two fusions a chunk); else they are kernels of their own.
    source: where the figures are from.
  """

  name: str
  kind: str
  peak: float
  peak_float32: float
  memory: float
  link: float
  latency: float
  torus: bool
  fuses: bool
  source: str


# ICI figures are published per chip and for both directions: divided by ports and by 2. Dense rates of GPUs
# are half of the published ones with sparsity; NVLink, too, is published for both directions.
# fmt: off
DEVICES = {
  device.name: device
  for device in (
    Device("v5e", "TPU v5 lite", 197e12, 197e12, 819e9, 400e9 / 4 / 2, 1e-6, True, True,
           "docs.cloud.google.com/tpu/docs/v5e"),
    Device("v5p", "TPU v5", 459e12, 459e12, 2765e9, 1200e9 / 6 / 2, 1e-6, True, True,
           "docs.cloud.google.com/tpu/docs/v5p"),
    Device("v6e", "TPU v6", 918e12, 918e12, 1638e9, 800e9 / 4 / 2, 1e-6, True, True,
           "docs.cloud.google.com/tpu/docs/v6e"),
    Device("h100", "NVIDIA H100", 989e12, 495e12, 3.35e12, 900e9 / 2, 10e-6, False, False,
           "NVIDIA H100 datasheet, SXM"),
    Device("h200", "NVIDIA H200", 989e12, 495e12, 4.8e12, 900e9 / 2, 10e-6, False, False,
           "NVIDIA H200 datasheet, SXM"),
    Device("cpu", "cpu", 1.5e11, 1.5e11, 2e10, 8e8, 500e-6, False, False,
           "two cores of an AMD EPYC as 8 devices, measured"),
  )
}
# fmt: on
_NEAREST = {"tpu": "v5p", "gpu": "h100", "cpu": "cpu"}


def _target():
  """A device that a program is traced for: of its mesh, which may not be the machine it is traced on."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0] if device is None else device


def target_platform() -> str:
  """`"tpu"`, `"gpu"` or `"cpu"`: where the program will run that is being traced."""
  platform = _target().platform
  return "gpu" if platform in ("cuda", "rocm") else platform


def cuda_capability() -> float | None:
  """The compute capability of the GPU that a program is traced for; None unless it is NVIDIA's.

  AMD's are named by architecture ("gfx942"). An abstract mesh knows its devices by kind only: without such
  a device here, the capability is that of the oldest ones for which cuDNN has attention, 8.0.
  """
  device = _target()
  if isinstance(device, AbstractDevice):
    kind = device.device_kind
    here = [known for known in jax.devices() if known.device_kind == kind]
    if not here:
      return None if kind.lower().startswith(("amd", "radeon", "gfx")) else 8.0
    device = here[0]
  capability = device.compute_capability
  return float(capability) if re.fullmatch(r"\d+(\.\d+)?", capability) else None


def find_device(kind: str | None = None) -> Device:
  """The figures of a device kind, of a short name such as `"v5p"`, or of the device a program is for.

  A program's device that is not in the table gets the figures of its platform's nearest one: enough to
  choose between ways to compute, not to measure against (`known_device`).

  Raises:
    UserError: a name that is neither in the table nor the kind of a device in it.
  """
  if kind is None:
    return known_device() or DEVICES[_NEAREST.get(target_platform(), "h100")]
  device = DEVICES.get(kind) or _of_kind(kind)
  if device is None:
    raise UserError(f"device={kind!r} is not in the table: use one of {', '.join(DEVICES)}")
  return device


def known_device() -> Device | None:
  """The figures of the device a program is for, or None if the table does not have it."""
  return _of_kind(_target().device_kind)


def _of_kind(kind: str) -> Device | None:
  # The first that fits: "TPU v5" begins v5e, too.
  return next((device for device in DEVICES.values() if kind.startswith(device.kind)), None)
