"""Attends from new tokens to a KV cache, for rows of different lengths.

A cache has S slots per row; the token at position t lies in slot `t mod S`. Full attention needs a slot for
every token. Attention with a window needs `window` slots, and new tokens overwrite the oldest.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ttt_jax.ops.attention.api import block_kernel
from ttt_jax.ops.numerics import accumulation_dtype


class KeyValueCache(NamedTuple):
  """Holds the keys and values of the tokens so far, or of the last S of them."""

  k: Float[Array, "B S G K"]
  v: Float[Array, "B S G K"]


def write(
  cache: KeyValueCache,
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  lengths: Int[Array, "B"],
  counts: Int[Array, "B"],
) -> KeyValueCache:
  """Writes the first `counts` of T new tokens of each row, which follow `lengths` earlier tokens."""
  b, t = k.shape[:2]
  slots = cache.k.shape[1]
  new = jnp.arange(t, dtype=jnp.int32)[None]
  is_kept = (new < counts[:, None]) & (new >= counts[:, None] - slots)
  slot = jnp.where(is_kept, (lengths[:, None] + new) % slots, slots)  # out of bounds: dropped
  rows = jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32)[:, None], slot.shape)

  def scatter(old, x):
    return old.at[rows, slot].set(x.astype(old.dtype), mode="drop", unique_indices=True)

  return KeyValueCache(scatter(cache.k, k), scatter(cache.v, v))


def attend_token(
  q: Float[Array, "B 1 H K"], cache: KeyValueCache, lengths: Int[Array, "B"]
) -> Float[Array, "B 1 H K"]:
  """Attends from one token per row, at position `lengths`, to a cache that already holds it."""
  b, _, h, width = q.shape
  slots, g = cache.k.shape[1:3]
  wide = accumulation_dtype(q.dtype)
  slot = jnp.arange(slots, dtype=jnp.int32)[None]
  position = lengths[:, None] - (lengths[:, None] - slot) % slots  # the last token in that slot
  grouped = q.reshape(b, g, h // g, width)
  scores = jnp.einsum("bgrk,bsgk->bgrs", grouped, cache.k, preferred_element_type=wide)
  seen = (position >= 0)[:, None, None]
  weights = jax.nn.softmax(jnp.where(seen, scores * width**-0.5, -jnp.inf), axis=-1)
  mixed = jnp.einsum(
    "bgrs,bsgk->bgrk", weights.astype(cache.v.dtype), cache.v, preferred_element_type=wide
  )
  return mixed.reshape(q.shape).astype(q.dtype)


def attend_span(
  q: Float[Array, "B L H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  cache: KeyValueCache,
  lengths: Int[Array, "B"],
  *,
  window: int | None,
  first: Int[Array, ""] | int = 0,
  implementation: str | None = None,
) -> Float[Array, "B L H K"]:
  """Attends from new tokens to themselves and to a cache of the earlier tokens.

  Args:
    q: queries of L of the T new tokens, from token `first` on.
    k, v: keys and values of all new tokens.
    cache: the earlier tokens; for full attention (`window` None) it already holds the new tokens too.
    lengths: the number of tokens of each row before the new ones.
    window: tokens seen, the token itself included.
    implementation: as for `attention`.
  """
  kernel = block_kernel(implementation, q, k, v)
  index = first + jnp.arange(q.shape[1], dtype=jnp.int32)
  if window is None:

    def row(inputs):  # one row at a time: a kernel takes the same positions for all rows
      q, k, v, length = inputs
      return kernel.attend(q[None], k[None], v[None], length + index)[0]

    return lax.map(row, (q, cache.k, cache.v, lengths))
  halo = window - 1
  before = jnp.arange(-halo, 0, dtype=jnp.int32)[None] + lengths[:, None]
  slot = (before % cache.k.shape[1])[:, :, None, None]
  take = partial(jnp.take_along_axis, indices=slot, axis=1)
  exists = (before >= 0).astype(jnp.int32)
  return kernel.attend(
    q,
    jnp.concatenate([take(cache.k).astype(k.dtype), k], axis=1),
    jnp.concatenate([take(cache.v).astype(v.dtype), v], axis=1),
    halo + index,
    jnp.ones(q.shape[:2], jnp.int32),
    jnp.concatenate([exists, jnp.ones(k.shape[:2], jnp.int32)], axis=1),
    window=window,
  )
