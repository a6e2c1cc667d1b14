"""The rules for the width of sums, the products of the fast weight, and what a mask hides.

What is dropped is dropped by a select, not by a factor of 0: `0 * nan` is NaN, so that a NaN or an
infinity in one document would reach the others. A select on what enters a product keeps it out of the
sums, and one on what leaves it keeps it out of the gradient.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
  """`promote_types(dtype, float32)` for a floating dtype, also under strict promotion."""
  return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul(subscripts: str, x: Float[Array, "*X"], y: Float[Array, "*Y"]) -> Float[Array, "*Z"]:
  """A product of operands of one dtype, accumulated and returned in at least float32."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))


def where(mask: Bool[Array, "*B"] | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x, and 0 where the mask of its leading dimensions is off, whatever x holds there; None is no mask."""
  if mask is None:
    return x
  return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.zeros_like(x))


def finite(x: Float[Array, "*X"]) -> Float[Array, "*X"]:
  """x, and 0 where it is NaN or infinite."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def poison(mask: Bool[Array, "*X"], dtype: DTypeLike) -> Float[Array, "*X"]:
  """To be added: NaN where the mask is on, else 0."""
  return jnp.where(mask, jnp.asarray(jnp.nan, dtype), jnp.asarray(0, dtype))
