"""Chooses the sizes of the pieces that rows are read in, to bound memory and the number of compilations."""

import numpy as np
from jaxtyping import Int

from ttt_jax.parallel.mesh import context_size

_PIECE = 2048  # tokens of a row per piece; rounded up to whole chunks on every shard
_SHORTEST_PIECE = 16
_SMALLEST_CAPACITY = 256


def room_for(tokens: int) -> int:
  """Returns a cache capacity for `tokens`, at most a quarter more; few sizes mean few compilations."""
  step = max(_SMALLEST_CAPACITY, 1 << max(0, tokens.bit_length() - 3))
  return -(-tokens // step) * step


def piece_length(remaining: list[int], begun: Int[np.ndarray, "B"], chunk_size: int) -> int:
  """Returns how many tokens to read next: a whole piece, or a shorter one that holds all remaining tokens.

  Args:
    remaining: unread tokens of each row.
    begun: tokens of each row's unfinished chunk.
    chunk_size: tokens of a chunk.
  """
  shards = context_size()
  unit = chunk_size * shards
  whole = -(-_PIECE // unit) * unit
  if max(n + b for n, b in zip(remaining, begun)) >= whole:
    return whole
  short = max(_SHORTEST_PIECE, 1 << (max(remaining) - 1).bit_length())
  return min(whole, short if shards == 1 else -(-short // unit) * unit)
