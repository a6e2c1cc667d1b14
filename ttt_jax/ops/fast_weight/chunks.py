"""What every implementation of the fast weight is given: the full chunks of one device.

    R_i     = Z_i S_i
    S_{i+1} = f_i S_i + r_i U_i        U_i = lr Z_i^T V_i,  r_i = min(1, tau / |U_i|_F)

with f_i = 0 where a document ends, else the decay. A token that does not write has V = 0 and counts as
Z = 0 in the update; one that does not read has R = 0.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ttt_jax.ops.exchange.collectives import Exchange


class Chunks(NamedTuple):
  """N > 0 full chunks, all arrays varying over the same mesh axes.

  Attributes:
    z: activations. v: targets, of z's dtype. lr: the inner rate.
    s_in: the state before the whole sequence, in the state's dtype; None is 0.
    keep: 0 where a document ends, else 1, times a constant decay; None is 1 throughout.
    decay: a traced decay, to be differentiated; None is 1.
    reads, writes: the tokens that see the state, and those that enter the update; None is all.
  """

  z: Float[Array, "B N C F"]
  v: Float[Array, "B N C D"]
  lr: Float[Array, ""]
  s_in: Float[Array, "B F D"] | None
  keep: Float[Array, "B N"] | None
  decay: Float[Array, ""] | None
  reads: Bool[Array, "B N C"] | None
  writes: Bool[Array, "B N C"] | None


class Options(NamedTuple):
  """What is known when the program is traced.

  Attributes:
    state_dtype: of S and of sums of updates.
    clip_norm: tau, or None.
    tensor_axis: the mesh axis that F is split over; a norm is then summed over it.
    exchange: how shards exchange their updates; None when the sequence lies on one device.
    samples: the places in a chunk of the tokens whose R is also returned by itself where it is part of
      `Z (W + S)`, for statistics; None for none.
  """

  state_dtype: jnp.dtype
  clip_norm: float | None
  tensor_axis: str | None
  exchange: Exchange | None
  samples: slice | None = None


def factors_of(chunks: Chunks, options: Options) -> Float[Array, "B N"] | None:
  """f_i, what chunk i leaves of the state; None when that is all of it, always."""
  if chunks.decay is None:
    return chunks.keep
  decay = chunks.decay.astype(options.state_dtype)
  decay = jnp.broadcast_to(decay, chunks.z.shape[:2])
  return decay if chunks.keep is None else jnp.where(chunks.keep == 0, 0, chunks.keep * decay)


def tokens_of(mask: Bool[Array, "B N C"], factors: Float[Array, "B N"] | None):
  """The tokens of a mask in those chunks whose factor is not 0."""
  return mask if factors is None else mask & (factors != 0)[..., None]
