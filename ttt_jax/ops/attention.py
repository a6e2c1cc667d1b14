"""Causal attention over packed rows and contiguous shards, without ever making a `[T, T]` array.

The scores and the softmax are a library's (`jax.nn.dot_product_attention`); what is here is which keys a
block of queries meets, and how keys and values travel when the sequence lies on several devices.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.ops.context import shard_count
from ttt_jax.ops.segments import check_segment_ids

_IMPLEMENTATIONS = ("xla", "cudnn")
_SMALLEST_BLOCK = 64  # queries; smaller blocks leave matrix units idle
_FULL_BLOCK = 512
_SCORES_AT_ONCE = 1 << 26  # numbers; more blocks than this many scores are taken one after another


def attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  *,
  window: int | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  context_axis: str | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T H K"]:
  """`o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s` over the tokens s that t sees.

  Token t sees s if `t - window < s <= t` and both are in one segment: itself always. Grouped-query:
  H is a multiple of G. Softmax in float32 or wider; returns q's dtype.

  Memory is `O(T window)` with a window and `O(T)` blocks of `[512, T]` scores without; scores are
  recomputed in the backward pass. With `context_axis`, T is this device's contiguous shard. A window
  fetches the `window - 1` keys and values before the shard from its left neighbours (halo exchange,
  `2 (window - 1) G K` numbers per row and device); full attention gathers all keys and values.

  Args:
    q: queries; k, v: keys and values.
    window: tokens seen, the token itself included; None for all earlier ones.
    segment_ids: a number per token, unique to its document within the whole row (see
      `segments.number_documents`); padding, 0, sees padding.
    context_axis: a mesh axis of the enclosing `jax.shard_map`.
    implementation: `"xla"`, or `"cudnn"` where it can express the call; None chooses.

  Raises:
    ValueError: shapes or values that disagree, an unbound `context_axis`, an unknown name.
    NotImplementedError: `"cudnn"` for something it cannot express.
  """
  _check(q, k, v, window, segment_ids, implementation)
  shards = 1 if context_axis is None else shard_count(context_axis)
  if implementation == "cudnn":
    return _cudnn(q, k, v, window, segment_ids, shards)
  if segment_ids is None:
    segment_ids = jnp.ones(q.shape[:2], jnp.int32)
  start = jnp.int32(0)
  if shards > 1:
    start = q.shape[1] * lax.axis_index(context_axis)
  if window is None:
    return _full(q, k, v, segment_ids, start, context_axis if shards > 1 else None)
  return _local(q, k, v, segment_ids, start, window, context_axis if shards > 1 else None)


def _local(q, k, v, segment_ids, start, window, context_axis):
  """Blocks of L >= window queries against their own keys and those of the block before."""
  b, t, h, _ = q.shape
  size = min(max(window, _SMALLEST_BLOCK), max(t, window))
  blocks = -(-t // size)
  tail = blocks * size - t
  if context_axis is None:
    before = (_zeros_before(k, size), _zeros_before(v, size), _zeros_before(segment_ids, size))
  else:
    with jax.named_scope("halo_exchange"):
      halo = _halo(k, v, segment_ids, window - 1, context_axis)
    before = tuple(_pad_front(x, size - (window - 1)) for x in halo)

  def cut(x, front):
    """`[blocks, B, 2 L, ...]`: every block with the one before it."""
    whole = jnp.concatenate([front, _pad_back(x, tail)], axis=1)
    parts = jnp.moveaxis(whole.reshape(b, blocks + 1, size, *x.shape[2:]), 1, 0)
    return jnp.concatenate([parts[:-1], parts[1:]], axis=2)

  def block(inputs):
    q, k, v, q_segments, k_segments, index = inputs
    q_position = start + index * size + jnp.arange(size)
    k_position = start + (index - 1) * size + jnp.arange(2 * size)
    return _attend(q, k, v, q_position, k_position, q_segments, k_segments, window)

  with jax.named_scope("local_attention"):
    inputs = (
      _blocks_of(q, blocks, size),
      cut(k, before[0]),
      cut(v, before[1]),
      _blocks_of(segment_ids, blocks, size),
      cut(segment_ids, before[2]),
      jnp.arange(blocks),
    )
    at_once = max(1, _SCORES_AT_ONCE // (b * h * size * 2 * size))
    return _join(_map_blocks(block, inputs, at_once), t)


def _full(q, k, v, segment_ids, start, context_axis):
  """Blocks of queries at their global positions against all keys."""
  t = q.shape[1]
  q_segments = segment_ids
  if context_axis is not None:
    with jax.named_scope("gather_keys_and_values"):
      k, v = lax.all_gather(jnp.stack([k, v]), context_axis, axis=2, tiled=True)
      segment_ids = lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)
  size = min(t, _FULL_BLOCK)
  blocks = -(-t // size)
  k_position = jnp.arange(k.shape[1])

  def block(inputs):
    q, q_segments, index = inputs
    q_position = start + index * size + jnp.arange(size)
    return _attend(q, k, v, q_position, k_position, q_segments, segment_ids, None)

  with jax.named_scope("full_attention"):
    inputs = (
      _blocks_of(q, blocks, size),
      _blocks_of(q_segments, blocks, size),
      jnp.arange(blocks),
    )
    return _join(_map_blocks(block, inputs, 1), t)


def _halo(k, v, segment_ids, length, context_axis):
  """The last `length` tokens before the shard, from as many left neighbours as it takes.

  What lies before the sequence arrives as zeros; its positions are negative, so nothing sees it.
  """
  shards, t = shard_count(context_axis), k.shape[1]
  kv = jnp.stack([k, v])
  parts = []
  for hop in range(1, -(-length // t) + 1):
    if hop >= shards:
      missing = length - (hop - 1) * t  # before the first shard, wherever we are
      parts.append((_zeros_tail(kv, missing, 2), _zeros_tail(segment_ids, missing, 1)))
      break
    take = min(t, length - (hop - 1) * t)
    route = [(p, p + hop) for p in range(shards - hop)]
    parts.append(
      (
        lax.ppermute(kv[:, :, t - take :], context_axis, route),
        lax.ppermute(segment_ids[:, t - take :], context_axis, route),
      )
    )
  if not parts:
    return k[:, :0], v[:, :0], segment_ids[:, :0]
  kv = jnp.concatenate([part for part, _ in reversed(parts)], axis=2)
  return kv[0], kv[1], jnp.concatenate([part for _, part in reversed(parts)], axis=1)


def _attend(
  q: Float[Array, "B L H K"],
  k: Float[Array, "B S G K"],
  v: Float[Array, "B S G K"],
  q_position: Int[Array, "L"],
  k_position: Int[Array, "S"],
  q_segments: Int[Array, "B L"],
  k_segments: Int[Array, "B S"],
  window: int | None,
) -> Float[Array, "B L H K"]:
  """One block of queries against its keys, on the library's kernel."""
  distance = q_position[:, None] - k_position[None, :]
  seen: Bool[Array, "L S"] = (distance >= 0) & (k_position >= 0)[None, :]
  if window is not None:
    seen &= distance < window
  same = q_segments[:, :, None] == k_segments[:, None, :]
  mask = (seen[None] & same)[:, None]
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def _map_blocks(block, inputs, at_once):
  """`block` over the leading axis, `at_once` of them together; scores are not kept for backward."""
  blocks = inputs[-1].shape[0]
  block = jax.checkpoint(block)
  if blocks <= at_once:
    return jax.vmap(block)(inputs)
  return lax.map(block, inputs, batch_size=at_once if at_once > 1 else None)


