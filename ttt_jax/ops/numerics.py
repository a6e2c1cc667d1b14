"""Chooses the dtype of sums, multiplies with that dtype, and masks so that NaN and infinities stop too.

A mask is a select, not a factor of 0: `0 * nan` is NaN, so that a factor would let a NaN of one document
reach the others. A select before a product keeps masked values out of its sums; a select after the product
keeps them out of its gradient.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
  """Returns `promote_types(dtype, float32)` of a floating dtype, also under strict promotion."""
  return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul(subscripts: str, x: Float[Array, "*X"], y: Float[Array, "*Y"]) -> Float[Array, "*Z"]:
  """Returns the einsum of two operands of one dtype, accumulated and returned in float32 or wider."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))


def where(mask: Bool[Array, "*B"] | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns x, but 0 where the mask of its leading dimensions is False; a mask of None is all True."""
  if mask is None:
    return x
  return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.zeros_like(x))


def finite(x: Float[Array, "*X"]) -> Float[Array, "*X"]:
  """Returns x, but 0 where x is NaN or infinite."""
  return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def poison(mask: Bool[Array, "*X"], dtype: DTypeLike) -> Float[Array, "*X"]:
  """Returns NaN where the mask is True, else 0: a term to add."""
  return jnp.where(mask, jnp.asarray(jnp.nan, dtype), jnp.asarray(0, dtype))
