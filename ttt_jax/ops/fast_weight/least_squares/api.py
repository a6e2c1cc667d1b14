"""Implements `ttt_jax.inplace_ttt` with `rule="least_squares"`: keys, gate, tail, statistics.

Under a `tensor_axis` every device holds the sums whole, since a solve needs all of F, and computes the
same; the state that a call takes and returns is split along F like the state of the sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.documents import ChunkMasks
from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.fast_weight.chunks import Chunks, UpdateSettings
from ttt_jax.ops.fast_weight.least_squares.associative import associative
from ttt_jax.ops.fast_weight.least_squares.kernel import kernel
from ttt_jax.ops.fast_weight.least_squares.rows import Rows
from ttt_jax.ops.fast_weight.least_squares.sequential import sequential
from ttt_jax.ops.fast_weight.least_squares.sums import (
  Sums,
  condition,
  factor,
  no_sums,
  product,
  read,
  unit_rows,
)
from ttt_jax.ops.fast_weight.stats import LeastSquaresStats
from ttt_jax.ops.manual import shard_count, vary_over, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype, matmul, where
from ttt_jax.ops.update import sum_over

IMPLEMENTATIONS = {"associative": associative, "dual": kernel, "sequential": sequential}


class Gate(NamedTuple):
  """Says how much of what it finds a token reads: `sigmoid(sharpness (l - threshold) + k direction)`.

  Attributes:
    threshold, sharpness: of the leverage l.
    direction: of the key k, as wide as the keys; None leaves the term out.
  """

  threshold: Float[Array, ""]
  sharpness: Float[Array, ""]
  direction: Float[Array, "R"] | None = None


class LeastSquares(NamedTuple):
  """Says how the rule reads: `read_scale gate R`.

  Attributes:
    ridge: in units of the mean eigenvalue of A.
    read_scale: the factor of what is read.
    gate: None reads all tokens alike.
    projection: P of the keys `k = z P / |z P|`, under a tensor axis this device's rows of it; None for
      keys of all of F.
  """

  ridge: Float[Array, ""]
  read_scale: Float[Array, ""]
  gate: Gate | None
  projection: Float[Array, "F R"] | None = None


class FastPart(NamedTuple):
  """Holds what the rule adds to `Z W`, this device's share under a tensor axis, and what it learned.

  Attributes:
    y: of the tokens of full chunks. tail: of the tokens after them, None where there are none.
    sums: after the last full chunk.
    leverage: of the tokens of full chunks.
  """

  y: Float[Array, "B N C D"]
  tail: Float[Array, "B R D"] | None
  sums: Sums
  leverage: Float[Array, "B N C"]


def least_squares(
  chunks: Chunks,
  tail: Float[Array, "B R F"],
  masks: ChunkMasks | None,
  settings: LeastSquares,
  update_settings: UpdateSettings,
  exchange: Exchange | None,
  implementation: Callable,
) -> FastPart:
  """Reads and writes the full chunks, and reads the tail with the sums after them."""
  dtype, axis = update_settings.state_dtype, update_settings.tensor_axis
  b, n, c, _ = chunks.z.shape
  d = chunks.v.shape[-1]
  seen = None if chunks.reads is None else chunks.reads | chunks.writes
  s_in = None
  if chunks.s_in is not None:
    s_in = Sums(*(_gather(x, axis, dimension=1) for x in chunks.s_in))
  rows = Rows(
    z=before_unit_rows(where(seen, chunks.z), settings.projection, axis),
    v=where(chunks.writes, chunks.lr.astype(dtype) * chunks.v.astype(dtype)),
    s_in=s_in,
    keep=chunks.keep,
    decay=chunks.decay,
    reads=chunks.reads,
    writes=chunks.writes,
    ridge=settings.ridge,
  )
  shards = 1 if axis is None else shard_count(axis)
  share = 1.0 / shards
  if n:
    r, leverage, sums = implementation(rows, exchange)
  else:
    r, leverage = jnp.zeros((b, 0, c, d), dtype), jnp.zeros((b, 0, c), dtype)
    sums = s_in
    if sums is None:
      sums = no_sums(tail, rows.z.shape[-1], d, dtype)
  y_tail = None
  if tail.shape[1]:
    mask = None if masks is None else masks.tail_reads
    keys = unit_rows(before_unit_rows(where(mask, tail), settings.projection, axis), dtype)
    found = read(keys, sums.d, factor(sums.a, settings.ridge))
    y_tail = where(mask, share * gated(found.r, found.leverage, keys, settings))
  return FastPart(
    y=where(chunks.reads, share * gated(r, leverage, unit_rows(rows.z, dtype), settings)),
    tail=y_tail,
    sums=Sums(*(_slice(x, axis) for x in sums)),
    leverage=leverage,
  )


def gated(
  r: Float[Array, "*B D"],
  leverage: Float[Array, "*B"],
  keys: Float[Array, "*B F"],
  settings: LeastSquares,
) -> Float[Array, "*B D"]:
  """Returns what tokens add: `read_scale sigmoid(sharpness (l - threshold) + k direction) R`."""
  if settings.gate is None:
    return settings.read_scale * r
  gate = settings.gate
  logit = gate.sharpness * (leverage - gate.threshold)
  if gate.direction is not None:
    logit += product("...f,f->...", keys, gate.direction)
  return (settings.read_scale * jax.nn.sigmoid(logit))[..., None] * r


def before_unit_rows(
  z: Float[Array, "*B F"], projection: Float[Array, "F R"] | None, axis: str | None = None
) -> Float[Array, "*B R"]:
  """Returns z of all of F, or `z P`: the keys before they are normalised."""
  if projection is None:
    return _gather(z, axis, dimension=z.ndim - 1)
  projected = sum_over(matmul("...f,fr->...r", z, projection.astype(z.dtype)), axis)
  return vary_over(projected, varying_axes(z))


def _gather(x, axis: str | None, *, dimension: int):
  """Joins the slices of F of all devices of the tensor axis along a dimension."""
  return x if axis is None else lax.all_gather(x, axis, axis=dimension, tiled=True)


def _slice(x, axis: str | None):
  """Returns this device's rows of F."""
  if axis is None:
    return x
  size = x.shape[1] // shard_count(axis)
  return lax.dynamic_slice_in_dim(x, size * lax.axis_index(axis), size, axis=1)


