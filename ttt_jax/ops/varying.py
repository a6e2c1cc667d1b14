"""The mesh axes over which an array varies, which `jax.shard_map` tracks with `check_vma=True`."""

import jax
from jax import lax
from jaxtyping import Array, Shaped


def varying_axes(*arrays: Array) -> frozenset[str]:
  """The mesh axes over which any of `arrays` differs between devices (under `check_vma=True`)."""
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_over(x: Shaped[Array, "*S"], axes: frozenset[str]) -> Shaped[Array, "*S"]:
  """`x`, typed as varying over all of `axes`; its transpose sums over the ones that were added."""
  missing = tuple(sorted(axes - varying_axes(x)))
  return lax.pcast(x, missing, to="varying") if missing else x


def is_checked(axis_name: str) -> bool:
  """Whether the enclosing `jax.shard_map` tracks varying axes (`check_vma=True`)."""
  return bool(varying_axes(lax.axis_index(axis_name)))
