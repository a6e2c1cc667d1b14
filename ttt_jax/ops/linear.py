"""Linear maps that say themselves how they are transposed, and so work in forward and in reverse mode.

`jax.custom_vjp` has no forward mode, and `jax.custom_derivatives.linear_call` no `vmap`: these are
primitives.
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
  """A primitive that computes `apply`; the rules are those of JAX's own primitives."""
  primitive = jax.extend.core.Primitive(name)
  primitive.def_impl(apply)
  primitive.def_abstract_eval(abstract)
  mlir.register_lowering(primitive, mlir.lower_fun(apply, multiple_results=False))
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  batching.primitive_batchers[primitive] = batch
  return primitive


def _identity(name: str, apply: Callable, transpose: Callable) -> jax.extend.core.Primitive:
  """A primitive of one operand that `apply` returns as it is, with another transpose."""

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


def _refuse(x, *, what: str):
  raise UnsupportedError(
    f"forward-mode differentiation (jax.jvp, jax.linearize, jax.jacfwd) of {what}"
  )


# It is met by tangents only. Reverse mode transposes it and never computes it, forward mode does.
_reverse_only = _identity("ttt_reverse_only", _refuse, lambda cotangent: cotangent)


def reverse_only(tree: Any, what: str) -> Any:
  """The arrays of `tree`, with an error that names `what` if forward mode comes this way."""

  @jax.custom_jvp
  def guard(x):
    return x

  guard.defjvp(lambda primals, tangents: (primals[0], _reverse_only.bind(tangents[0], what=what)))
  return jax.tree.map(lambda x: guard(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


_finite_cotangent = _identity("ttt_finite_cotangent", lambda x: x, finite)


def finite_cotangent(x: Float[Array, "*B M"], own: Float[Array, "*B K"]) -> Float[Array, "*B M"]:
  """x, whose cotangent is 0 where it would be NaN or infinite: behind a product that other rows share.

  So that it is not lost, it makes the gradient of `own` NaN, which holds finite numbers of the same rows.
  """
  return _finite_cotangent.bind(x) + 0 * own[..., :1]


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
  counts = jnp.any(cotangent != 0, axis=-1)
  transpose = jax.linear_transpose(lambda w: matmul(_PRODUCT, where(counts, z), w), w.aval)
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
  """`z w` in float32 or wider; a token whose cotangent is 0 adds nothing to w's, whatever z holds there.

  Else a padding token that is NaN, and enters no loss, would make the gradient of a weight NaN.
  """
  return _product.bind(z, w)
