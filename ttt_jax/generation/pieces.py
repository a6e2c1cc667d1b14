"""In what pieces rows are read, so that memory is bounded and programs are compiled for few sizes."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from ttt_jax.parallel.mesh import context_size

_PIECE = 2048  # tokens of a row read at once, at least one chunk on every shard
_SHORTEST_PIECE = 16
_SMALLEST_CAPACITY = 256


def room_for(tokens: int) -> int:
  """Slots for so many tokens, at most a quarter more: programs are compiled for few sizes."""
  step = max(_SMALLEST_CAPACITY, 1 << max(0, tokens.bit_length() - 3))
  return -(-tokens // step) * step


def piece_length(left: list[int], begun: Int[np.ndarray, "B"], chunk_size: int) -> int:
  """How many tokens to read next: a whole segment, or one of few sizes that holds all that is left.

  Args:
    left: tokens of each row.
    begun: tokens of each row's unfinished chunk.
  """
  shards = context_size()
  unit = chunk_size * shards
  segment = -(-_PIECE // unit) * unit
  if max(n + b for n, b in zip(left, begun)) >= segment:
    return segment
  short = max(_SHORTEST_PIECE, 1 << (max(left) - 1).bit_length())
  return min(segment, short if shards == 1 else -(-short // unit) * unit)


def row_shards(mesh: Mesh | None) -> int:
  """How many parts rows are split into."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
