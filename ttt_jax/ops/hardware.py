"""Holds the speed of devices, and finds the device for which a program is traced."""

import dataclasses
import re

import jax
from jax.sharding import AbstractDevice

from ttt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
  """Holds the published rates of a chip.

  Attributes:
    name: short name, such as "v5p". kind: the beginning of `jax.Device.device_kind`.
    peak: FLOP/s of a product of bfloat16 inputs.
    peak_float32: FLOP/s of a product of float32 inputs at JAX's default precision: one bfloat16 pass on
      TPU, TF32 on NVIDIA GPUs.
    memory: bytes/s of its memory.
    link: bytes/s to one neighbour, one way.
    latency: seconds of an empty message. Not published; assumed unless the source says otherwise.
    torus: only neighbours are linked, and a message over several hops occupies each link; else a switch
      connects all devices.
    fuses: a pass over a state is fused with the product before or after it, as in programs compiled for
      TPU (two fusions a chunk); else it is a kernel of its own.
    source: where the figures come from.
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


# ICI rates are published per chip and for both directions: divided by the ports and by 2. NVLink rates are
# published for both directions too. Dense rates of GPUs are half of the published rates with sparsity.
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
_STAND_INS = {"tpu": "v5p", "gpu": "h100", "cpu": "cpu"}


def _target():
  """Returns a device of the mesh that a program is traced for, which may be another machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0] if device is None else device


def target_platform() -> str:
  """Returns the platform that a program is traced for: `"tpu"`, `"gpu"` or `"cpu"`."""
  platform = _target().platform
  return "gpu" if platform in ("cuda", "rocm") else platform


def cuda_capability() -> float | None:
  """Returns the compute capability of the GPU that a program is traced for; None unless it is NVIDIA's.

  AMD names its GPUs by architecture ("gfx942"). An abstract mesh knows only the kind of its devices: if
  this machine has none of that kind, the capability is 8.0, the least for which cuDNN has attention.
  """
  device = _target()
  if isinstance(device, AbstractDevice):
    kind = device.device_kind
    devices_here = [here for here in jax.devices() if here.device_kind == kind]
    if not devices_here:
      return None if kind.lower().startswith(("amd", "radeon", "gfx")) else 8.0
    device = devices_here[0]
  capability = device.compute_capability
  return float(capability) if re.fullmatch(r"\d+(\.\d+)?", capability) else None


def find_device(kind: str | None = None) -> Device:
  """Returns the figures of a device, by short name (`"v5p"`) or kind; by default the program's device.

  If the table does not have the program's device, these are the figures of a device of its platform: good
  enough to choose an implementation, not to measure against (see `device_in_table`).

  Raises:
    UserError: the table has no device of this name or kind.
  """
  if kind is None:
    return device_in_table() or DEVICES[_STAND_INS.get(target_platform(), "h100")]
  device = DEVICES.get(kind) or _of_kind(kind)
  if device is None:
    raise UserError(f"device={kind!r} is not in the table: use one of {', '.join(DEVICES)}")
  return device


def device_in_table() -> Device | None:
  """Returns the figures of the device a program is traced for; None if the table does not have it."""
  return _of_kind(_target().device_kind)


def _of_kind(kind: str) -> Device | None:
  # The first match counts: "TPU v5" is also a prefix of v5e's kind.
  return next((device for device in DEVICES.values() if kind.startswith(device.kind)), None)
