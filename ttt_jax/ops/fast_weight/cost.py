"""The cost model behind `implementation=None` and `collective=None`, and `explain`, which says why.

Times are those of peak rates, so only their order means anything: a product takes FLOPs / peak, a pass
over a state bytes / memory bandwidth, a message latency + bytes / link bandwidth. `ttt-jax bench` shows
where that order is wrong on the machine at hand.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
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

  A kind that is not in the table gets the figures of its platform's nearest one.

  Raises:
    ValueError: a name that is neither in the table nor the kind of a device here.
  """
  if kind in DEVICES:
    return DEVICES[kind]
  platform = None
  if kind is None:
    kind, platform = _target().device_kind, target_platform()
  for device in DEVICES.values():  # the first that fits: "TPU v5" begins v5e, too
    if kind.startswith(device.kind):
      return device
  if platform is None:
    raise UserError(f"device={kind!r} is not in the table: use one of {', '.join(DEVICES)}")
  return DEVICES[_NEAREST.get(platform, "h100")]


@dataclasses.dataclass(frozen=True)
class Work:
  """One fast weight on one device: the numbers that a choice depends on.

  Attributes:
    tokens: of a row, on this device. chunk_size, d_ff (this device's part), d_model: C, F, D.
    shards: P, devices along the sequence. batch: rows on this device.
    item, state_item: bytes of a number of z and of the state. wire_item: of one that is sent.
    merge: a chunk is read in one product.
  """

  tokens: int
  chunk_size: int
  d_ff: int
  d_model: int
  shards: int = 1
  batch: int = 1
  item: int = 2
  state_item: int = 4
  wire_item: int = 4
  merge: bool = True

  @property
  def sent_state(self) -> int:
    """Bytes of the states that a device contributes to an exchange."""
    return self.batch * self.d_ff * self.d_model * self.wire_item


