"""Implements four algorithms that exchange updates between shards of a sequence: the forward pass.

Every shard holds one update (keep, delta) and needs the composition of the updates of all shards before
it. First every shard gathers the P keeps, which are a few numbers. They say with what weight each delta
reaches each shard, so no branch depends on the device; a delta of weight 0 is dropped, also where it is
NaN. The algorithms differ only in how the deltas, S bytes each, travel:

| collective | bytes sent per device | steps |
|---|---|---|
| `all_gather` | (P-1) S | 1 |
| `doubling` | at most S ceil(log2 P) | ceil(log2 P) |
| `all_to_all` | 2 S (P-1)/P | 2 |
| `ring` | S | P + K - 2, of S/K bytes |

`prefix.py` makes them differentiable.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.manual import entry_of_this_shard, vary_over, varying_axes
from ttt_jax.ops.update import prefix_weights, scale


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Holds the static settings that say how shards exchange their updates.

  Attributes:
    axis: the mesh axis along which the sequence is split.
    collective: one of `ttt_jax.names.COLLECTIVES`.
    slices: K of `ring`; at most F, the rows of a delta.
    wire_dtype: the dtype to which deltas are rounded for sending, not for sums; None sends them unrounded.
  """

  axis: str
  collective: str
  slices: int = 1
  wire_dtype: Any = None


def exchange_deltas(
  keeps: Float[Array, "P B"], delta: Float[Array, "B F D"], *, exchange: Exchange, reverse: bool
) -> Float[Array, "B F D"]:
  """Returns the delta of the exclusive prefix (or suffix), given the keeps of all shards."""
  with jax.named_scope(f"prefix_{exchange.collective}"):
    return _ALGORITHMS[exchange.collective](keeps, delta, exchange, reverse)


def gather_keeps(keep: Float[Array, "B"] | None, like: Array, axis: str) -> Float[Array, "P B"]:
  """Gathers the keeps of all shards; a keep of None is 1 on every shard, and nothing is sent."""
  if keep is None:
    return jnp.ones((lax.axis_size(axis), like.shape[0]), like.dtype)
  return lax.all_gather(keep, axis)


def _send(x: Array, exchange: Exchange, transfer: Callable[[Array], Array]) -> Array:
  """Returns `transfer(x)`, which sends x rounded to the wire's dtype.

  The rounded numbers travel as integers: a compiler without narrow floats, such as XLA's for CPUs, would
  send wide floats instead.
  """
  if exchange.wire_dtype is None:
    return transfer(x)
  bits = jnp.dtype(f"uint{8 * exchange.wire_dtype.itemsize}")
  received = transfer(lax.bitcast_convert_type(x.astype(exchange.wire_dtype), bits))
  return lax.bitcast_convert_type(received, exchange.wire_dtype).astype(x.dtype)


def _all_gather(keeps, delta, exchange, reverse):
  """Every shard receives all P deltas and sums them with its weights."""
  weights = entry_of_this_shard(prefix_weights(keeps, reverse), exchange.axis)
  deltas = _send(delta, exchange, lambda x: lax.all_gather(x, exchange.axis))
  return jnp.sum(scale(weights, deltas), axis=0)


def _all_to_all(keeps, delta, exchange, reverse):
  """Every shard receives one slice (along F) of all P deltas, computes that slice of all P prefixes, and
  sends every shard the slice of its prefix."""
  size = keeps.shape[0]
  slices = _cut(delta, size)  # [p: for shard p, B, rows, D]

  def transpose(x):
    return _send(x, exchange, lambda x: lax.all_to_all(x, exchange.axis, 0, 0))

  def step(prefix, shard):
    keep, slice_ = shard
    return scale(keep, prefix) + slice_, prefix

  received = transpose(slices)  # [q: from shard q, B, rows, D]
  start = vary_over(jnp.zeros(received.shape[1:], delta.dtype), varying_axes(keeps, delta))
  _, prefixes = lax.scan(step, start, (keeps, received), reverse=reverse)
  return _join(transpose(prefixes), delta.shape[1])


def _doubling(keeps, delta, exchange, reverse):
  """Covers twice as many earlier shards with every step.

  At distance d, E_p composes the d-1 shards before p. Shard p receives `E_{p-d} then update p-d`, which
  composes the d shards before these, and puts it before E_p; then d doubles.
  """
  size = keeps.shape[0]
  weights = entry_of_this_shard(prefix_weights(keeps, reverse), exchange.axis)  # [q, B]
  keep = entry_of_this_shard(keeps, exchange.axis)
  index = lax.axis_index(exchange.axis)
  prefix, distance = jnp.zeros_like(delta), 1
  while distance < size:
    step = -distance if reverse else distance
    pairs = [(p, p + step) for p in range(size) if 0 <= p + step < size]
    inclusive = scale(keep, prefix) + delta
    received = _send(
      inclusive, exchange, partial(lax.ppermute, axis_name=exchange.axis, perm=pairs)
    )
    # Shards without a sender receive zeros, whatever weight the clipped index finds.
    weight = lax.dynamic_index_in_dim(weights, jnp.clip(index - step, 0, size - 1), keepdims=False)
    prefix += scale(weight, received)
    distance *= 2
  return prefix


def _ring(keeps, delta, exchange, reverse):
  """Computes `E_{p+1} = k_p E_p + D_p` as a pipeline of K slices, each one shard behind the one before.

  In step t the shard at place p of the order sends slice t - p, if there is such a slice: S bytes in all.
  """
  size, k = keeps.shape[0], exchange.slices
  place = lax.axis_index(exchange.axis)
  if reverse:
    place = size - 1 - place
  slices = _cut(delta, k)
  keep = entry_of_this_shard(keeps, exchange.axis)
  incoming = jnp.zeros_like(slices[0])
  received = [incoming]
  for t in range(size + k - 2):
    slice_ = lax.dynamic_index_in_dim(slices, jnp.clip(t - place, 0, k - 1), keepdims=False)
    senders = [p for p in range(size - 1) if 0 <= t - p < k]
    pairs = [(size - 1 - p, size - 2 - p) if reverse else (p, p + 1) for p in senders]
    outgoing = scale(keep, incoming) + slice_
    incoming = _send(outgoing, exchange, partial(lax.ppermute, axis_name=exchange.axis, perm=pairs))
    received.append(incoming)
  # Place p received its K slices in steps p-1 to p+K-2; the first place received zeros.
  prefix = lax.dynamic_slice_in_dim(jnp.stack(received), place, k)
  return _join(prefix, delta.shape[1])


def _cut(delta: Float[Array, "B F D"], parts: int) -> Float[Array, "K B R D"]:
  """Cuts delta into `parts` slices along F, the last one padded."""
  b, f, d = delta.shape
  rows = -(-f // parts)
  padded = jnp.pad(delta, ((0, 0), (0, rows * parts - f), (0, 0)))
  return jnp.moveaxis(padded.reshape(b, parts, rows, d), 1, 0)


def _join(slices: Float[Array, "K B R D"], f: int) -> Float[Array, "B F D"]:
  """Joins the slices that `_cut` made."""
  k, b, rows, d = slices.shape
  return jnp.moveaxis(slices, 0, 1).reshape(b, k * rows, d)[:, :f]


_ALGORITHMS = {
  "all_gather": _all_gather,
  "doubling": _doubling,
  "all_to_all": _all_to_all,
  "ring": _ring,
}