def measure(
  chunks: Chunks,
  part: FastPart,
  settings: LeastSquares,
  update_settings: UpdateSettings,
  w: Float[Array, "F D"],
  *,
  sample_places: slice,
) -> LeastSquaresStats:
  """Returns the statistics of a device's chunks: `update` and `state` are norms of `K^T V` and of D."""
  chunks, part, w = lax.stop_gradient((chunks, part, w))
  b, n, c, _ = chunks.z.shape
  wide, dtype, axis = (
    accumulation_dtype(chunks.z.dtype),
    update_settings.state_dtype,
    update_settings.tensor_axis,
  )

  def norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(1, x.ndim))))

  def norm_over_f(x):
    return jnp.sqrt(sum_over(jnp.sum(x * x, axis=(1, 2)), axis))

  def same_everywhere(x):
    """Returns x, which all devices of the tensor axis computed alike, as a value that does not vary."""
    return x if axis is None else sum_over(x / shard_count(axis), axis)

  update = leverage = jnp.zeros(b, dtype)
  fast = slow = jnp.zeros(b, wide)
  if n:
    written = where(None if chunks.writes is None else chunks.writes[:, -1], chunks.z[:, -1])
    keys = unit_rows(before_unit_rows(written, settings.projection, axis), dtype)
    v = chunks.lr.astype(dtype) * chunks.v[:, -1].astype(dtype)
    update = norm(product("bcf,bcd->bfd", keys, v))
    z = chunks.z[:, :, sample_places]
    slow_part = matmul("bncf,fd->bncd", z, w.astype(z.dtype))
    fast_part = part.y[:, :, sample_places].astype(slow_part.dtype)
    slow_part, fast_part = sum_over(jnp.stack([slow_part, fast_part]), axis)
    whole = (c / z.shape[2]) ** 0.5
    fast, slow = whole * norm(fast_part), whole * norm(slow_part)
    reads = jnp.ones_like(part.leverage) if chunks.reads is None else chunks.reads.astype(dtype)
    leverage = jnp.sum(part.leverage, (1, 2)) / jnp.maximum(jnp.sum(reads, (1, 2)), 1)
  a = _gather(part.sums.a, axis, dimension=1)
  return LeastSquaresStats(
    update=same_everywhere(update),
    state=norm_over_f(part.sums.d),
    fast=fast,
    slow=slow,
    leverage=same_everywhere(leverage),
    condition=same_everywhere(condition(factor(a, settings.ridge))),
  )
