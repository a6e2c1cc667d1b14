"""The associative operator of In-Place Test-Time Training: what an update is, and how two compose.

Nothing here communicates; `context.py` combines updates across devices with the same operator.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Update(NamedTuple):
  """The affine map `S -> keep * S + delta` on a fast-weight state S.

  `keep [*B]` is 1 for the paper's plain sum, the decay `a` when the state decays, 0 for a reset;
  `delta [*B, *S]` is the chunk's update. The dimensions of `keep` are the leading ones of `delta`.
  The identity is `Update(1, 0)`.
  """

  keep: Float[Array, "*B"]
  delta: Float[Array, "..."]


def scale(keep: Float[Array, "*B"], delta: Float[Array, "..."]) -> Float[Array, "..."]:
  """`keep * delta`, one factor per leading index of `delta`."""
  return jnp.reshape(keep, keep.shape + (1,) * (delta.ndim - keep.ndim)) * delta


def combine(earlier: Update, later: Update) -> Update:
  """The one update that does what `earlier` and then `later` do.

      (k1, D1) then (k2, D2)  =  (k1 k2,  k2 D1 + D2)

  Associative, with identity `Update(1, 0)`; not commutative unless both keeps are 1. Feed it to
  `jax.lax.associative_scan`, whose second argument is the later one (its first one with
  `reverse=True`: there, swap the arguments).
  """
  return Update(
    keep=earlier.keep * later.keep,
    delta=scale(later.keep, earlier.delta) + later.delta,
  )


def apply_update(update: Update, state: Float[Array, "..."]) -> Float[Array, "..."]:
  """`keep * state + delta`: the state after `update`."""
  return scale(update.keep, state) + update.delta
