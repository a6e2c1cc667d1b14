"""The unfinished chunk of each row: rows of a batch begin and end their chunks at places of their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class FastCache(NamedTuple):
  """What a TTT layer keeps of every row it reads: what it learned, and the chunk not yet learned.

  Attributes:
    s: the state after the last full chunk.
    z, source: activations and target sources of the tokens behind it; the rest is of no meaning.
  """

  s: Float[Array, "B F D"]
  z: Float[Array, "B C F"]
  source: Float[Array, "B C D"]


def join_chunk(
  old: Float[Array, "B C N"], new: Float[Array, "B T N"], pending: Int[Array, "B"], *, room: int
) -> Float[Array, "B L N"]:
  """The first `pending` tokens of `old`, then all of `new`, then anything: T + room tokens."""
  both = jnp.concatenate([old.astype(new.dtype), new], axis=1)
  place = jnp.arange(new.shape[1] + room, dtype=jnp.int32)[None]
  behind = old.shape[1] + place - pending[:, None]
  index = jnp.where(place < pending[:, None], place, jnp.minimum(behind, both.shape[1] - 1))
  return jnp.take_along_axis(both, index[..., None], axis=1)


def chunk_at(x, start, size, context_axis):
  """The tokens `start` to `start + size - 1` of each row, zeros behind the row's end; on every shard."""
  index = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  if context_axis is not None:
    index -= x.shape[1] * jax.lax.axis_index(context_axis)
  inside = (index >= 0) & (index < x.shape[1])
  taken = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[..., None], axis=1)
  taken = jnp.where(inside[..., None], taken, jnp.zeros_like(taken))
  return taken if context_axis is None else jax.lax.psum(taken, context_axis)
