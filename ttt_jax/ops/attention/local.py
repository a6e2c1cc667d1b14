"""Computes attention with a short window as a plain softmax in XLA.

Queries are cut into blocks of L >= window tokens. A block meets the keys of its own L tokens and of the L
tokens before them: all that its window can reach.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.ops.attention.sharded import first_position, halo, indices, pad_tokens, zero_tokens
from ttt_jax.ops.linear import finite_cotangent
from ttt_jax.ops.numerics import accumulation_dtype, finite, poison

_SMALLEST_BLOCK = 64  # queries; smaller blocks leave matrix units idle
_SCORES_AT_ONCE = 1 << 26  # numbers; more blocks than this many scores are taken one after another


def attend(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  segment_ids: Int[Array, "B T"] | None,
  context_axis: str | None,
  *,
  window: int,
) -> Float[Array, "B T H K"]:
  """Attends to the last `window` tokens, on one device or over the shards of `context_axis`."""
  b, t, h, _ = q.shape
  start = first_position(t, context_axis)
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  size = min(max(window, _SMALLEST_BLOCK), max(t, window))
  blocks = -(-t // size)
  if context_axis is None:
    before = tuple(zero_tokens(x, size) for x in (k, v, segment_ids))
  else:
    with jax.named_scope("halo_exchange"):
      fetched = halo(k, v, segment_ids, window - 1, context_axis)
    before = tuple(pad_tokens(x, front=size - (window - 1)) for x in fetched)

  def key_blocks(x, before):
    """Returns `[blocks, B, 2 L, ...]`, every block preceded by the block before it."""
    padded = jnp.concatenate([before, pad_tokens(x, back=blocks * size - t)], axis=1)
    parts = jnp.moveaxis(padded.reshape(b, blocks + 1, size, *x.shape[2:]), 1, 0)
    return jnp.concatenate([parts[:-1], parts[1:]], axis=2)

  def attend_block(inputs):
    q, k, v, q_segments, k_segments, index = inputs
    q_position = start + index * size + indices(size)
    k_position = start + (index - 1) * size + indices(2 * size)
    return _attend_block(q, k, v, q_position, k_position, q_segments, k_segments, window)

  with jax.named_scope("local_attention"):
    inputs = (
      _query_blocks(q, blocks, size),
      key_blocks(k, before[0]),
      key_blocks(v, before[1]),
      _query_blocks(segment_ids, blocks, size),
      key_blocks(segment_ids, before[2]),
      indices(blocks),
    )
    at_once = max(1, _SCORES_AT_ONCE // (b * h * size * 2 * size))
    return _join(_map_blocks(attend_block, inputs, at_once), t)


def _attend_block(
  q: Float[Array, "B L H K"],
  k: Float[Array, "B S G K"],
  v: Float[Array, "B S G K"],
  q_position: Int[Array, "L"],
  k_position: Int[Array, "S"],
  q_segments: Int[Array, "B L"],
  k_segments: Int[Array, "B S"],
  window: int,
) -> Float[Array, "B L H K"]:
  """Attends from one block of queries to its keys; every query sees at least one key.

  As in `blockwise`, products take the finite part of their operands, and NaN is added to the outputs of
  the queries that saw a NaN or an infinity.
  """
  b, size, h, width = q.shape
  wide = accumulation_dtype(q.dtype)
  distance = q_position[:, None] - k_position[None, :]
  in_window: Bool[Array, "L S"] = (distance >= 0) & (distance < window) & (k_position >= 0)[None]
  seen = in_window[None] & (q_segments[:, :, None] == k_segments[:, None, :])
  bad_keys = jnp.any(~jnp.isfinite(k) | ~jnp.isfinite(v), axis=(2, 3))
  bad = jnp.any(seen & bad_keys[:, None], axis=-1) | jnp.any(~jnp.isfinite(q), axis=(2, 3))
  q, k, v = finite(q), finite(k), finite(v)
  grouped = q.reshape(b, size, k.shape[2], h // k.shape[2], width)
  scores = jnp.einsum("blgrk,bsgk->bgrls", grouped, k, preferred_element_type=wide)
  scores = jnp.where(seen[:, None, None], scores * width**-0.5, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  # Also where a score overflows, unseen keys have weight 0.
  weights = jnp.where(seen[:, None, None], weights, 0).astype(v.dtype)
  o = jnp.einsum("bgrls,bsgk->blgrk", weights, v, preferred_element_type=wide).reshape(q.shape)
  o = finite_cotangent(o, q.astype(wide)) + poison(bad, wide)[..., None, None]
  return o.astype(q.dtype)


def _map_blocks(attend_block, inputs, at_once):
  """Maps over the leading axis, `at_once` blocks at a time; scores are recomputed in the backward pass."""
  blocks = inputs[-1].shape[0]
  attend_block = jax.checkpoint(attend_block)
  if blocks <= at_once:
    return jax.vmap(attend_block)(inputs)
  return lax.map(attend_block, inputs, batch_size=at_once if at_once > 1 else None)


def _query_blocks(x, blocks, size):
  """Reshapes `[B, T, ...]` to `[blocks, B, L, ...]`, right-padded with zeros."""
  padded = pad_tokens(x, back=blocks * size - x.shape[1])
  return jnp.moveaxis(padded.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _join(blocks, t):
  """Reshapes `[blocks, B, L, H, K]` back to `[B, T, H, K]`."""
  n, b, size, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * size, *rest)[:, :t]
