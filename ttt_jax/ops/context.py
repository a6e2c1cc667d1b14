"""Exchange of updates between the shards of a sequence, inside `jax.shard_map`.

A sequence is cut into contiguous shards, one per device of a mesh axis. Each device composes its own
chunks to one `Update`; what it is missing is the composition of all shards before it, the exclusive
prefix. Every device contributes P numbers (its keep) and one delta; which deltas reach which shard,
and with what weight, follows from those P numbers alone, so no branch depends on the device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from ttt_jax.ops.update import Update

COLLECTIVES = ("all_gather", "all_to_all")
_PLANNED = ("doubling", "ring")


def check_collective(collective: str | None) -> str:
  """The name of the collective to use; raises for one that is unknown or not there yet."""
  if collective is None:
    return "all_to_all"
  if collective in _PLANNED:
    raise NotImplementedError(
      f"collective={collective!r} is not implemented yet: use one of {', '.join(COLLECTIVES)}"
    )
  if collective not in COLLECTIVES:
    raise ValueError(f"collective={collective!r} is not one of {', '.join(COLLECTIVES + _PLANNED)}")
  return collective


def shard_count(context_axis: str) -> int:
  """The size of a manual mesh axis; raises ValueError outside its `jax.shard_map`."""
  try:
    return lax.axis_size(context_axis)
  except NameError as error:
    raise ValueError(
      f"context_axis={context_axis!r} is not a mesh axis of an enclosing jax.shard_map: call this "
      "inside jax.shard_map over that axis, or pass context_axis=None for a sequence on one device"
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


def _prefix_weights(keeps: Float[Array, "P B"], reverse: bool) -> Float[Array, "P Q B"]:
  """`w[p, q]`: how much of shard q's delta reaches shard p, the product of the keeps in between.

  Exclusive: `w[p, q] = 0` unless q lies strictly before p (after p with `reverse`).
  """
  if reverse:
    return jnp.flip(_prefix_weights(jnp.flip(keeps, 0), False), (0, 1))
  size = keeps.shape[0]
  shard = jnp.arange(size)
  later = (shard[:, None] > shard[None, :])[:, :, None]  # [p, q]: p lies after q
  factors = jnp.where(later, keeps[:, None, :], 1)
  # Exclusive over p: the product stops before shard p's own keep.
  through = jnp.cumprod(factors, axis=0)
  before = jnp.concatenate([jnp.ones_like(through[:1]), through[:-1]])
  return jnp.where(later, before, 0)


def _prefix_keep(keeps: Float[Array, "P B"], reverse: bool) -> Float[Array, "P B"]:
  """The product of the keeps of all shards strictly before (after) each shard."""
  if reverse:
    return jnp.flip(_prefix_keep(jnp.flip(keeps, 0), False), 0)
  return jnp.concatenate([jnp.ones_like(keeps[:1]), jnp.cumprod(keeps, axis=0)[:-1]])


def exchange(update: Update, axis_name: str, collective: str, reverse: bool) -> Update:
  """The forward computation of `exclusive_prefix`; `update.keep` is `[B]`, `update.delta` `[B, F, D]`.

  all_gather: every device receives all P deltas and weighs them: (P-1) S bytes sent per device.
  all_to_all: every device receives one slice (along F) of all P deltas, forms the prefix for all P
  shards, and sends each its slice back: 2 S (P-1)/P bytes sent per device.
  """
  size = shard_count(axis_name)
  keep, delta = update
  index = lax.axis_index(axis_name)
  with jax.named_scope(f"prefix_{collective}"):
    keeps = lax.all_gather(keep, axis_name)
    weights = _prefix_weights(keeps, reverse)
    if collective == "all_gather":
      own_weights = lax.dynamic_index_in_dim(weights, index, keepdims=False)
      prefix = jnp.einsum(
        "qb,qbfd->bfd", own_weights, lax.all_gather(delta, axis_name), precision="highest"
      )
    else:
      b, f, d = delta.shape
      rows = -(-f // size)
      padded = jnp.pad(delta, ((0, 0), (0, rows * size - f), (0, 0)))
      slices = jnp.moveaxis(padded.reshape(b, size, rows, d), 1, 0)
      deltas = lax.all_to_all(slices, axis_name, 0, 0)  # [q: of shard q, B, own rows, D]
      prefixes = jnp.einsum("pqb,qbrd->pbrd", weights, deltas, precision="highest")
      own = lax.all_to_all(prefixes, axis_name, 0, 0)  # [p: rows of slice p, B, rows, D]
      prefix = jnp.moveaxis(own, 0, 1).reshape(b, rows * size, d)[:, :f]
    kept = lax.dynamic_index_in_dim(_prefix_keep(keeps, reverse), index, keepdims=False)
    return Update(keep=kept, delta=prefix)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _exclusive_prefix(update: Update, axis_name: str, collective: str, reverse: bool) -> Update:
  return exchange(update, axis_name, collective, reverse)


def _exclusive_prefix_fwd(update, axis_name, collective, reverse):
  prefix = exchange(update, axis_name, collective, reverse)
  return prefix, (update.keep, prefix)


def _exclusive_prefix_bwd(axis_name, collective, reverse, saved, cotangent):
  """The same exchange in the other direction.

  With E_{p+1} = k_p E_p + D_p (the prefix of shard p is E_p), the adjoint X_p of E_{p+1} obeys
  X_{p-1} = k_p X_p + dE_p: an exclusive suffix of the pairs (k_p, dE_p). Then dD_p = X_p and
  dk_p = <X_p, E_p>. The product of keeps is the same recursion on numbers.
  """
  keep, prefix = saved
  delta = exchange(Update(keep, cotangent.delta), axis_name, collective, not reverse).delta
  kept = exchange(
    Update(keep, cotangent.keep[:, None, None]), axis_name, "all_gather", not reverse
  ).delta[:, 0, 0]
  keep_cotangent = jnp.sum(delta * prefix.delta, (1, 2)) + kept * prefix.keep
  return (Update(keep=keep_cotangent, delta=delta),)


_exclusive_prefix.defvjp(_exclusive_prefix_fwd, _exclusive_prefix_bwd)


def exclusive_prefix(
  update: Update, axis_name: str, *, collective: str | None = None, reverse: bool = False
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
    collective: `"all_gather"` sends (P-1) S bytes per device, `"all_to_all"` 2 S (P-1)/P; None
      chooses.

  Raises:
    ValueError: `axis_name` is not bound, `collective` is unknown, keep and delta disagree.
    NotImplementedError: a `collective` that is planned but not there yet.
  """
  collective = check_collective(collective)
  size = shard_count(axis_name)
  keep, delta = jnp.asarray(update.keep), jnp.asarray(update.delta)
  if delta.shape[: keep.ndim] != keep.shape:
    raise ValueError(
      f"update.keep has shape {keep.shape}, which is not the start of update.delta's {delta.shape}"
    )
  axes = varying_axes(keep, delta) | {axis_name} if is_checked(axis_name) else frozenset()
  keep, delta = vary_over(keep.astype(delta.dtype), axes), vary_over(delta, axes)
  if size == 1:
    return Update(keep=jnp.ones_like(keep), delta=jnp.zeros_like(delta))
  lead, rest = keep.shape, delta.shape[keep.ndim :]
  rows = rest[0] if rest else 1
  flat = Update(keep.reshape(-1), delta.reshape(keep.size, rows, -1))
  prefix = _exclusive_prefix(flat, axis_name, collective, reverse)
  return Update(keep=prefix.keep.reshape(lead), delta=prefix.delta.reshape(delta.shape))


def is_checked(axis_name: str) -> bool:
  """Whether the enclosing `jax.shard_map` tracks varying axes (`check_vma=True`)."""
  return bool(varying_axes(lax.axis_index(axis_name)))
