"""Helps code inside `jax.shard_map`: axis sizes, neighbours, varying axes.

A shard is what one device of a mesh axis holds. Varying axes are the mesh axes over which an array differs
between devices; `jax.shard_map` tracks them with `check_vma=True`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from ttt_jax.errors import UserError


def shard_count(axis: str, *, field: str = "context_axis") -> int:
  """Returns the size of a manual mesh axis.

  Raises:
    UserError: no enclosing `jax.shard_map` is manual over `axis`; `field` names the argument it came from.
  """
  try:
    return lax.axis_size(axis)
  except NameError as error:
    raise UserError(
      f"{field}={axis!r} is not a mesh axis of an enclosing jax.shard_map: call this inside "
      f"jax.shard_map over that axis, or pass {field}=None where nothing is split over devices"
    ) from error


def from_previous_shard(x: Shaped[Array, "*S"], axis: str) -> Shaped[Array, "*S"]:
  """Returns the `x` of the shard before this one; zeros on the first shard."""
  size = shard_count(axis)
  return lax.ppermute(x, axis, [(p, p + 1) for p in range(size - 1)])


def from_last_shard(x: Shaped[Array, "*S"], axis: str) -> Shaped[Array, "*S"]:
  """Returns the last shard's `x`, on every shard."""
  is_last = lax.axis_index(axis) == shard_count(axis) - 1
  return lax.psum(jnp.where(is_last, x, jnp.zeros_like(x)), axis)


def entry_of_this_shard(x: Shaped[Array, "P *S"], axis: str) -> Shaped[Array, "*S"]:
  """Returns this shard's entry of an array that has one entry per shard."""
  return lax.dynamic_index_in_dim(x, lax.axis_index(axis), keepdims=False)


def varying_axes(*arrays: Array) -> frozenset[str]:
  """Returns the mesh axes over which any of `arrays` varies (none without `check_vma=True`)."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_over(x: Shaped[Array, "*S"], axes: frozenset[str]) -> Shaped[Array, "*S"]:
  """Returns `x` typed as varying over `axes` too; its transpose sums over the axes that were added."""
  missing = tuple(sorted(axes - varying_axes(x)))
  return lax.pcast(x, missing, to="varying") if missing else x


def varying_zeros(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> Array:
  """Returns zeros that vary over the same mesh axes as `like`, as the carry of a loop must."""
  return vary_over(jnp.zeros(shape, dtype), varying_axes(like))


def is_checked(axis: str) -> bool:
  """Says whether the enclosing `jax.shard_map` tracks varying axes (`check_vma=True`)."""
  return bool(varying_axes(lax.axis_index(axis)))
