"""Exchanges what attention needs on a sequence that is cut into contiguous shards.

Full attention gathers all keys and values (`full`), attention with a window fetches those of the
`window - 1` tokens before the shard (`windowed`, halo exchange). A kernel then attends on one device: a
module whose `attend` takes queries at any positions of the row, `blockwise` or `splash`.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ttt_jax.ops.manual import shard_count


def full(
  kernel: ModuleType,
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  segment_ids: Int[Array, "B T"] | None,
  context_axis: str | None,
  *,
  balance: bool,
) -> Float[Array, "B T H K"]:
  """Attends to all earlier tokens: every shard gathers the keys and values of the whole sequence.

  A later shard's queries see more keys. With `balance`, shard p swaps the second half of its queries with
  that of its mirror shard P-1-p, and the outputs back, so that all devices compute equally much.
  """
  t = q.shape[1]
  if context_axis is None:
    return kernel.attend(q, k, v, indices(t), segment_ids, segment_ids)
  with jax.named_scope("gather_keys_and_values"):
    k, v = lax.all_gather(jnp.stack([k, v]), context_axis, axis=2, tiled=True)
    if segment_ids is not None:
      segment_ids = lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)

  def attend(q, positions, block=None):
    q_segments = None
    if segment_ids is not None:
      q_segments = jnp.take(segment_ids, positions, axis=1, mode="clip")
    return kernel.attend(q, k, v, positions, q_segments, segment_ids, block=block)

  block = kernel.block_length(-(-t // 2))
  half = block * -(-t // (2 * block))  # queries padded behind the shard fill the second half
  if not balance or half >= t:  # a shard of one block has nothing to swap
    return attend(q, first_position(t, context_axis) + indices(t))
  shard = lax.axis_index(context_axis)
  mirror = shard_count(context_axis) - 1 - shard
  kept, swapped = shard * t + indices(half), mirror * t + half + indices(half)
  q = _swap_second_halves(pad_tokens(q, back=2 * half - t), context_axis)
  o = attend(q, jnp.concatenate([kept, swapped]), block)
  return _swap_second_halves(o, context_axis)[:, :t]


def windowed(
  kernel: ModuleType,
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  segment_ids: Int[Array, "B T"] | None,
  context_axis: str | None,
  *,
  window: int,
) -> Float[Array, "B T H K"]:
  """Attends to the last `window` tokens: those of the shard, and the halo before the shard."""
  t = q.shape[1]
  if context_axis is None:
    return kernel.attend(q, k, v, indices(t), segment_ids, segment_ids, window=window)
  length = window - 1
  with jax.named_scope("halo_exchange"):
    halo_k, halo_v, halo_segments = halo(k, v, segment_ids, length, context_axis)
  if segment_ids is None:
    segment_ids, halo_segments = jnp.ones((q.shape[0], t), jnp.int32), jnp.int32(1)
  # Halo tokens before the start of the sequence get a segment that no query has.
  exists = first_position(t, context_axis) + indices(length) >= length
  no_segment = jnp.iinfo(segment_ids.dtype).max
  halo_segments = jnp.where(
    jnp.broadcast_to(exists, (q.shape[0], length)), halo_segments, no_segment
  )
  return kernel.attend(
    q,
    jnp.concatenate([halo_k, k], axis=1),
    jnp.concatenate([halo_v, v], axis=1),
    length + indices(t),
    segment_ids,
    jnp.concatenate([halo_segments, segment_ids], axis=1),
    window=window,
  )


def halo(
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  segment_ids: Int[Array, "B T"] | None,
  length: int,
  context_axis: str,
) -> tuple[Float[Array, "B L G K"], Float[Array, "B L G K"], Int[Array, "B L"] | None]:
  """Fetches keys, values and segments of the `length` tokens before the shard.

  They come from as many shards to the left as hold them. Tokens before the start of the sequence are
  zeros.
  """
  shards, t = shard_count(context_axis), k.shape[1]
  arrays = [(jnp.stack([k, v]), 2)] + ([] if segment_ids is None else [(segment_ids, 1)])
  parts = []  # of the halo, from right to left
  for hop in range(1, -(-length // t) + 1):
    if hop >= shards:
      missing = length - (hop - 1) * t  # before the first shard, as seen from every shard
      parts.append([zero_tokens(x, missing, axis) for x, axis in arrays])
      break
    fetched = min(t, length - (hop - 1) * t)
    route = [(p, p + hop) for p in range(shards - hop)]
    parts.append(
      [
        lax.ppermute(lax.slice_in_dim(x, t - fetched, t, axis=axis), context_axis, route)
        for x, axis in arrays
      ]
    )
  if not parts:
    parts = [[zero_tokens(x, 0, axis) for x, axis in arrays]]
  joined = [
    jnp.concatenate([part[i] for part in reversed(parts)], axis=axis)
    for i, (_, axis) in enumerate(arrays)
  ]
  return *joined[0], None if segment_ids is None else joined[1]


def _swap_second_halves(x, context_axis):
  """Replaces the second half of this shard's tokens by the mirror shard's; its own inverse."""
  shards = shard_count(context_axis)
  kept, sent = jnp.split(x, 2, axis=1)
  with jax.named_scope("swap_second_halves"):
    received = lax.ppermute(sent, context_axis, [(p, shards - 1 - p) for p in range(shards)])
  return jnp.concatenate([kept, received], axis=1)


def indices(length: int) -> Int[Array, "T"]:
  """Returns 0 to `length - 1`."""
  return jnp.arange(length, dtype=jnp.int32)


def first_position(t: int, context_axis: str | None) -> Int[Array, ""]:
  """Returns the position in the sequence of this shard's first token."""
  return jnp.int32(0) if context_axis is None else t * lax.axis_index(context_axis)


def pad_tokens(x: Shaped[Array, "B T *S"], *, front: int = 0, back: int = 0) -> Array:
  """Adds zeros before and after the tokens."""
  return jnp.pad(x, [(0, 0), (front, back)] + [(0, 0)] * (x.ndim - 2))


def zero_tokens(x: Array, length: int, axis: int = 1) -> Array:
  """Returns zeros of the shape of x, but with `length` tokens along `axis`."""
  return jnp.zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)
