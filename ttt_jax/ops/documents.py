"""Handles documents in packed rows: the meaning of `segment_ids`, and the masks that chunks get from them.

`segment_ids [B, T]` name each token's document; neighbouring documents differ and 0 is padding. So a
document is a stretch of equal ids: the same id later in the row names another document.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from ttt_jax.errors import UserError
from ttt_jax.ops.manual import from_previous_shard, shard_count


class ChunkMasks(NamedTuple):
  """Holds the masks that say which tokens read and write the state. R tokens follow the last full chunk.

  Attributes:
    reads: the token belongs to the document whose state enters its chunk: it sees the state.
    writes: the token belongs to its chunk's last document: it enters the update.
    keeps: the entering and the last document are the same: the chunk keeps the state, else drops it.
    tail_reads: `reads` of the tokens after the last full chunk.
  """

  reads: Bool[Array, "B N C"]
  writes: Bool[Array, "B N C"]
  keeps: Bool[Array, "B N"]
  tail_reads: Bool[Array, "B R"]


def check_segment_ids(
  segment_ids: Array, shape: tuple[int, ...], *, name: str = "segment_ids"
) -> None:
  """Raises UserError unless `segment_ids` are integers of `shape`, one per token."""
  if segment_ids.shape != shape:
    raise UserError(
      f"{name} has shape {segment_ids.shape}, expected {shape}: one document number per token"
    )
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise UserError(
      f"{name} has dtype {segment_ids.dtype}: document numbers are integers, 0 for padding"
    )


def _starts(segment_ids: Int[Array, "*B T"], before: Int[Array, "*B"]) -> Bool[Array, "*B T"]:
  """Marks the tokens whose id differs from the id of the token before."""
  shifted = jnp.concatenate([before[..., None], segment_ids[..., :-1]], axis=-1)
  return segment_ids != shifted


def _last_before(segment_ids: Int[Array, "B T"], context_axis: str | None) -> Int[Array, "B"]:
  """Returns the id of the token before the shard; on the first shard, the id of its first token."""
  if context_axis is None:
    return segment_ids[:, 0]
  received = from_previous_shard(segment_ids[:, -1], context_axis)
  return jnp.where(lax.axis_index(context_axis) == 0, segment_ids[:, 0], received)


def number_documents(
  segment_ids: Int[Array, "B T"], *, context_axis: str | None = None
) -> Int[Array, "B T"]:
  """Numbers the documents of a row 1, 2, 3, ..., so that equal numbers mean the same document.

  Padding stays 0. With `context_axis`, inside `jax.shard_map`, numbers continue over the shards, at the
  cost of one neighbour exchange and one all-gather of an integer per row.
  """
  starts = _starts(segment_ids, _last_before(segment_ids, context_axis)).astype(jnp.int32)
  numbers = 1 + jnp.cumsum(starts, axis=-1)
  if context_axis is not None:
    counts = lax.all_gather(jnp.sum(starts, axis=-1), context_axis)  # [P, B]
    before = jnp.arange(shard_count(context_axis)) < lax.axis_index(context_axis)
    numbers += jnp.sum(jnp.where(before[:, None], counts, 0), axis=0)[:, None]
  return jnp.where(segment_ids == 0, 0, numbers)


def same_document(segment_ids: Int[Array, "*B T"], offset: int) -> Bool[Array, "*B T"]:
  """Says for every token t whether token t + offset exists in the same document; False for padding."""
  starts = _starts(segment_ids, segment_ids[..., 0]).astype(jnp.int32)
  document = jnp.where(segment_ids == 0, -1, jnp.cumsum(starts, axis=-1))
  return (document >= 0) & (document == shift(document, offset, axis=-1, fill=-1))


def shift(x: Shaped[Array, "*S"], offset: int, *, axis: int, fill: int) -> Shaped[Array, "*S"]:
  """Returns `x[t + offset]` at index t of `axis`, and `fill` where x has no such index."""
  axis %= x.ndim
  size = x.shape[axis]
  offset = max(-size, min(size, offset))
  kept = lax.slice_in_dim(x, max(0, offset), size + min(0, offset), axis=axis)
  padding = [(0, 0)] * x.ndim
  padding[axis] = (max(0, -offset), max(0, offset))
  return jnp.pad(kept, padding, constant_values=fill)


def document_masks(
  segment_ids: Int[Array, "B T"], chunk_size: int, context_axis: str | None
) -> ChunkMasks:
  """Computes the masks of packed rows; a chunk's masks depend on its tokens and the token before it."""
  b, t = segment_ids.shape
  n = t // chunk_size
  full = segment_ids[:, : n * chunk_size].reshape(b, n, chunk_size)
  tail = segment_ids[:, n * chunk_size :]
  entering = _last_before(segment_ids, context_axis)  # the document of the state
  last = jnp.concatenate([entering[:, None], full[:, :, -1]], axis=1)  # [B, N + 1]

  def true_so_far(same):
    return jnp.cumprod(same.astype(jnp.int32), axis=-1) == 1

  reads = true_so_far(full == last[:, :-1, None]) & (full != 0)
  writes = jnp.flip(true_so_far(jnp.flip(full == full[:, :, -1:], -1)), -1) & (full != 0)
  return ChunkMasks(
    reads=reads,
    writes=writes,
    keeps=jnp.all(reads, axis=-1),
    tail_reads=true_so_far(tail == last[:, -1:]) & (tail != 0),
  )


def length_masks(
  lengths: Int[Array, "B"], tokens: int, chunk_size: int, context_axis: str | None
) -> tuple[ChunkMasks, Bool[Array, "B N"]]:
  """Computes the masks of right-padded rows, each with `lengths` real tokens: padding does not read.

  A chunk writes if all of its tokens are real. Lengths end no document, so every chunk keeps the state.

  Returns:
    masks: the masks.
    full: which chunks have real tokens only; the others leave the state as it is, without decay.
  """
  first = 0 if context_axis is None else tokens * lax.axis_index(context_axis)
  real = first + jnp.arange(tokens, dtype=lengths.dtype)[None] < lengths[:, None]
  n = tokens // chunk_size
  full = real[:, : n * chunk_size].reshape(lengths.shape[0], n, chunk_size)
  all_real = full[:, :, -1]
  masks = ChunkMasks(
    reads=full,
    writes=jnp.broadcast_to(all_real[..., None], full.shape),
    keeps=jnp.ones_like(all_real),
    tail_reads=real[:, n * chunk_size :],
  )
  return masks, all_real
