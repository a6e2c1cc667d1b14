"""Holds the arguments of every implementation of the fast weight: a device's full chunks, and the rule.

    R_i     = Z_i S_i
    S_{i+1} = f_i S_i + r_i U_i        U_i = lr Z_i^T V_i,  r_i = min(1, tau / |U_i|_F)

with f_i = 0 where a new document starts, else the decay. A token that does not write has V = 0 and counts
as Z = 0 in the update; a token that does not read has R = 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class Sizes(NamedTuple):
  """Holds the sizes of one call: leading dimensions, their product B, tokens T of a shard, C, F, D."""

  lead: tuple[int, ...]
  b: int
  t: int
  c: int
  f: int
  d: int

  @property
  def n(self) -> int:
    """Returns N, the number of full chunks."""
    return self.t // self.c

  @property
  def tail(self) -> int:
    """Returns the number of tokens after the last full chunk."""
    return self.t % self.c


class Chunks(NamedTuple):
  """Holds N > 0 full chunks, all arrays varying over the same mesh axes.

  Attributes:
    z: activations. v: targets, in z's dtype. lr: the inner rate.
    s_in: the state before the whole sequence, in the state's dtype; None is 0.
    keep: 0 where a new document starts, else 1, times a constant decay; None is 1 throughout.
    decay: a traced decay, to be differentiated; None is 1.
    reads, writes: the tokens that see the state, and the tokens that enter the update; None is all.
  """

  z: Float[Array, "B N C F"]
  v: Float[Array, "B N C D"]
  lr: Float[Array, ""]
  s_in: Float[Array, "B F D"] | None
  keep: Float[Array, "B N"] | None
  decay: Float[Array, ""] | None
  reads: Bool[Array, "B N C"] | None
  writes: Bool[Array, "B N C"] | None


class UpdateSettings(NamedTuple):
  """Holds the static settings that say how the update of a chunk is computed.

  Attributes:
    state_dtype: dtype of S and of sums of updates.
    clip_norm: tau, or None for no clip.
    tensor_axis: the mesh axis over which F is split, and a norm summed; None if F is whole.
  """

  state_dtype: jnp.dtype
  clip_norm: float | None
  tensor_axis: str | None


def keep_factors(chunks: Chunks, settings: UpdateSettings) -> Float[Array, "B N"] | None:
  """Returns f_i, the factor by which chunk i keeps the state; None where every chunk keeps all of it."""
  return factors_of(chunks.keep, chunks.decay, chunks.z.shape[:2], settings.state_dtype)


def factors_of(
  keep: Float[Array, "B N"] | None,
  decay: Float[Array, ""] | None,
  shape: tuple[int, int],
  dtype: jnp.dtype,
) -> Float[Array, "B N"] | None:
  """Returns `keep * decay` per chunk, where a keep of 0 stays 0; None where both are 1."""
  if decay is None:
    return keep
  decay = jnp.broadcast_to(decay.astype(dtype), shape)
  return decay if keep is None else jnp.where(keep == 0, 0, keep * decay)


def take_chunk(x, i):
  """Returns chunk i of `[B, N, ...]`, or None for None."""
  return None if x is None else lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def set_chunk(x, chunk, i):
  """Returns `[B, N, ...]` with another chunk i."""
  return lax.dynamic_update_index_in_dim(x, chunk.astype(x.dtype), i, axis=1)


def no_cotangent(mask):
  """Returns the cotangent of a mask, which has no derivative; None for None."""
  return None if mask is None else jnp.zeros(mask.shape, jax.dtypes.float0)


def where_kept(
  mask: Bool[Array, "B N C"], factors: Float[Array, "B N"] | None
) -> Bool[Array, "B N C"]:
  """Returns the mask without the tokens of chunks whose factor is 0."""
  return mask if factors is None else mask & (factors != 0)[..., None]
