"""What every implementation of the fast weight is given: the full chunks of one device.

    R_i     = Z_i S_i
    S_{i+1} = f_i S_i + r_i U_i        U_i = lr Z_i^T V_i,  r_i = min(1, tau / |U_i|_F)

with f_i = 0 where a document ends, else the decay. Which tokens write is decided before: V is 0 for
those that do not.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ttt_jax.ops.collectives import Exchange


class Chunks(NamedTuple):
  """N > 0 full chunks, all arrays varying over the same mesh axes.

  Attributes:
    z: activations. v: targets, of z's dtype. lr: the inner rate.
    s_in: the state before the whole sequence, in the state's dtype; None is 0.
    keep: 0 where a document ends, else 1, times a constant decay; None is 1 throughout.
    decay: a traced decay, to be differentiated; None is 1.
  """

  z: Float[Array, "B N C F"]
  v: Float[Array, "B N C D"]
  lr: Float[Array, ""]
  s_in: Float[Array, "B F D"] | None
  keep: Float[Array, "B N"] | None
  decay: Float[Array, ""] | None


class Options(NamedTuple):
  """What is known when the program is traced.

  Attributes:
    state_dtype: of S and of sums of updates.
    clip_norm: tau, or None.
    tensor_axis: the mesh axis that F is split over; a norm is then summed over it.
    exchange: how shards exchange their updates; None when the sequence lies on one device.
  """

  state_dtype: jnp.dtype
  clip_norm: float | None
  tensor_axis: str | None
  exchange: Exchange | None


def factors_of(chunks: Chunks, options: Options) -> Float[Array, "B N"] | None:
  """f_i, what chunk i leaves of the state; None when that is all of it, always."""
  if chunks.decay is None:
    return chunks.keep
  decay = chunks.decay.astype(options.state_dtype)
  return jnp.broadcast_to(decay, chunks.z.shape[:2]) if chunks.keep is None else chunks.keep * decay
