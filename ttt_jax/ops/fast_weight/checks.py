"""Checks of the arguments of `inplace_ttt`: a message names the argument, its value and the remedy."""

import jax
import jax.numpy as jnp

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.names import RULES
from ttt_jax.ops.documents import check_segment_ids
from ttt_jax.ops.manual import shard_count, varying_axes

RIDGE = 0.01  # the default of the least-squares rule


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


def check_rule(rule, inner_lr, clip_norm, merge, ridge, read_scale) -> None:
  """Raises UserError unless the arguments are those of the rule, and in range."""
  if rule not in RULES:
    raise UserError(f"rule={rule!r} is not one of {', '.join(map(repr, RULES))}")
  if rule == "sum":
    if inner_lr is None:
      raise UserError("inner_lr is missing: rule='sum' needs the step of its update")
    for name, value, default in (
      ("ridge", ridge, RIDGE),
      ("read_scale", read_scale, 1.0),
    ):
      if isinstance(value, jax.Array) or value != default:
        raise UserError(f"{name}={value} belongs to rule='least_squares', and rule is 'sum'")
    return
  if clip_norm is not None:
    raise UserError(
      f"clip_norm={clip_norm} bounds the update of rule='sum'; with rule='least_squares' a larger ridge "
      "makes the read smaller: leave clip_norm out"
    )
  if merge:
    raise UnsupportedError("merge=True: rule='least_squares' has no W + S to read, leave merge out")
  _check_scalars({"ridge": ridge, "read_scale": read_scale})
  if not _is_traced(ridge) and not float(ridge) > 0:
    raise UserError(
      f"ridge={ridge} must be positive: without it a regression on few tokens has no solution"
    )


def _check_scalars(values) -> None:
  for name, value in values.items():
    if jnp.ndim(value) != 0:
      raise UserError(f"{name} has shape {jnp.shape(value)}, expected a number or a 0-d array")


def check_keys(rule, read_gate, key_projection, f, tensor_shards) -> int:
  """Returns how wide keys are over all devices, each of which has f of F.

  Raises:
    UserError: the projection or the gate does not fit, or belongs to another rule.
  """
  if rule == "sum":
    for name, value in (("read_gate", read_gate), ("key_projection", key_projection)):
      if value is not None:
        raise UserError(f"{name} belongs to rule='least_squares', and rule is 'sum': leave it out")
    return f * tensor_shards
  rank = f * tensor_shards
  if key_projection is not None:
    shape = jnp.shape(key_projection)
    if len(shape) != 2 or shape[0] != f or not shape[1]:
      raise UserError(f"key_projection has shape {shape}, expected [F, R] = [{f}, R]")
    rank = shape[1]
    if rank % tensor_shards:
      raise UserError(
        f"key_projection gives keys of R={rank} dimensions, which the {tensor_shards} devices of "
        "tensor_axis do not divide: choose a multiple"
      )
  if read_gate is not None:
    if not isinstance(read_gate, tuple) or len(read_gate) not in (2, 3):
      raise UserError(
        f"read_gate={read_gate!r} is not (threshold, sharpness), (threshold, sharpness, direction) or None"
      )
    _check_scalars({"read_gate[0]": read_gate[0], "read_gate[1]": read_gate[1]})
    if len(read_gate) == 3 and jnp.shape(read_gate[2]) != (rank,):
      raise UserError(
        f"read_gate[2] has shape {jnp.shape(read_gate[2])}, expected a direction of the keys, [{rank}]"
      )
  return rank


def check_lengths(lengths, lead) -> None:
  """Raises UserError unless `lengths` are None or one integer per row, of shape `lead`."""
  if lengths is None:
    return
  if lengths.shape != lead or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise UserError(
      f"lengths has shape {lengths.shape} and dtype {lengths.dtype}, expected integers {lead}: one a row"
    )


def check_state(state, rule, shape, whole_f, dtype, context_axis) -> None:
  """Raises UserError unless `state` is None or a state of this rule, shape, dtype, at a chunk boundary.

  Args:
    shape: `[*B, F, D]`, with this device's part of F (of R where keys are projected).
    whole_f: all of it.
  """
  if state is None:
    return
  shapes = {"S": shape} if rule == "sum" else {"A": (*shape[:-1], whole_f), "D": shape}
  has = {name for name in ("S", "A", "D") if getattr(state, name) is not None}
  if has != set(shapes):
    other = "sum" if rule == "least_squares" else "least_squares"
    raise UserError(
      f"state has {', '.join(sorted(has)) or 'nothing'}, and rule={rule!r} reads on from "
      f"{', '.join(shapes)}: pass the state of the same rule"
      + (f", or rule={other!r}" if has else "")
    )
  for name, expected in shapes.items():
    x = getattr(state, name)
    if x.shape != expected:
      dims = "F, F" if name == "A" else "F, D"
      raise UserError(f"state.{name} has shape {x.shape}, expected [..., {dims}] = {expected}")
    if x.dtype != dtype:
      raise UserError(f"state.{name} has dtype {x.dtype}, expected state_dtype={dtype}")
    if context_axis is not None and context_axis in varying_axes(x):
      raise UserError(
        f"state.{name} varies over context_axis={context_axis!r}: every shard must be given the one state "
        "that comes before the whole sequence"
      )
  if state.pending:
    raise UserError(
      f"state comes from the middle of a chunk: {state.pending} tokens after its last full chunk were "
      "read but not learned. Read on from that chunk's end: feed these tokens again, with "
      "dataclasses.replace(state, pending=0)"
    )
