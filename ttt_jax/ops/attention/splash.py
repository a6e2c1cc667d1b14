"""Calls the TPU's splash attention kernel, for queries at any positions of a row.

The kernel takes lists of the blocks to compute. JAX builds them from a mask that is known when the program
is traced. Here the program computes them from the queries' positions, so that every device of a mesh has
its own lists, and from the segments, so that blocks of other documents are not computed.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.ops.attention.blockwise import bounds, cut, visible_blocks
from ttt_jax.ops.manual import is_checked, varying_axes

_DTYPES = ("bfloat16", "float32")
_BLOCKS = (512, 256, 128)  # tokens; the kernel takes multiples of 128
_INTERPRET = False  # tests run the kernel on CPU


def block_length(tokens: int) -> int:
  """Returns the longest block that divides `tokens`, padded to a multiple of 128."""
  return next(block for block in _BLOCKS if -(-tokens // 128) * 128 % block == 0)


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
  """Computes `blockwise.attend` as a TPU kernel: bfloat16 or float32, outside of `check_vma=True`.

  With a window the positions must be contiguous; every query must see a key.
  """
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as library,  # slow to import
  )

  t, s = q.shape[1], k.shape[1]
  block_q, block_k = block or block_length(t), block_length(s)
  positions = cut(q_position[None].astype(jnp.int32), block_q)[:, 0]
  segments, ids = None, None
  if q_segments is not None:
    q_segments, k_segments = q_segments.astype(jnp.int32), k_segments.astype(jnp.int32)
    segments = (cut(q_segments, block_q), cut(k_segments, block_k))
    ids = library.SegmentIds(_fill(q_segments, block_q), _fill(k_segments, block_k))

  keys = (-(-s // block_k), block_k)
  seen = visible_blocks(positions, segments, keys=keys, window=window)
  in_window = visible_blocks(positions, None, keys=keys, window=window)
  rows, columns = seen.shape
  if window is not None:  # the most blocks of keys, or of queries, within the window of one block
    columns = min(columns, _most_blocks(window + block_q - 1, block_k))
    rows = min(rows, _most_blocks(window + block_k - 1, block_q))
  info = library.mask_info_lib.MaskInfo
  position = positions.reshape(-1)
  by_query = info(*_schedule(seen, in_window, columns), None, position)
  by_key = info(
    *(x if x is None else x.mT for x in _schedule(seen.T, in_window.T, rows)), None, position
  )
  kernel = library.SplashAttentionKernel(
    by_query,
    by_query,
    by_key,
    block_sizes=library.BlockSizes(
      block_q=block_q,
      block_kv=block_k,
      block_q_dkv=block_q,
      block_kv_dkv=block_k,
      block_q_dq=block_q,
      block_kv_dq=block_k,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=library.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=_mask_function(window),
    interpret=_INTERPRET,
  )
  q = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
  heads = (jnp.swapaxes(x, 1, 2) for x in (_fill(q, block_q), _fill(k, block_k), _fill(v, block_k)))
  with jax.named_scope("splash_attention"):
    o = jax.vmap(kernel)(*heads, ids)
  return jnp.swapaxes(o, 1, 2)[:, :t]


def refusals(q: Array, k: Array, v: Array, context_axis: str | None) -> list[str]:
  """Lists what of a call the kernel cannot take; empty if it takes the call."""
  reasons = []
  if q.dtype not in _DTYPES:
    reasons.append(f"dtype {q.dtype}")
  # JAX's kernel does not say over which mesh axes its outputs vary.
  if varying_axes(q, k, v) or (context_axis is not None and is_checked(context_axis)):
    reasons.append("jax.shard_map with check_vma=True (pass False)")
  return reasons


@cache  # the kernel's jit compares mask functions by identity
def _mask_function(window: int | None):
  """Returns the function by which the kernel decides, from their positions, whether a query sees a key."""

  def sees(q, k):
    return q >= k if window is None else (q >= k) & (q - window < k)

  return sees


def _schedule(
  seen: Bool[Array, "I J"], in_window: Bool[Array, "I J"], steps: int
) -> tuple[Int[Array, "1 I W"], None, Int[Array, "1 I W"]]:
  """Lists for each row which column to fetch in each of `steps` steps, and whether to compute it.

  The steps of a row start at the first column in its window. A step that computes nothing fetches the
  column that its neighbour needs.
  """
  columns = seen.shape[1]
  column = bounds(in_window)[0][:, None] + jnp.arange(steps, dtype=jnp.int32)[None]
  compute = jnp.take_along_axis(seen, jnp.minimum(column, columns - 1), axis=1) & (column < columns)
  first, end = bounds(seen)
  fetch = jnp.clip(column, first[:, None], jnp.maximum(first, end - 1)[:, None])
  # Small types: scalar memory is scarce.
  fetch = fetch.astype(
    jnp.int8 if columns <= 127 else jnp.int16 if columns < 1 << 15 else jnp.int32
  )
  return fetch[None], None, compute[None].astype(jnp.int8)


def _most_blocks(length: int, block: int) -> int:
  """Returns the most blocks that `length` neighbouring tokens can touch."""
  return (length + block - 2) // block + 1


def _fill(x, block):
  """Pads with copies of the last token up to a multiple of `block`."""
  padding = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding, mode="edge")
