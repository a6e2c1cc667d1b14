"""The rules for the width of sums and the products of the fast weight."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
  """`promote_types(dtype, float32)` for a floating dtype, also under strict promotion."""
  return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul(subscripts: str, x: Float[Array, "*X"], y: Float[Array, "*Y"]) -> Float[Array, "*Z"]:
  """A product of operands of one dtype, accumulated and returned in at least float32."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))
