"""Holds the cost model of `implementation=None`, and `explain`, which prints its choice and the reasons.

Times assume peak rates, so trust their order, not the seconds: a product takes FLOPs / peak, a pass over
a state bytes / memory bandwidth, a message latency + bytes / link bandwidth. `ttt-jax bench` measures
whether the order is right on your machine.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from ttt_jax.errors import UserError
from ttt_jax.ops.exchange.cost import (
  bytes_sent,
  choose_collective,
  collective_seconds,
  ring_slices,
)
from ttt_jax.ops.hardware import Device, find_device


@dataclasses.dataclass(frozen=True)
class Workload:
  """Holds the sizes of one fast weight on one device, on which the choice depends.

  Attributes:
    tokens: tokens of a row on this device. chunk_size, d_ff (this device's slice), d_model: C, F, D.
    shards: P, devices along the sequence. batch: rows on this device.
    item, state_item, wire_item: bytes per number of z, of the state, and of a state that is sent.
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
    """Returns the bytes of the states that a device contributes to an exchange."""
    return self.batch * self.d_ff * self.d_model * self.wire_item


def implementation_seconds(workload: Workload, device: Device) -> dict[str, float]:
  """Estimates the forward seconds of a down projection with its fast weight, without the exchange.

  Counted in products of one chunk, `2 C F D` FLOPs each, for N chunks:
  `sequential` needs N products to read (2 N without `merge`), N-1 to update, and on shards N to compose
  its updates first. `associative` needs 3 N, and log2 N passes over N states. `dual` needs N for the slow
  weight and scores every chunk against each earlier one, `2 C^2 (F + D)` FLOPs; on shards also N for the
  total of its updates and N for the incoming state.
  """
  n = max(1, workload.tokens // workload.chunk_size)
  peak = device.peak if workload.item <= 2 else device.peak_float32
  product = 2 * workload.batch * workload.chunk_size * workload.d_ff * workload.d_model / peak
  pair = workload.batch * workload.chunk_size**2
  # Scores are written wide, read, written narrow and read.
  scores = 2 * pair * (workload.d_ff + workload.d_model) / peak
  scores += pair * (2 * 4 + 2 * workload.item) / device.memory
  one_pass = workload.batch * workload.d_ff * workload.d_model * workload.state_item / device.memory
  is_sharded = workload.shards > 1
  read_products = n if workload.merge else 2 * n
  if device.fuses:
    # W and S go into a read; S comes into an update and goes out of it.
    sequential = (read_products + n - 1) * max(product, 2 * one_pass)
  else:
    # The update out of its product and into the sum, S in and out, S into W + S and that out.
    sequential = (read_products + n - 1) * product + 6 * (n - 1) * one_pass
  return {
    "sequential": sequential + n * is_sharded * product,
    "dual": (n + 2 * n * is_sharded) * product + n * (n - 1) / 2 * scores,
    "associative": 3 * n * product + 6 * n * one_pass * (1 + math.log2(n)),
  }


def choose_implementation(workload: Workload, device: Device) -> str:
  """Returns the faster of `sequential` and `dual`, by the model; `associative` runs only by name."""
  seconds = implementation_seconds(workload, device)
  return min(("sequential", "dual"), key=seconds.__getitem__)


def least_squares_flops(n: int, c: int, f: int, d: int) -> dict[str, float]:
  """Counts the FLOPs of a row's reads and writes by least squares, N chunks of C tokens, forward.

  sequential factors `[F, F]` for every chunk but the first (F^3 / 3), solves for C tokens (2 F^2 C) and
  writes `K^T [K | V]`. dual factors the scores of the tokens before each chunk with one another.
  """
  earlier = [i * c for i in range(1, n)]
  written = 2 * c * f * (f + d)
  return {
    "sequential": len(earlier) * (f**3 / 3 + 2 * f * f * c + 2 * c * f * d) + n * written,
    "dual": sum(2 * p * p * f + p**3 / 3 + 2 * p * p * c + 2 * c * p * (f + d) for p in earlier)
    + n * written,
  }


def choose_least_squares(n: int, c: int, f: int, d: int, *, is_closed: bool) -> str:
  """Returns the cheaper of `sequential` and `dual`; `dual` needs a closed row: no state, one device."""
  flops = least_squares_flops(n, c, f, d)
  return min(flops, key=flops.__getitem__) if is_closed else "sequential"


@dataclasses.dataclass(frozen=True)
class Explanation:
  """Holds the choice for one workload and the predicted costs of the alternatives; `print` it.

  Attributes:
    device: the device whose rates the model used.
    work: the sizes of the workload.
    implementation: the name of the one that is chosen.
    implementations: the predicted seconds of a forward pass, by implementation.
    collective: the name of the one that is chosen; None on one shard.
    collectives: the predicted seconds of an exchange, by collective.
    bytes_sent: the bytes that a device sends, by collective.
    slices: the number of slices into which the ring cuts a state.
  """

  device: Device
  work: Workload
  implementation: str
  implementations: dict[str, float]
  collective: str | None
  collectives: dict[str, float]
  bytes_sent: dict[str, int]
  slices: int

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
  """Explains what `inplace_ttt` would choose for a workload: `print(ttt_jax.explain(...))`.

  Args:
    tokens: tokens of a row, over all shards.
    chunk_size: tokens per chunk.
    d_ff: F, the hidden width of the MLP.
    d_model: D, the width of the model.
    shards: the number of devices that hold a row.
    batch: rows on each device.
    dtype: dtype of activations and targets.
    state_dtype: dtype of the state, as for `inplace_ttt`.
    wire_dtype: dtype of the states that are sent, as for `inplace_ttt`.
    merge: whether a chunk is read in one product, as for `inplace_ttt`.
    device: a name such as `"v5p"`, or a `device_kind`; None is the device of this process.

  Raises:
    UserError: sizes that are not positive, shards that do not hold whole chunks, an unknown device.
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
  workload = Workload(
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
  rates = find_device(device)
  implementation = "sequential" if merge else choose_implementation(workload, rates)
  is_sharded = shards > 1
  exchange = (shards, workload.sent_state, rates)
  return Explanation(
    device=rates,
    work=workload,
    implementation=implementation,
    implementations=implementation_seconds(workload, rates),
    collective=choose_collective(*exchange, rows=d_ff) if is_sharded else None,
    collectives=collective_seconds(*exchange, rows=d_ff) if is_sharded else {},
    bytes_sent=bytes_sent(shards, workload.sent_state),
    slices=ring_slices(*exchange, rows=d_ff),
  )