def _blocks_of(x, blocks, size):
  """`[B, T, ...]` to `[blocks, B, L, ...]`, zeros behind the end."""
  padded = _pad_back(x, blocks * size - x.shape[1])
  return jnp.moveaxis(padded.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _join(blocks, t):
  """`[blocks, B, L, H, K]` back to `[B, T, H, K]`."""
  n, b, size, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * size, *rest)[:, :t]


def _pad_back(x, length):
  return jnp.pad(x, [(0, 0), (0, length)] + [(0, 0)] * (x.ndim - 2))


def _pad_front(x, length):
  return jnp.pad(x, [(0, 0), (length, 0)] + [(0, 0)] * (x.ndim - 2))


def _zeros_before(x, length):
  return jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)


def _zeros_tail(x, length, axis):
  return jnp.zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)


def _cudnn(q, k, v, window, segment_ids, shards):
  """cuDNN's fused kernel, for one device and rows of one document."""
  reasons = []
  if shards > 1:
    reasons.append("a sequence split over devices")
  if segment_ids is not None:
    reasons.append("segment_ids")
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    reasons.append(f"dtype {q.dtype}")
  if jax.default_backend() != "gpu":
    reasons.append(f"the {jax.default_backend()} backend")
  if reasons:
    raise NotImplementedError(
      f"attention.implementation='cudnn' cannot take {', '.join(reasons)}: use 'xla'"
    )
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


def _check(q, k, v, window, segment_ids, implementation):
  if q.ndim != 4 or k.ndim != 4:
    raise ValueError(f"q has shape {q.shape}, k {k.shape}: expected [B, T, H, K] and [B, T, G, K]")
  if k.shape != v.shape or (k.shape[:2], k.shape[3]) != (q.shape[:2], q.shape[3]):
    raise ValueError(
      f"k has shape {k.shape} and v {v.shape}, expected [B, T, G, K] to q's [B, T, H, K] = {q.shape}"
    )
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
  if window is not None and window < 1:
    raise ValueError(f"window={window} must be at least 1: a token sees itself")
  if segment_ids is not None:
    check_segment_ids(segment_ids, q.shape[:2])
  if implementation not in (None, *_IMPLEMENTATIONS):
    known = ", ".join(map(repr, _IMPLEMENTATIONS))
    raise ValueError(f"attention implementation={implementation!r} is not one of {known}")
