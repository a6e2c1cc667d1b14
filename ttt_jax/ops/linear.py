"""Makes linear maps with a transpose of their own, differentiable in forward and in reverse mode.

They are JAX primitives because `jax.custom_vjp` has no forward mode and
`jax.custom_derivatives.linear_call` no `vmap`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from ttt_jax.errors import UnsupportedError
from ttt_jax.ops.numerics import accumulation_dtype, finite, matmul, where


def define(
  name: str,
  apply: Callable,
  *,
  abstract: Callable,
  jvp: Callable,
  transpose: Callable,
  batch: Callable,
) -> jax.extend.core.Primitive:
  """Defines a primitive that computes `apply`; its rules have the signatures of JAX's own primitives."""
  primitive = jax.extend.core.Primitive(name)
  primitive.def_impl(apply)
  primitive.def_abstract_eval(abstract)
  mlir.register_lowering(primitive, mlir.lower_fun(apply, multiple_results=False))
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  batching.primitive_batchers[primitive] = batch
  return primitive


def _identity(name: str, apply: Callable, transpose: Callable) -> jax.extend.core.Primitive:
  """Defines a primitive for an identity `apply` of one operand, whose transpose is `transpose`."""

  def jvp(primals, tangents, **params):
    (x,), (tangent,) = primals, tangents
    if not isinstance(tangent, ad.Zero):
      tangent = primitive.bind(tangent, **params)
    return primitive.bind(x, **params), tangent

  def transposed(cotangent, x, **params):
    return [cotangent if isinstance(cotangent, ad.Zero) else transpose(cotangent)]

  def batch(operands, dims, **params):
    return primitive.bind(*operands, **params), dims[0]

  primitive = define(
    name, apply, abstract=lambda x, **_: x, jvp=jvp, transpose=transposed, batch=batch
  )
  return primitive


def _refuse(x, *, function: str):
  raise UnsupportedError(
    f"forward-mode differentiation (jax.jvp, jax.linearize, jax.jacfwd) of {function}"
  )


# Applied to tangents only: reverse mode transposes it without computing it, forward mode computes it.
_reverse_only = _identity("ttt_reverse_only", _refuse, lambda cotangent: cotangent)


def reverse_only(tree: Any, function: str) -> Any:
  """Returns `tree`; forward-mode differentiation through it is an error that names `function`."""

  @jax.custom_jvp
  def guard(x):
    return x

  guard.defjvp(
    lambda primals, tangents: (primals[0], _reverse_only.bind(tangents[0], function=function))
  )
  return jax.tree.map(lambda x: guard(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


_finite_cotangent = _identity("ttt_finite_cotangent", lambda x: x, finite)


def finite_cotangent(
  x: Float[Array, "*B M"], same_rows: Float[Array, "*B K"]
) -> Float[Array, "*B M"]:
  """Returns x, and sets its cotangent to 0 where it is NaN or infinite.

  For the output of a product that sums over rows: the gradients of the other rows stay finite. Those of
  the row itself must not, so the gradient of `same_rows`, finite numbers of the same rows, becomes NaN.
  """
  return _finite_cotangent.bind(x) + 0 * same_rows[..., :1]


_PRODUCT = "btf,fd->btd"


def _product_jvp(primals, tangents):
  (z, w), (dz, dw) = primals, tangents
  terms = [] if isinstance(dz, ad.Zero) else [matmul(_PRODUCT, dz, w)]
  terms += [] if isinstance(dw, ad.Zero) else [_product.bind(z, dw)]
  y = _product.bind(z, w)
  return y, sum(terms[1:], *terms[:1]) if terms else ad.Zero.from_primal_value(y)


def _product_transpose(cotangent, z, w):
  if isinstance(cotangent, ad.Zero):
    return [None, ad.Zero(w.aval)]
  has_cotangent = jnp.any(cotangent != 0, axis=-1)
  transpose = jax.linear_transpose(lambda w: matmul(_PRODUCT, where(has_cotangent, z), w), w.aval)
  return [None, *transpose(cotangent)]


def _product_batch(operands, dims):
  z, w = operands
  if dims[1] is not None:  # a weight for each row
    return jax.vmap(lambda z, w: matmul(_PRODUCT, z, w), dims)(z, w), 0
  z = jnp.moveaxis(z, dims[0], 0)
  y = _product.bind(z.reshape(-1, *z.shape[2:]), w)
  return y.reshape(*z.shape[:2], *y.shape[1:]), 0


_product = define(
  "ttt_product",
  lambda z, w: matmul(_PRODUCT, z, w),
  abstract=lambda z, w: z.update(
    shape=(*z.shape[:-1], w.shape[-1]), dtype=accumulation_dtype(z.dtype), weak_type=False
  ),
  jvp=_product_jvp,
  transpose=_product_transpose,
  batch=_product_batch,
)


def product(z: Float[Array, "B T F"], w: Float[Array, "F D"]) -> Float[Array, "B T D"]:
  """Returns `z w` in float32 or wider; a token whose cotangent is 0 adds nothing to the gradient of w.

  Otherwise a padding token that is NaN, though it enters no loss, would make that gradient NaN.
  """
  return _product.bind(z, w)
