"""The associative operator of In-Place Test-Time Training: what an update is, and how two compose.

Nothing here exchanges states; `collectives.py` combines updates across devices with the same operator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


class Update(NamedTuple):
  """The affine map `S -> keep * S + delta` on a fast-weight state S.

  `keep [*B]` is 1 for the paper's plain sum, the decay `a` when the state decays, 0 for a reset;
  `delta [*B, *S]` is the chunk's update. The dimensions of `keep` are the leading ones of `delta`.
  The identity is `Update(1, 0)`.
  """

  keep: Float[Array, "*B"]
  delta: Float[Array, "..."]


def times(factor: Float[Array, "*B"], x: Float[Array, "..."]) -> Float[Array, "..."]:
  """`factor * x`, one factor per leading index of x."""
  return jnp.reshape(factor, factor.shape + (1,) * (x.ndim - factor.ndim)) * x


def scale(keep: Float[Array, "*B"], delta: Float[Array, "..."]) -> Float[Array, "..."]:
  """`keep * delta`; a keep of 0 drops delta, also one that is NaN or infinite.

  For keeps that documents and decays make: where they are 0 they have no gradient.
  """
  dropped = jnp.reshape(keep == 0, keep.shape + (1,) * (delta.ndim - keep.ndim))
  return jnp.where(dropped, jnp.zeros_like(delta), times(keep, delta))


@jax.custom_jvp
def _keep(keep, delta):
  """`scale`, for keeps of anybody's: with a gradient in a keep that happens to be 0."""
  return scale(keep, delta)


def _keep_jvp(primals, tangents):
  (keep, delta), (keep_tangent, delta_tangent) = primals, tangents
  kept = _keep(keep, delta)
  tangent = jnp.zeros_like(kept)
  if not isinstance(delta_tangent, SymbolicZero):
    tangent += scale(keep, delta_tangent)
  if not isinstance(keep_tangent, SymbolicZero):
    tangent += times(keep_tangent, delta)
  return kept, tangent


_keep.defjvp(_keep_jvp, symbolic_zeros=True)


def combine(earlier: Update, later: Update) -> Update:
  """The one update that does what `earlier` and then `later` do.

      (k1, D1) then (k2, D2)  =  (k1 k2,  k2 D1 + D2)

  A keep k2 of 0 drops D1, also where that is NaN or infinite. Associative, with identity `Update(1, 0)`;
  not commutative unless both keeps are 1. Feed it to `jax.lax.associative_scan`, whose second argument is
  the later one (its first one with `reverse=True`: there, swap the arguments).
  """
  return Update(
    keep=earlier.keep * later.keep,
    delta=_keep(later.keep, earlier.delta) + later.delta,
  )


def apply_update(update: Update, state: Float[Array, "..."]) -> Float[Array, "..."]:
  """`keep * state + delta`: the state after `update`."""
  return scale(update.keep, state) + update.delta


def prefix_keeps(keeps: Float[Array, "N B"], reverse: bool = False) -> Float[Array, "N B"]:
  """The product of the keeps strictly before (after, with `reverse`) each place."""
  if reverse:
    return jnp.flip(prefix_keeps(jnp.flip(keeps, 0)), 0)
  return jnp.concatenate([jnp.ones_like(keeps[:1]), jnp.cumprod(keeps, axis=0)[:-1]])


def prefix_weights(keeps: Float[Array, "N B"], reverse: bool = False) -> Float[Array, "N N B"]:
  """`w[p, q]`: how much of delta q is in the state at p, the product of the keeps in between.

  Exclusive: `w[p, q] = 0` unless q lies strictly before p (after p with `reverse`).
  """
  if reverse:
    return jnp.flip(prefix_weights(jnp.flip(keeps, 0)), (0, 1))
  place = jnp.arange(keeps.shape[0])
  later = (place[:, None] > place[None, :])[:, :, None]  # [p, q]: p lies after q
  factors = jnp.where(later, keeps[:, None, :], 1)
  # Exclusive over p: the product stops before p's own keep.
  through = jnp.cumprod(factors, axis=0)
  before = jnp.concatenate([jnp.ones_like(through[:1]), through[:-1]])
  return jnp.where(later, before, 0)


class Clip(NamedTuple):
  """`r = min(1, tau / |U|_F)` of a chunk's update U, and what its gradient needs."""

  r: Float[Array, "*B"]
  norm: Float[Array, "*B"]


def clip_factor(square: Float[Array, "*B"], clip_norm: float) -> Clip:
  """r and |U| from `|U|_F^2`; the gradient is 0 where the clip is inactive."""
  # sqrt has no gradient at 0, where the clip is inactive anyway.
  norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return Clip(
    jnp.where(norm > clip_norm, clip_norm / jnp.where(norm > clip_norm, norm, 1), 1), norm
  )


def sum_over(x: Float[Array, "*B"], tensor_axis: str | None) -> Float[Array, "*B"]:
  """The sum of x over the devices that share F, of which each holds a part."""
  return x if tensor_axis is None else lax.psum(x, tensor_axis)


def clip_update(
  u: Float[Array, "*B F D"], clip_norm: float | None, tensor_axis: str | None
) -> Float[Array, "*B F D"]:
  """U, rescaled to the Frobenius norm `clip_norm` where it is larger; differentiable."""
  if clip_norm is None:
    return u
  square = sum_over(jnp.sum(u * u, axis=(-2, -1)), tensor_axis)
  return times(clip_factor(square, clip_norm).r, u)
