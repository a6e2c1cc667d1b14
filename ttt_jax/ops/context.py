"""Inside `jax.shard_map`: what a shard can ask about its mesh axis, and the differentiable exchange.

A sequence is cut into contiguous shards, one per device of a mesh axis. Each device composes its own
chunks to one `Update`; what it is missing is the composition of all shards before it, the exclusive
prefix. `collectives.py` has the ways to get it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from ttt_jax.errors import UserError
from ttt_jax.ops import cost
from ttt_jax.ops.collectives import COLLECTIVES, Exchange, exchange
from ttt_jax.ops.update import Update, apply_update

# The name under which `jax.checkpoint` policies can save the state that came in from other shards,
# so that rematerialisation recomputes the chunks but exchanges nothing again.
INCOMING_STATE = "ttt_incoming_state"


def plan_exchange(
  axis_name: str,
  shape: tuple[int, int, int],
  dtype: Any,
  *,
  collective: str | None,
  wire_dtype: Any = None,
) -> Exchange:
  """Decides how deltas `[B, F, D]` of `dtype` travel along `axis_name`; see `exclusive_prefix`."""
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
  wire_item = (wire_dtype or jnp.dtype(dtype)).itemsize
  work = cost.Work(1, 1, d_ff=f, d_model=d, shards=size, batch=b, wire_item=wire_item)
  device = cost.find_device()
  if collective is None:
    collective = cost.choose_collective(work, device)
  slices = cost.ring_slices(work, device) if collective == "ring" else 1
  return Exchange(axis_name, collective, slices, wire_dtype)


def shard_count(axis: str, *, field: str = "context_axis") -> int:
  """The size of a manual mesh axis; raises ValueError outside its `jax.shard_map`."""
  try:
    return lax.axis_size(axis)
  except NameError as error:
    raise UserError(
      f"{field}={axis!r} is not a mesh axis of an enclosing jax.shard_map: call this inside "
      f"jax.shard_map over that axis, or pass {field}=None where nothing is split over devices"
    ) from error


def varying_axes(*arrays: Array) -> frozenset[str]:
  """The mesh axes over which any of `arrays` differs between devices (under `check_vma=True`)."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_over(x: Shaped[Array, "*S"], axes: frozenset[str]) -> Shaped[Array, "*S"]:
  """`x`, typed as varying over all of `axes`; its transpose sums over the ones that were added."""
  missing = tuple(sorted(axes - varying_axes(x)))
  return lax.pcast(x, missing, to="varying") if missing else x


def from_left(x: Shaped[Array, "*S"], context_axis: str) -> Shaped[Array, "*S"]:
  """The left neighbour's `x`; zeros on the first shard."""
  size = shard_count(context_axis)
  return lax.ppermute(x, context_axis, [(p, p + 1) for p in range(size - 1)])


def last_shard(x: Shaped[Array, "*S"], context_axis: str) -> Shaped[Array, "*S"]:
  """The last shard's `x`, on every shard."""
  is_last = lax.axis_index(context_axis) == shard_count(context_axis) - 1
  return lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), context_axis)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def differentiable_exchange(update: Update, how: Exchange, reverse: bool) -> Update:
  """`exchange`, whose backward pass is the exchange in the other direction."""
  return exchange(update, how, reverse)


def _exchange_fwd(update, how, reverse):
  prefix = exchange(update, how, reverse)
  return prefix, (update.keep, prefix)


def _exchange_bwd(how, reverse, saved, cotangent):
  """The same exchange in the other direction.

  With E_{p+1} = k_p E_p + D_p (the prefix of shard p is E_p), the adjoint X_p of E_{p+1} obeys
  X_{p-1} = k_p X_p + dE_p: an exclusive suffix of the pairs (k_p, dE_p). Then dD_p = X_p and
  dk_p = <X_p, E_p>. The product of keeps is the same recursion on numbers.
  """
  keep, prefix = saved
  if keep is None:
    return (
      Update(keep=None, delta=exchange(Update(None, cotangent.delta), how, not reverse).delta),
    )
  delta = exchange(Update(keep, cotangent.delta), how, not reverse).delta
  numbers = Exchange(how.axis, "all_gather")
  kept = exchange(Update(keep, cotangent.keep[:, None, None]), numbers, not reverse).delta[:, 0, 0]
  keep_cotangent = jnp.sum(delta * prefix.delta, (1, 2)) + kept * prefix.keep
  return (Update(keep=keep_cotangent, delta=delta),)


differentiable_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def incoming_state(
  total: Update, s_in: Float[Array, "B F D"], how: Exchange
) -> Float[Array, "B F D"]:
  """The state this shard starts from: the sequence's own, then the updates of the shards before.

  `total` is this shard's update; its keep may be None for 1, and varies over the same axes as delta.
  """
  prefix = differentiable_exchange(total, how, False)
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
  """The composition of the updates of all shards before this one, in the order of the mesh axis.

      prefix_p = update_0 then update_1 then ... then update_{p-1}        prefix_0 = identity

  Exclusive: a shard's own update is not in it. With `reverse=True` the composition of the shards
  after this one, last one first: the same operator from the right, as the backward pass needs it.
  Call it inside `jax.shard_map` over `axis_name`. Differentiable; the backward pass is the exchange
  in the other direction.

  Args:
    update: keep `[*B]` and delta `[*B, *S]`; S bytes of delta, summed in delta's dtype.
    axis_name: a mesh axis of an enclosing `jax.shard_map` with P devices.
    collective: bytes sent per device: `"all_gather"` (P-1) S, `"doubling"` S ceil(log2 P),
      `"all_to_all"` 2 S (P-1)/P, `"ring"` S, in slices from neighbour to neighbour. None chooses by
      `cost.choose_collective`.
    wire_dtype: a narrower dtype for what is sent, such as `jnp.bfloat16`, forward and backward. One
      rounding with all_gather, two with all_to_all, one per step with doubling and ring.

  Raises:
    ValueError: `axis_name` is not bound, `collective` is unknown, keep and delta disagree, wire_dtype
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
  how = plan_exchange(axis_name, flat, delta.dtype, collective=collective, wire_dtype=wire_dtype)
  axes = varying_axes(keep, delta) | {axis_name} if is_checked(axis_name) else frozenset()
  keep, delta = vary_over(keep.astype(delta.dtype), axes), vary_over(delta, axes)
  if size == 1:
    return Update(keep=jnp.ones_like(keep), delta=jnp.zeros_like(delta))
  prefix = differentiable_exchange(Update(keep.reshape(-1), delta.reshape(flat)), how, reverse)
  return Update(keep=prefix.keep.reshape(lead), delta=prefix.delta.reshape(delta.shape))


def is_checked(axis_name: str) -> bool:
  """Whether the enclosing `jax.shard_map` tracks varying axes (`check_vma=True`)."""
  return bool(varying_axes(lax.axis_index(axis_name)))
