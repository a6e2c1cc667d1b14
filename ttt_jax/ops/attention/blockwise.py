"""Attends causally from queries at any positions of a row to all of its keys, by blocks, in plain XLA.

The softmax is carried from one block of keys to the next, so that no array is queries by keys. A block of
keys that no query of a block sees is not computed. `sharded.py` brings keys and queries to this device.

A weight of 0 would not keep a NaN of an unseen key out of a product. So products take the finite part of
their operands, and NaN is added to the scores of queries and keys that were not finite: it reaches only
the queries that see such a key.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from ttt_jax.ops.linear import reverse_only
from ttt_jax.ops.manual import vary_over, varying_axes, varying_zeros
from ttt_jax.ops.numerics import accumulation_dtype, finite, poison

BLOCK = 512  # the most tokens of a block
# The running maximum before the first key: finite, so that exp(-inf - m) is 0 and not NaN.
_LOWEST = -1e30


def attend(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B S G K"],
  v: Float[Array, "B S G K"],
  q_position: Int[Array, "T"],
  q_segments: Int[Array, "B T"] | None = None,
  k_segments: Int[Array, "B S"] | None = None,
  *,
  window: int | None = None,
  block: int | None = None,
) -> Float[Array, "B T H K"]:
  """Computes `o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s` over the keys s that query t sees.

  Query t sees the keys `q_position[t] - window < s <= q_position[t]` of its segment; a query that sees
  no key gets 0. Grouped-query: H is a multiple of G. Softmax, sums and gradients are accumulated in
  float32 or wider; returns q's dtype.

  The backward pass keeps q, k, v, o and the log of the softmax's denominator, and recomputes the
  weights. First derivatives only, in reverse mode. NaN and infinities reach only the outputs and
  gradients of the queries that see them.

  Args:
    q: queries; k, v: keys and values 0 to S - 1.
    q_position: the last key each query sees. Stretches of neighbouring positions should fill whole
      blocks: a block that straddles two stretches costs as much as two blocks.
    q_segments, k_segments: the document of every query and key.
    window: keys seen; None for all earlier ones.
    block: queries taken at once; None for `block_length(T)`.
  """
  b, t, h, _ = q.shape
  g = k.shape[2]
  axes = varying_axes(*(x for x in (q, k, v, q_position, q_segments, k_segments) if x is not None))
  q, k, v, q_position = (vary_over(x, axes) for x in (q, k, v, q_position))
  size_q, size_k = block or block_length(t, window), block_length(k.shape[1], window)
  kv = [
    jnp.moveaxis(cut(x, size_k), 3, 2)  # [J, B, G, S, K]
    for x in (k, v)
  ]
  grouped = jnp.moveaxis(cut(q.reshape(b, t, g, h // g, -1), size_q), 2, -2)  # [I, B, G, R, L, K]
  positions = cut(q_position[None].astype(jnp.int32), size_q)[:, 0]
  segments = None
  if q_segments is not None:
    segments = (
      vary_over(cut(q_segments, size_q), axes),
      vary_over(cut(k_segments, size_k), axes),
    )
  seen = visible_blocks(positions, segments, keys=(kv[0].shape[0], size_k), window=window)
  arrays = reverse_only((grouped, *kv), "blockwise attention (implementation='xla')")
  mixed = _attend_blocks(*arrays, positions, segments, bounds(seen), window)
  joined = jnp.moveaxis(mixed, (0, 4), (1, 2))  # [B, I, L, G, R, K]
  return joined.reshape(b, -1, *q.shape[2:])[:, :t]


def block_length(tokens: int, window: int | None = None) -> int:
  """Returns the length of the equal blocks that `tokens` are cut into.

  A block of L queries computes up to 2 L keys beyond its window, so blocks are shorter for a short window.
  """
  longest = BLOCK if window is None else min(BLOCK, max(BLOCK // 4, window // 2))
  blocks = -(-tokens // longest)
  return -(-tokens // blocks)


def visible_blocks(
  q_position: Int[Array, "I L"],
  segments: tuple[Int[Array, "I B L"], Int[Array, "J B S"]] | None,
  *,
  keys: tuple[int, int],
  window: int | None,
) -> Bool[Array, "I J"]:
  """Says which pairs of blocks to compute: whether a query of block i may see a key of block j.

  Segments are compared by their ranges, which is exact for rows of documents in ascending order.

  Args:
    q_position: the last key each query sees.
    segments: the segments of the queries and of the keys.
    keys: the number of blocks of keys and their length.
  """
  blocks, size = keys
  start = size * jnp.arange(blocks, dtype=q_position.dtype)[None]
  seen = jnp.max(q_position, 1)[:, None] >= start
  if window is not None:
    seen &= jnp.min(q_position, 1)[:, None] - window < start + (size - 1)
  if segments is not None:
    q_segments, k_segments = segments
    below = jnp.max(q_segments, 2)[:, None] < jnp.min(k_segments, 2)[None]
    above = jnp.min(q_segments, 2)[:, None] > jnp.max(k_segments, 2)[None]
    seen &= jnp.any(~(below | above), axis=2)
  return seen


def bounds(seen: Bool[Array, "I J"]) -> tuple[Int[Array, "I"], Int[Array, "I"]]:
  """Returns the first block of keys that each block of queries sees, and the last one plus 1."""
  blocks = seen.shape[1]
  first = lax.argmax(seen, 1, jnp.int32)
  last = blocks - lax.argmax(seen[:, ::-1], 1, jnp.int32)
  return first, jnp.where(jnp.any(seen, axis=1), last, first)


def cut(x: Shaped[Array, "B T *S"], size: int) -> Shaped[Array, "N B L *S"]:
  """Cuts x into blocks of `size` tokens; copies of the last token fill the last block."""
  b, t = x.shape[:2]
  padding = [(0, 0), (0, -t % size)] + [(0, 0)] * (x.ndim - 2)
  padded = jnp.pad(x, padding, mode="edge") if t % size else x
  return jnp.moveaxis(padded.reshape(b, -1, size, *x.shape[2:]), 1, 0)


def _nan_where_bad(x):
  """Returns NaN for the heads of tokens that are not finite, else 0; float32 or wider."""
  return poison(jnp.any(~jnp.isfinite(x), axis=-1), accumulation_dtype(x.dtype))


def _keys_and_values(k, v):
  """Returns the finite part of keys and values, and NaN for keys where either is not finite, else 0."""
  return finite(k), finite(v), _nan_where_bad(k) + _nan_where_bad(v)


def _scores(q, k, bad_q, bad_k, j, position, q_segments, k_segments, window):
  """Computes the scores `[B, G, R, L, S]`, `q k / sqrt(K)`, of a block of queries and block j of keys.

  A score is -inf where unseen, and NaN where seen if the query or the key is bad.
  """
  wide = accumulation_dtype(q.dtype)
  scores = jnp.einsum("bgrlk,bgsk->bgrls", q, k, preferred_element_type=wide)
  key = j * k.shape[2] + jnp.arange(k.shape[2], dtype=position.dtype)
  distance = position[:, None] - key[None]
  seen = (distance >= 0)[None]
  if window is not None:
    seen &= (distance < window)[None]
  if q_segments is not None:
    seen = seen & (q_segments[:, :, None] == k_segments[:, None, :])
  scores = scores * q.shape[-1] ** -0.5 + (bad_q[..., None] + bad_k[:, :, None, None])
  return jnp.where(seen[:, None, None], scores, -jnp.inf)


def _weights(scores, log_total):
  """Returns `exp(scores - log_total)`, and 0 where unseen, also in a row that is NaN."""
  return jnp.where(scores == -jnp.inf, 0, jnp.exp(scores - log_total[..., None]))


def _key_segments(segments, j):
  """Returns the segments of block j of keys."""
  return None if segments is None else segments[1][j]


def _query_inputs(positions, segments, key_bounds):
  """Returns the inputs of every block of queries besides q, stacked for `lax.map`."""
  return positions, None if segments is None else segments[0], *key_bounds


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend_blocks(q, k, v, positions, segments, key_bounds, window):
  return _forward(q, k, v, positions, segments, key_bounds, window)[0]


def _forward(
  q: Float[Array, "I B G R L K"],
  k: Float[Array, "J B G S K"],
  v: Float[Array, "J B G S K"],
  positions: Int[Array, "I L"],
  segments: tuple[Int[Array, "I B L"], Int[Array, "J B S"]] | None,
  key_bounds: tuple[Int[Array, "I"], Int[Array, "I"]],
  window: int | None,
) -> tuple[Float[Array, "I B G R L K"], Float[Array, "I B G R L"]]:
  """Returns the outputs, and `log sum_s exp(q_t k_s / sqrt(K))` of every query (0 if it sees no key)."""
  wide = accumulation_dtype(q.dtype)

  def block(inputs):
    q, (position, q_segments, first, last) = inputs
    q, bad_q = finite(q), _nan_where_bad(q)

    def step(j, carry):
      o, top, total = carry
      k_j, v_j, bad_k = _keys_and_values(k[j], v[j])
      k_segments = _key_segments(segments, j)
      scores = _scores(q, k_j, bad_q, bad_k, j, position, q_segments, k_segments, window)
      new_top = jnp.maximum(top, jnp.max(scores, -1))
      weights = jnp.exp(scores - new_top[..., None])
      shrink = jnp.exp(top - new_top)  # rescales the sums so far to the new maximum
      mixed = jnp.einsum(
        "bgrls,bgsk->bgrlk", weights.astype(v.dtype), v_j, preferred_element_type=wide
      )
      o = shrink[..., None] * o + mixed
      return o, new_top, shrink * total + jnp.sum(weights, -1)

    zeros = varying_zeros(q.shape, wide, q)
    start = (zeros, zeros[..., 0] + _LOWEST, zeros[..., 0])
    o, top, total = lax.fori_loop(first, last, step, start)
    sees_none = total == 0
    total = jnp.where(sees_none, 1, total)
    return (o / total[..., None]).astype(q.dtype), jnp.where(sees_none, 0, top + jnp.log(total))

  with jax.named_scope("blockwise_attention"):
    return lax.map(block, (q, _query_inputs(positions, segments, key_bounds)))


def _attend_blocks_fwd(q, k, v, positions, segments, key_bounds, window):
  o, log_total = _forward(q, k, v, positions, segments, key_bounds, window)
  return o, (q, k, v, positions, segments, key_bounds, o, log_total)


def _attend_blocks_bwd(window, saved, cotangent):
  """Recomputes the weights p_ts and sums the cotangents of queries, keys and values.

  With `a_t = do_t o_t`, the cotangent of the score `q_t k_s / sqrt(K)` is

      ds_ts = p_ts (do_t v_s - a_t)

  and `dq_t = sum_s ds_ts k_s`, `dk_s = sum_t ds_ts q_t`, both over sqrt(K), `dv_s = sum_t p_ts do_t`.
  Blocks of queries are taken in order and add to dk and dv.
  """
  q, k, v, positions, segments, key_bounds, o, log_total = saved
  wide = accumulation_dtype(q.dtype)
  do_dot_o = jnp.sum(cotangent.astype(wide) * o.astype(wide), -1)

  def block(carry, inputs):
    q, do, log_total, do_dot_o, (position, q_segments, first, last) = inputs
    q, bad_q, do = finite(q), _nan_where_bad(q), finite(do)

    def step(j, carry):
      dq, dk, dv = carry
      k_j, v_j, bad_k = _keys_and_values(k[j], v[j])
      k_segments = _key_segments(segments, j)
      scores = _scores(q, k_j, bad_q, bad_k, j, position, q_segments, k_segments, window)
      weights = _weights(scores, log_total)
      product = partial(jnp.einsum, preferred_element_type=wide)
      dv_j = product("bgrls,bgrlk->bgsk", weights.astype(do.dtype), do)
      dscores = product("bgrlk,bgsk->bgrls", do, v_j) - do_dot_o[..., None]
      dscores = jnp.where(scores == -jnp.inf, 0, weights * dscores)
      dscores = (q.shape[-1] ** -0.5 * dscores).astype(q.dtype)
      dq += product("bgrls,bgsk->bgrlk", dscores, k_j)
      dk_j = product("bgrls,bgrlk->bgsk", dscores, q)
      return dq, _add_at(dk, j, dk_j), _add_at(dv, j, dv_j)

    dq, *carry = lax.fori_loop(first, last, step, (varying_zeros(q.shape, wide, q), *carry))
    return tuple(carry), dq.astype(q.dtype)

  with jax.named_scope("blockwise_attention_backward"):
    (dk, dv), dq = lax.scan(
      block,
      (varying_zeros(k.shape, wide, k), varying_zeros(v.shape, wide, v)),
      (q, cotangent, log_total, do_dot_o, _query_inputs(positions, segments, key_bounds)),
    )
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend_blocks.defvjp(_attend_blocks_fwd, _attend_blocks_bwd)


def _add_at(x, j, value):
  """Returns x with `value` added at index j."""
  return lax.dynamic_update_index_in_dim(x, x[j] + value, j, 0)
