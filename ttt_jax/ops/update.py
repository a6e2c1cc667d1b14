"""Defines the associative operator of In-Place Test-Time Training: a state's updates, composed.

`exchange/collectives.py` composes updates of several devices with the same operator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


class Update(NamedTuple):
  """Holds the affine map `S -> keep * S + delta` on a fast-weight state S.

  `keep [*B]` is 1 for the paper's plain sum, the decay `a` when the state decays, 0 for a reset;
  `delta [*B, *S]` is the chunk's update. The dimensions of `keep` are the leading ones of `delta`.
  The identity is `Update(1, 0)`.
  """

  keep: Float[Array, "*B"]
  delta: Float[Array, "..."]


def times(factor: Float[Array, "*B"], x: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns `factor * x`, one factor per leading index of x."""
  return jnp.reshape(factor, factor.shape + (1,) * (x.ndim - factor.ndim)) * x


def scale(keep: Float[Array, "*B"], delta: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns `keep * delta`; a keep of 0 drops delta, also where delta is NaN or infinite.

  A keep that is 0 gets no gradient: it is a reset at the start of a document.
  """
  dropped = jnp.reshape(keep == 0, keep.shape + (1,) * (delta.ndim - keep.ndim))
  return jnp.where(dropped, jnp.zeros_like(delta), times(keep, delta))


@jax.custom_jvp
def _scale_any(keep, delta):
  """Returns `scale(keep, delta)`, but a keep that happens to be 0 has a gradient."""
  return scale(keep, delta)


def _scale_any_jvp(primals, tangents):
  (keep, delta), (keep_tangent, delta_tangent) = primals, tangents
  kept = _scale_any(keep, delta)
  tangent = jnp.zeros_like(kept)
  if not isinstance(delta_tangent, SymbolicZero):
    tangent += scale(keep, delta_tangent)
  if not isinstance(keep_tangent, SymbolicZero):
    tangent += times(keep_tangent, delta)
  return kept, tangent


_scale_any.defjvp(_scale_any_jvp, symbolic_zeros=True)


def combine(earlier: Update, later: Update) -> Update:
  """Returns the update that has the effect of `earlier` followed by `later`.

      (k1, D1) then (k2, D2)  =  (k1 k2,  k2 D1 + D2)

  A keep k2 of 0 drops D1, also where D1 is NaN or infinite. Associative, with identity `Update(1, 0)`;
  not commutative unless both keeps are 1. `jax.lax.associative_scan` takes it as it is; with
  `reverse=True`, whose first argument is the later one, swap the arguments.
  """
  return Update(
    keep=earlier.keep * later.keep,
    delta=_scale_any(later.keep, earlier.delta) + later.delta,
  )


def apply_update(update: Update, state: Float[Array, "..."]) -> Float[Array, "..."]:
  """Returns `keep * state + delta`, the state after `update`."""
  return scale(update.keep, state) + update.delta


def prefix_keeps(keeps: Float[Array, "N B"], reverse: bool = False) -> Float[Array, "N B"]:
  """Returns the product of the keeps strictly before (with `reverse`, after) each place."""
  if reverse:
    return jnp.flip(prefix_keeps(jnp.flip(keeps, 0)), 0)
  return jnp.concatenate([jnp.ones_like(keeps[:1]), jnp.cumprod(keeps, axis=0)[:-1]])


def prefix_weights(keeps: Float[Array, "N B"], reverse: bool = False) -> Float[Array, "N N B"]:
  """Returns `w[p, q]`, the weight of delta q in the state at p: the product of the keeps in between.

  Exclusive: `w[p, q] = 0` unless q lies strictly before p (with `reverse`, after p).
  """
  if reverse:
    return jnp.flip(prefix_weights(jnp.flip(keeps, 0)), (0, 1))
  place = jnp.arange(keeps.shape[0])
  later = (place[:, None] > place[None, :])[:, :, None]  # [p, q]: p lies after q
  factors = jnp.where(later, keeps[:, None, :], 1)
  # Exclusive over p: the product stops before p's own keep.
  inclusive = jnp.cumprod(factors, axis=0)
  exclusive = jnp.concatenate([jnp.ones_like(inclusive[:1]), inclusive[:-1]])
  return jnp.where(later, exclusive, 0)


class Clip(NamedTuple):
  """Holds the clip factor `r = min(1, tau / |U|_F)` of a chunk's update U, and `norm = |U|_F`."""

  r: Float[Array, "*B"]
  norm: Float[Array, "*B"]


def clip_factor(square: Float[Array, "*B"], clip_norm: float) -> Clip:
  """Computes r and |U| from `|U|_F^2`; the gradient of r is 0 where the clip is inactive."""
  # sqrt has no gradient at 0, where the clip is inactive anyway.
  norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return Clip(
    jnp.where(norm > clip_norm, clip_norm / jnp.where(norm > clip_norm, norm, 1), 1), norm
  )


def sum_over(x: Float[Array, "*B"], tensor_axis: str | None) -> Float[Array, "*B"]:
  """Returns `psum(x)` over `tensor_axis`, where every device holds a slice of F; x where it is None."""
  return x if tensor_axis is None else lax.psum(x, tensor_axis)


def clip_update(
  u: Float[Array, "*B F D"], clip_norm: float | None, tensor_axis: str | None
) -> Float[Array, "*B F D"]:
  """Returns U, rescaled to the Frobenius norm `clip_norm` where its norm is larger; differentiable."""
  if clip_norm is None:
    return u
  square = sum_over(jnp.sum(u * u, axis=(-2, -1)), tensor_axis)
  return times(clip_factor(square, clip_norm).r, u)
