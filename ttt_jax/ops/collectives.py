"""Four ways to exchange updates between the shards of a sequence: the forward computations.

Each device of a mesh axis holds one (keep, delta); each needs the composition of those before it. The
P keeps, a few numbers, are gathered everywhere first. Which deltas reach which shard, and with what
weight, follows from them, so no branch depends on the device. What the ways differ in is the path of
the deltas, S bytes each:

| collective | bytes sent per device | steps |
|---|---|---|
| `all_gather` | (P-1) S | 1 |
| `doubling` | at most S ceil(log2 P) | ceil(log2 P) |
| `all_to_all` | 2 S (P-1)/P | 2 |
| `ring` | S | P + K - 2, of S/K bytes |

`context.exclusive_prefix` makes them differentiable.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.update import Update, prefix_keeps, prefix_weights, scale

COLLECTIVES = ("all_gather", "doubling", "all_to_all", "ring")


@dataclasses.dataclass(frozen=True)
class Exchange:
  """How to exchange, fully decided.

  Attributes:
    axis: the mesh axis.
    collective: one of `COLLECTIVES`.
    slices: K of `ring`; at most the rows of a delta.
    wire_dtype: what deltas are rounded to for sending; sums stay in their own dtype. None: unrounded.
  """

  axis: str
  collective: str
  slices: int = 1
  wire_dtype: Any = None


def exchange(update: Update, how: Exchange, reverse: bool) -> Update:
  """The exclusive prefix over `how.axis`, or suffix; `update.keep` is `[B]`, `update.delta` `[B, F, D]`."""
  with jax.named_scope(f"prefix_{how.collective}"):
    keeps = lax.all_gather(update.keep, how.axis)
    delta = _PATHS[how.collective](keeps, update.delta, how, reverse)
    kept = _own(prefix_keeps(keeps, reverse), how.axis)
    return Update(keep=kept, delta=delta)


def _own(x: Float[Array, "P *S"], axis: str) -> Float[Array, "*S"]:
  """This device's entry of an array that has one for each."""
  return lax.dynamic_index_in_dim(x, lax.axis_index(axis), keepdims=False)


def _weigh(subscripts: str, weights: Array, deltas: Array, dtype: jnp.dtype) -> Array:
  return jnp.einsum(subscripts, weights, deltas.astype(dtype), precision="highest")


def _for_wire(x: Array, how: Exchange) -> Array:
  return x if how.wire_dtype is None else x.astype(how.wire_dtype)


def _all_gather(keeps, delta, how, reverse):
  """Every device receives all P deltas and weighs them."""
  weights = _own(prefix_weights(keeps, reverse), how.axis)
  deltas = lax.all_gather(_for_wire(delta, how), how.axis)
  return _weigh("qb,qbfd->bfd", weights, deltas, delta.dtype)


def _all_to_all(keeps, delta, how, reverse):
  """Every device receives one slice (along F) of all P deltas, forms that slice of all P prefixes, and
  sends each device its own."""
  size = keeps.shape[0]
  slices = _cut(delta, size)  # [p: for device p, B, rows, D]
  deltas = lax.all_to_all(_for_wire(slices, how), how.axis, 0, 0)  # [q: of device q, ...]
  prefixes = _weigh("pqb,qbrd->pbrd", prefix_weights(keeps, reverse), deltas, delta.dtype)
  own = lax.all_to_all(_for_wire(prefixes, how), how.axis, 0, 0)
  return _join(own.astype(delta.dtype), delta.shape[1])


def _doubling(keeps, delta, how, reverse):
  """E_p covers the d-1 shards before p. A step receives what covers the d before those:
  `E_p <- (E_{p-d} then own) of the shard d back, then E_p`, and d doubles."""
  size = keeps.shape[0]
  weights = _own(prefix_weights(keeps, reverse), how.axis)  # [q, B]
  keep = _own(keeps, how.axis)
  index = lax.axis_index(how.axis)
  prefix, distance = jnp.zeros_like(delta), 1
  while distance < size:
    step = -distance if reverse else distance
    pairs = [(p, p + step) for p in range(size) if 0 <= p + step < size]
    upto = scale(keep, prefix) + delta
    received = lax.ppermute(_for_wire(upto, how), how.axis, pairs).astype(delta.dtype)
    # Shards without a sender receive zeros, whatever weight the clipped index finds.
    between = lax.dynamic_index_in_dim(weights, jnp.clip(index - step, 0, size - 1), keepdims=False)
    prefix += scale(between, received)
    distance *= 2
  return prefix


def _ring(keeps, delta, how, reverse):
  """`E_{p+1} = k_p E_p + D_p`, slice after slice: while slice k is at shard p, slice k+1 is at p-1.

  In step t the shard at place p of the order sends slice t - p, if there is one: K slices, S bytes.
  """
  size, k = keeps.shape[0], how.slices
  place = lax.axis_index(how.axis)
  if reverse:
    place = size - 1 - place
  slices = _cut(delta, k)
  keep = _own(keeps, how.axis)
  incoming = jnp.zeros_like(slices[0])
  received = [incoming]
  for t in range(size + k - 2):
    own = lax.dynamic_index_in_dim(slices, jnp.clip(t - place, 0, k - 1), keepdims=False)
    senders = [p for p in range(size - 1) if 0 <= t - p < k]
    pairs = [(size - 1 - p, size - 2 - p) if reverse else (p, p + 1) for p in senders]
    outgoing = _for_wire(scale(keep, incoming) + own, how)
    incoming = lax.ppermute(outgoing, how.axis, pairs).astype(delta.dtype)
    received.append(incoming)
  # Place p received its K slices in steps p-1 to p+K-2; the first place nothing, that is zeros.
  prefix = lax.dynamic_slice_in_dim(jnp.stack(received), place, k)
  return _join(prefix, delta.shape[1])


def _cut(delta: Float[Array, "B F D"], parts: int) -> Float[Array, "K B R D"]:
  """`parts` slices along F, the last one padded."""
  b, f, d = delta.shape
  rows = -(-f // parts)
  padded = jnp.pad(delta, ((0, 0), (0, rows * parts - f), (0, 0)))
  return jnp.moveaxis(padded.reshape(b, parts, rows, d), 1, 0)


def _join(slices: Float[Array, "K B R D"], f: int) -> Float[Array, "B F D"]:
  """The inverse of `_cut`."""
  k, b, rows, d = slices.shape
  return jnp.moveaxis(slices, 0, 1).reshape(b, k * rows, d)[:, :f]


_PATHS = {
  "all_gather": _all_gather,
  "doubling": _doubling,
  "all_to_all": _all_to_all,
  "ring": _ring,
}
