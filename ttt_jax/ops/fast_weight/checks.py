"""Checks of the arguments of `inplace_ttt`: a message names the argument, its value and the remedy."""

import jax
import jax.numpy as jnp

from ttt_jax.errors import UserError
from ttt_jax.ops.documents import check_segment_ids
from ttt_jax.ops.manual import shard_count, varying_axes


def _is_traced(x) -> bool:
  return isinstance(x, jax.core.Tracer)


def check_arguments(
  z, v, w_down, chunk_size, inner_lr, segment_ids, decay, clip_norm, context_axis
) -> None:
  """Raises UserError unless shapes, dtypes and values agree and shards hold whole chunks."""
  for name, x in (("z", z), ("v", v), ("w_down", w_down)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise UserError(f"{name} has dtype {x.dtype}, expected a floating-point one")
  if z.ndim < 2:
    raise UserError(f"z has shape {z.shape}, expected [..., T, F]")
  if v.shape[:-1] != z.shape[:-1]:
    raise UserError(f"v has shape {v.shape}, expected [..., T, D] with z's leading {z.shape[:-1]}")
  if w_down.shape != (z.shape[-1], v.shape[-1]):
    raise UserError(
      f"w_down has shape {w_down.shape}, expected [F, D] = {(z.shape[-1], v.shape[-1])} "
      "(the transpose of a PyTorch weight)"
    )
  if chunk_size < 1:
    raise UserError(f"chunk_size={chunk_size} must be at least 1 token")
  for name, x in (("inner_lr", inner_lr), ("decay", decay)):
    if x is not None and jnp.ndim(x) != 0:
      raise UserError(f"{name} has shape {jnp.shape(x)}, expected a number or a 0-d array")
  if decay is not None and not _is_traced(decay) and not 0 < float(decay) <= 1:
    raise UserError(f"decay={decay} must be in (0, 1]: the state's factor per chunk")
  if clip_norm is not None:
    if isinstance(clip_norm, jax.Array):
      raise UserError(f"clip_norm={clip_norm} is an array: it has no gradient, pass a Python float")
    if clip_norm <= 0:
      raise UserError(f"clip_norm={clip_norm} must be positive; None for no clip")
  if segment_ids is not None:
    check_segment_ids(segment_ids, z.shape[:-1])
  t = z.shape[-2]
  if context_axis is not None:
    shards = shard_count(context_axis)
    if t % chunk_size:
      raise UserError(
        f"chunk_size={chunk_size} does not divide the {t} tokens of a shard ({shards} shards over "
        f"{context_axis!r}, {t * shards} tokens): shards hold whole chunks"
      )


def check_lengths(lengths, lead) -> None:
  """Raises UserError unless `lengths` are None or one integer per row, of shape `lead`."""
  if lengths is None:
    return
  if lengths.shape != lead or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise UserError(
      f"lengths has shape {lengths.shape} and dtype {lengths.dtype}, expected integers {lead}: one a row"
    )


def check_state(state, shape, dtype, context_axis) -> None:
  """Raises UserError unless `state` is None or a state of this shape and dtype at a chunk boundary."""
  if state is None:
    return
  if state.S.shape != shape:
    raise UserError(f"state.S has shape {state.S.shape}, expected [..., F, D] = {shape}")
  if state.S.dtype != dtype:
    raise UserError(f"state.S has dtype {state.S.dtype}, expected state_dtype={dtype}")
  if state.pending:
    raise UserError(
      f"state comes from the middle of a chunk: {state.pending} tokens after its last full chunk were "
      "read but not learned. Read on from that chunk's end: feed these tokens again, with "
      "dataclasses.replace(state, pending=0)"
    )
  if context_axis is not None and context_axis in varying_axes(state.S):
    raise UserError(
      f"state.S varies over context_axis={context_axis!r}: every shard must be given the one state "
      "that comes before the whole sequence"
    )
