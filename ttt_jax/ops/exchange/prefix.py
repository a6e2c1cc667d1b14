"""Exchanges updates between the shards of a sequence inside `jax.shard_map`, with derivatives.

A sequence is cut into contiguous shards, one per device of a mesh axis. A shard composes its own chunks
into one `Update`; it lacks the composition of all shards before it, the exclusive prefix, which the
algorithms in `collectives.py` compute.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad
from jaxtyping import Array, Float

from ttt_jax.errors import UserError
from ttt_jax.names import COLLECTIVES
from ttt_jax.ops.exchange import cost
from ttt_jax.ops.exchange.collectives import Exchange, exchange_deltas, gather_keeps
from ttt_jax.ops.hardware import find_device
from ttt_jax.ops.linear import define
from ttt_jax.ops.manual import (
  entry_of_this_shard,
  is_checked,
  shard_count,
  vary_over,
  varying_axes,
)
from ttt_jax.ops.numerics import where
from ttt_jax.ops.update import Update, apply_update, prefix_keeps, times

# The name under which `jax.checkpoint` policies can save the state that came from other shards, so that
# remat recomputes the chunks without a second exchange.
INCOMING_STATE = "ttt_incoming_state"


def choose_exchange(
  axis_name: str,
  shape: tuple[int, int, int],
  dtype: Any,
  *,
  collective: str | None,
  wire_dtype: Any = None,
) -> Exchange:
  """Chooses how deltas `[B, F, D]` of `dtype` travel along `axis_name`; see `exclusive_prefix`."""
  if collective is not None and collective not in COLLECTIVES:
    raise UserError(f"collective={collective!r} is not one of {', '.join(COLLECTIVES)}")
  if wire_dtype is not None:
    wire_dtype = jnp.dtype(wire_dtype)
    if not jnp.issubdtype(wire_dtype, jnp.floating):
      raise UserError(f"wire_dtype={wire_dtype} is not a floating-point dtype")
    if wire_dtype.itemsize >= jnp.dtype(dtype).itemsize:
      wire_dtype = None  # nothing is saved by rounding up
  size = shard_count(axis_name)
  b, f, d = shape
  state_bytes = b * f * d * (wire_dtype or jnp.dtype(dtype)).itemsize
  device = find_device()
  if collective is None:
    collective = cost.choose_collective(size, state_bytes, device, rows=f)
  slices = cost.ring_slices(size, state_bytes, device, rows=f) if collective == "ring" else 1
  return Exchange(axis_name, collective, slices, wire_dtype)


def _prefix_jvp(primals, tangents, *, exchange, reverse, zero_is_reset):
  """Sends the tangent as a delta.

  With E_{p+1} = k_p E_p + D_p (the prefix of shard p is E_p): dE_{p+1} = k_p dE_p + (dD_p + dk_p E_p).
  """
  (keeps, delta), (keeps_tangent, delta_tangent) = primals, tangents
  bind = partial(
    _prefix.bind, keeps, exchange=exchange, reverse=reverse, zero_is_reset=zero_is_reset
  )
  prefix = bind(delta)
  if not isinstance(keeps_tangent, ad.Zero):
    part = times(entry_of_this_shard(keeps_tangent, exchange.axis), prefix)
    if zero_is_reset:  # no derivative there, and the state before the reset may be NaN
      part = where(entry_of_this_shard(keeps, exchange.axis) != 0, part)
    delta_tangent = part if isinstance(delta_tangent, ad.Zero) else delta_tangent + part
  return prefix, delta_tangent if isinstance(delta_tangent, ad.Zero) else bind(delta_tangent)


def _prefix_transpose(cotangent, keeps, delta, *, exchange, reverse, zero_is_reset):
  """Exchanges the cotangents in the other direction.

  The adjoint X_p of E_{p+1} obeys X_{p-1} = k_p X_p + dE_p: an exclusive suffix of the pairs (k_p, dE_p).
  """
  if isinstance(cotangent, ad.Zero):
    return [None, ad.Zero(delta.aval)]
  return [
    None,
    _prefix.bind(
      keeps, cotangent, exchange=exchange, reverse=not reverse, zero_is_reset=zero_is_reset
    ),
  ]


def _prefix_batch(operands, dims, **settings):
  """Treats the mapped axis as more rows."""
  size = next(x.shape[dim] for x, dim in zip(operands, dims) if dim is not None)
  keeps, delta = (
    jnp.repeat(jnp.expand_dims(x, to), size, axis=to) if dim is None else jnp.moveaxis(x, dim, to)
    for x, dim, to in zip(operands, dims, (1, 0))
  )
  prefix = _prefix.bind(
    keeps.reshape(keeps.shape[0], -1), delta.reshape(-1, *delta.shape[2:]), **settings
  )
  return prefix.reshape(delta.shape), 0


_prefix = define(
  "ttt_exclusive_prefix",
  lambda keeps, delta, *, exchange, reverse, zero_is_reset: exchange_deltas(
    keeps, delta, exchange=exchange, reverse=reverse
  ),
  abstract=lambda keeps, delta, **_: delta,
  jvp=_prefix_jvp,
  transpose=_prefix_transpose,
  batch=_prefix_batch,
)


def exchange_updates(
  update: Update, exchange: Exchange, *, reverse: bool, zero_is_reset: bool = True
) -> Update:
  """Returns the exclusive prefix (suffix with `reverse`) over `exchange.axis` of `[B]` and `[B, F, D]`.

  Differentiable in both modes; the backward pass is the exchange in the other direction.

  Args:
    update: keep and delta vary over the same mesh axes; a keep of None is 1 on every shard.
    exchange: how deltas travel.
    reverse: compose the shards after this one instead of those before it.
    zero_is_reset: a keep of 0 starts a new document: it has no derivative, and drops NaN and infinities.
  """
  keeps = gather_keeps(update.keep, update.delta, exchange.axis)
  if update.keep is None:  # constants, which vary as the deltas do
    keeps = vary_over(keeps, varying_axes(update.delta))
  delta = _prefix.bind(
    keeps, update.delta, exchange=exchange, reverse=reverse, zero_is_reset=zero_is_reset
  )
  return Update(keep=entry_of_this_shard(prefix_keeps(keeps, reverse), exchange.axis), delta=delta)


def incoming_state(
  total: Update, s_in: Float[Array, "B F D"], exchange: Exchange
) -> Float[Array, "B F D"]:
  """Returns the state this shard starts from: `s_in` after the updates of the shards before.

  Args:
    total: this shard's update; keep and delta vary over the same mesh axes, a keep of None is 1.
    s_in: the state before the whole sequence.
    exchange: how deltas travel.
  """
  prefix = exchange_updates(total, exchange, reverse=False)
  s = s_in + prefix.delta if total.keep is None else apply_update(prefix, s_in)
  return checkpoint_name(s, INCOMING_STATE)


def exclusive_prefix(
  update: Update,
  axis_name: str,
  *,
  collective: str | None = None,
  reverse: bool = False,
  wire_dtype: Any = None,
) -> Update:
  """Returns the composition of the updates of all shards before this one, in the order of the mesh axis.

      prefix_p = update_0 then update_1 then ... then update_{p-1}        prefix_0 = identity

  Exclusive: a shard's own update is not part of its prefix. `reverse=True` composes the shards after this
  one, last shard first: the same operator from the right, as the backward pass needs it.
  Call it inside `jax.shard_map` over `axis_name`. Differentiable, in forward and in reverse mode; the
  backward pass is the exchange in the other direction. A keep of 0 drops the updates before it, also NaN
  and infinities.

  Args:
    update: keep `[*B]` and delta `[*B, *S]`; S bytes of delta, summed in delta's dtype.
    axis_name: a mesh axis of an enclosing `jax.shard_map` with P devices.
    collective: bytes sent per device: `"all_gather"` (P-1) S, `"doubling"` S ceil(log2 P),
      `"all_to_all"` 2 S (P-1)/P, `"ring"` S, in slices from neighbour to neighbour. None chooses by
      `cost.choose_collective`.
    wire_dtype: a narrower dtype for sending, such as `jnp.bfloat16`, forward and backward. One
      rounding with all_gather, two with all_to_all, one per step with doubling and ring.

  Raises:
    UserError: `axis_name` is not bound, `collective` is unknown, keep and delta disagree, wire_dtype
      is not floating.
  """
  size = shard_count(axis_name)
  keep, delta = jnp.asarray(update.keep), jnp.asarray(update.delta)
  if delta.shape[: keep.ndim] != keep.shape:
    raise UserError(
      f"update.keep has shape {keep.shape}, which is not the start of update.delta's {delta.shape}"
    )
  lead, rest = keep.shape, delta.shape[keep.ndim :]
  rows = rest[0] if rest else 1
  flat = (keep.size, rows, delta.size // max(1, keep.size * rows))
  chosen = choose_exchange(
    axis_name, flat, delta.dtype, collective=collective, wire_dtype=wire_dtype
  )
  axes = varying_axes(keep, delta) | {axis_name} if is_checked(axis_name) else frozenset()
  keep, delta = vary_over(keep.astype(delta.dtype), axes), vary_over(delta, axes)
  if size == 1:
    return Update(keep=jnp.ones_like(keep), delta=jnp.zeros_like(delta))
  prefix = exchange_updates(
    Update(keep.reshape(-1), delta.reshape(flat)), chosen, reverse=reverse, zero_is_reset=False
  )
  return Update(keep=prefix.keep.reshape(lead), delta=prefix.delta.reshape(delta.shape))