def implementation_seconds(work: Work, device: Device) -> dict[str, float]:
  """Forward time on one device of the down projection with its fast weight, exchange excluded.

  In products of one chunk, `2 C F D` FLOPs each, N chunks: sequential reads N times (2 N in two
  products), updates N-1 times, and composes N updates first if there are shards after it. associative
  the same in two products, with log2 N passes over N states. dual reads the slow weight N times, and
  scores a chunk's tokens against the earlier ones, `2 C^2 (F + D)` FLOPs for each chunk before it; with
  shards it also needs their total and its product with the incoming state.
  """
  n = max(1, work.tokens // work.chunk_size)
  peak = device.peak if work.item <= 2 else device.peak_float32
  product = 2 * work.batch * work.chunk_size * work.d_ff * work.d_model / peak
  pair = work.batch * work.chunk_size**2
  # Scores are written wide, read, written narrow and read.
  scores = 2 * pair * (work.d_ff + work.d_model) / peak
  scores += pair * (2 * 4 + 2 * work.item) / device.memory
  one_pass = work.batch * work.d_ff * work.d_model * work.state_item / device.memory
  many = work.shards > 1
  reads = n if work.merge else 2 * n
  if device.fuses:
    # W and S go into a read; S comes into an update and goes out of it.
    sequential = reads * max(product, 2 * one_pass) + (n - 1) * max(product, 2 * one_pass)
  else:
    # The update out of its product and into the sum, S in and out, S into W + S and that out.
    sequential = (reads + n - 1) * product + 6 * (n - 1) * one_pass
  return {
    "sequential": sequential + n * many * product,
    "dual": (n + 2 * n * many) * product + n * (n - 1) / 2 * scores,
    "associative": 3 * n * product + 6 * n * one_pass * (1 + math.log2(n)),
  }


def collective_seconds(work: Work, device: Device) -> dict[str, float]:
  """Time of one exchange of states over `work.shards` contiguous devices, one kind of link.

  On a torus the axis is taken as a ring of two-way links; a message over several hops occupies each.
  """
  p, s = work.shards, work.sent_state
  k = ring_slices(work, device)
  steps = math.ceil(math.log2(p)) if p > 1 else 0
  if device.torus:
    sent = {"all_gather": (p - 1) / 2, "doubling": p - 1, "all_to_all": 2 * p / 8}
  else:
    sent = {"all_gather": p - 1, "doubling": steps, "all_to_all": 2 * (p - 1) / p}
  sent["ring"] = (p + k - 2) / k
  messages = {"all_gather": 1, "doubling": steps, "all_to_all": 2, "ring": p + k - 2}
  return {
    name: messages[name] * device.latency + sent[name] * s / device.link
    for name in ("all_gather", "doubling", "all_to_all", "ring")
  }


_MOST_SLICES = 64  # of the ring: a program has P + K - 2 messages, one after another


def ring_slices(work: Work, device: Device) -> int:
  """K of the ring: the minimum of `(P + K - 2) (latency + S / (K link))`, at most F and 64."""
  best = math.sqrt(max(0, work.shards - 2) * work.sent_state / (device.link * device.latency))
  return max(1, min(round(best), work.d_ff, _MOST_SLICES))


def choose_implementation(work: Work, device: Device) -> str:
  """The faster of `sequential` and `dual`, by the model. `associative` is there to be asked for."""
  seconds = implementation_seconds(work, device)
  return min(("sequential", "dual"), key=seconds.__getitem__)


def choose_collective(work: Work, device: Device) -> str:
  """The fastest one, by the model."""
  seconds = collective_seconds(work, device)
  return min(seconds, key=seconds.__getitem__)


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What is chosen for a case and what the alternatives would cost; `print` it."""

  device: Device
  work: Work
  implementation: str
  implementations: dict[str, float]  # seconds
  collective: str | None
  collectives: dict[str, float]  # seconds
  bytes_sent: dict[str, int]  # per device
  slices: int  # of the ring

  def __str__(self) -> str:
    work, device = self.work, self.device
    n = work.tokens // work.chunk_size
    lines = [
      f"{work.tokens} tokens a shard in {n} chunks of {work.chunk_size}, F {work.d_ff}, D {work.d_model}, "
      f"{work.shards} shards, {work.batch} rows",
      f"{device.name}: {device.peak / 1e12:.4g} TFLOP/s, memory {device.memory / 1e9:.4g} GB/s, "
      f"{'torus' if device.torus else 'switched'} link {device.link / 1e9:.4g} GB/s ({device.source})",
      f"state {work.sent_state / 1e6:.4g} MB a device on the wire",
      "",
      "implementation    forward",
    ]
    for name, seconds in sorted(self.implementations.items(), key=lambda item: item[1]):
      mark = "  <- chosen" if name == self.implementation else ""
      lines.append(f"{name:12s} {_seconds(seconds):>12s}{mark}")
    if self.collective is not None:
      lines += ["", "collective     exchange        sent"]
      for name, seconds in sorted(self.collectives.items(), key=lambda item: item[1]):
        mark = "  <- chosen" if name == self.collective else ""
        if name == "ring":
          mark = f"  in {self.slices} slices" + mark
        sent = f"{self.bytes_sent[name] / 1e6:.4g} MB"
        lines.append(f"{name:12s} {_seconds(seconds):>10s} {sent:>11s}{mark}")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
  for unit, size in (("s", 1), ("ms", 1e-3), ("us", 1e-6)):
    if seconds >= size:
      return f"{seconds / size:.3g} {unit}"
  return f"{seconds / 1e-9:.3g} ns"


def bytes_sent(work: Work) -> dict[str, int]:
  """What each collective sends per device, at most."""
  p, s = work.shards, work.sent_state
  return {
    "all_gather": (p - 1) * s,
    "doubling": (math.ceil(math.log2(p)) if p > 1 else 0) * s,
    "all_to_all": 2 * s * (p - 1) // p,
    "ring": s if p > 1 else 0,
  }


def explain(
  *,
  tokens: int,
  chunk_size: int,
  d_ff: int,
  d_model: int,
  shards: int = 1,
  batch: int = 1,
  dtype: Any = "bfloat16",
  state_dtype: Any = "float32",
  wire_dtype: Any = None,
  merge: bool | None = None,
  device: str | None = None,
) -> Explanation:
  """What `inplace_ttt` would choose for a case, and why: `print(ttt_jax.explain(...))`.

  Args:
    tokens: of a whole row, over all shards.
    chunk_size: tokens per chunk.
    d_ff: F, the hidden width of the MLP.
    d_model: D, the width of the model.
    shards: how many devices hold a row.
    batch: rows on each device.
    dtype: of activations and targets.
    state_dtype: of the fast weights, as for `inplace_ttt`.
    wire_dtype: of what is exchanged, as for `inplace_ttt`.
    merge: whether a chunk is read in one product, as for `inplace_ttt`.
    device: a name such as `"v5p"`, or a `device_kind`; None is the one here.

  Raises:
    ValueError: sizes that are not positive, shards that do not hold whole chunks, an unknown device.
  """
  sizes = {
    "tokens": tokens,
    "chunk_size": chunk_size,
    "d_ff": d_ff,
    "d_model": d_model,
    "shards": shards,
    "batch": batch,
  }
  for name, value in sizes.items():
    if value < 1:
      raise UserError(f"{name}={value} must be at least 1")
  if shards > 1 and tokens % (shards * chunk_size):
    raise UserError(
      f"tokens={tokens} is not a multiple of shards * chunk_size = {shards * chunk_size}: shards hold "
      "whole chunks"
    )
  item = jnp.dtype(dtype).itemsize
  work = Work(
    tokens=tokens // shards,
    chunk_size=chunk_size,
    d_ff=d_ff,
    d_model=d_model,
    shards=shards,
    batch=batch,
    item=item,
    state_item=jnp.dtype(state_dtype).itemsize,
    wire_item=jnp.dtype(wire_dtype or state_dtype).itemsize,
    merge=item >= 4 if merge is None else merge,
  )
  found = find_device(device)
  implementation = "sequential" if merge else choose_implementation(work, found)
  return Explanation(
    device=found,
    work=work,
    implementation=implementation,
    implementations=implementation_seconds(work, found),
    collective=choose_collective(work, found) if shards > 1 else None,
    collectives=collective_seconds(work, found) if shards > 1 else {},
    bytes_sent=bytes_sent(work),
    slices=ring_slices(work, found),
  )
