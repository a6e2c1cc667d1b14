"""Caches what every layer has read, and reads new tokens with these caches.

Rows of a batch begin and end their chunks at different tokens: each row keeps the tokens of its unfinished
chunk, and learns them when the chunk is full.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.nn.fast_mlp import PARAM_DIMS, TttMlp
from ttt_jax.nn.layers import project
from ttt_jax.nn.transformer import Block, split_tokens
from ttt_jax.ops.attention.cached import KeyValueCache
from ttt_jax.ops.fast_weight.api import FastWeightState, inplace_ttt
from ttt_jax.ops.fast_weight.least_squares.api import before_unit_rows, gated
from ttt_jax.ops.fast_weight.least_squares.sums import Factored, factor, read, unit_rows
from ttt_jax.ops.numerics import accumulation_dtype, matmul
from ttt_jax.parallel.mesh import Axes, constrain, context_size, over_shards


class SolvedSums(NamedTuple):
  """Holds the state of least squares with the factor of its system, which every token's read needs.

  Attributes:
    a, d: the sums, see `ttt_jax.ops.fast_weight.least_squares.sums`.
    cholesky, rho: of `A + rho I`, after the last full chunk; rho is 0 where A is.
  """

  a: Float[Array, "B F F"]
  d: Float[Array, "B F D"]
  cholesky: Float[Array, "B F F"]
  rho: Float[Array, "B"]


class FastCache(NamedTuple):
  """A TTT layer keeps for every row its state, and the unfinished chunk that it has not learned yet.

  Attributes:
    s: the state after the last full chunk.
    z, source: activations and target sources of the tokens after that chunk; other entries are arbitrary.
  """

  s: Float[Array, "B F D"] | SolvedSums
  z: Float[Array, "B C F"]
  source: Float[Array, "B C D"]


# Logical dimensions of a `FastCache`, of the sum, and of the state of least squares.
FAST_CACHE = FastCache(
  s=("batch", "mlp", None), z=("batch", None, "mlp"), source=("batch", None, None)
)


SOLVED_SUMS = SolvedSums(
  a=("batch", "mlp", None), d=("batch", "mlp", None), cholesky=("batch", None, None), rho=("batch",)
)


class LayerCache(NamedTuple):
  """A layer keeps this of the tokens it has read.

  Attributes:
    attention: the KV cache, or the cache of another mixer.
    fast: the cache of its fast weight; None where no fast weight learns.
  """

  attention: KeyValueCache | Any
  fast: FastCache | None


def read_block(
  block: Block, x, embeddings, rotary, cache: LayerCache, lengths, counts, *, aligned: bool
) -> tuple[Float[Array, "B T D"], LayerCache]:
  """Returns a block's output for new tokens after the cached ones, and the cache with the new tokens."""
  with jax.named_scope("attention"):
    y, attention = block.attention.read(
      block.attention_norm(x), rotary, cache.attention, lengths, counts
    )
    x = x + y
  with jax.named_scope("mlp"):
    h = block.mlp_norm(x)
    if cache.fast is None:
      y, fast = block.mlp(h), None
    elif x.shape[1] == 1:
      source = block.source(embeddings, h)
      y, fast = read_token(block.mlp, h, source, cache.fast, lengths, counts)
    else:
      source = block.source(embeddings, h)
      y, fast = read_tokens(block.mlp, h, source, cache.fast, lengths, counts, aligned=aligned)
  return constrain(x + y, "batch", split_tokens(x), None), LayerCache(attention, fast)


def empty_fast_cache(mlp: TttMlp, rows: int, dtype: DTypeLike) -> FastCache:
  """Returns the cache of rows that have read nothing."""
  (f, d), r = mlp.down.shape, mlp.key_rank
  c = mlp.ttt.chunk_size
  zeros = partial(jnp.zeros, dtype=mlp.state_dtype)
  if mlp.ttt.rule == "sum":
    s = zeros((rows, f, d))
  else:
    s = SolvedSums(zeros((rows, r, r)), zeros((rows, r, d)), zeros((rows, r, r)), zeros((rows,)))
  return FastCache(
    s=s,
    z=jnp.zeros((rows, c, f), dtype),
    source=jnp.zeros((rows, c, d), dtype),
  )


def read_token(
  mlp: TttMlp,
  h: Float[Array, "B 1 D"],
  source: Float[Array, "B 1 D"],
  cache: FastCache,
  lengths: Int[Array, "B"],
  counts: Int[Array, "B"],
) -> tuple[Float[Array, "B 1 D"], FastCache]:
  """Returns the output of one token per row; a token of count 1 joins its row's unfinished chunk.

  If the chunk is then full, `learn_pending` has to learn it before the row's next token.
  """
  z = mlp.hidden(h)
  c = cache.z.shape[1]
  rows = jnp.arange(z.shape[0], dtype=jnp.int32)
  slot = jnp.where(counts > 0, lengths % c, c)  # out of bounds: dropped

  def write_token(old, x):
    return old.at[rows, slot].set(x[:, 0].astype(old.dtype), mode="drop", unique_indices=True)

  slow = project("btf,fd->btd", z, mlp.down, accumulation_dtype(h.dtype))
  fast = _read_state(mlp, z, cache.s).astype(slow.dtype)
  cache = cache._replace(z=write_token(cache.z, z), source=write_token(cache.source, source))
  return (slow + fast).astype(h.dtype), cache


def _read_state(mlp: TttMlp, z: Float[Array, "B 1 F"], s) -> Float[Array, "B 1 D"]:
  """Returns what the tokens' fast weights add to `Z W`."""
  if not isinstance(s, SolvedSums):
    return matmul("btf,bfd->btd", z, s.astype(z.dtype))
  factored = Factored(s.cholesky, s.rho, is_learned=s.rho != 0)
  settings = mlp.least_squares(s.d.dtype)
  keys = unit_rows(before_unit_rows(z, settings.projection), s.d.dtype)
  found = read(keys, s.d, factored)
  return gated(found.r, found.leverage, keys, settings)


def _to_state(s) -> FastWeightState:
  return FastWeightState(A=s.a, D=s.d) if isinstance(s, SolvedSums) else FastWeightState(s)


def _from_state(mlp: TttMlp, state: FastWeightState):
  """Returns the cached form of a state, with the factor of its system."""
  if state.S is not None:
    return state.S
  factored = factor(state.A, jnp.asarray(mlp.ttt.ridge, state.A.dtype))
  return SolvedSums(state.A, state.D, factored.cholesky, factored.rho)


def learn_pending(mlp: TttMlp, cache: FastCache, row: Int[Array, ""]) -> FastCache:
  """Learns one row's full chunk and returns the cache with its new state."""
  of_row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)
  params = mlp.params(cache.z.dtype)
  _, state = inplace_ttt(
    of_row.z,
    mlp.targets(of_row.source, params),
    params.w_down,
    state=_to_state(of_row.s),
    **mlp.options(params),
  )
  s = jax.tree.map(
    lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, 0),
    cache.s,
    _from_state(mlp, state),
  )
  return cache._replace(s=s)


def read_tokens(
  mlp: TttMlp,
  h: Float[Array, "B T D"],
  source: Float[Array, "B T D"],
  cache: FastCache,
  lengths: Int[Array, "B"],
  counts: Int[Array, "B"],
  *,
  aligned: bool,
) -> tuple[Float[Array, "B T D"], FastCache]:
  """Returns the output of T right-padded new tokens, and the cache after learning their full chunks.

  Args:
    counts: the number of real tokens per row.
    aligned: no row with new tokens has an unfinished chunk. Otherwise the new tokens are appended to that
      chunk, which takes room for one more chunk.
  """
  z, c = mlp.hidden(h), mlp.ttt.chunk_size
  pending = jnp.zeros_like(lengths) if aligned else lengths % c
  if not aligned:
    z, source = (
      join_chunk(old, x, pending, room=c * context_size())
      for old, x in ((cache.z, z), (cache.source, source))
    )
  tokens = ("batch", "sequence", None)
  state = _to_state(cache.s)
  state_dims = jax.tree.map(lambda _: FAST_CACHE.s, state)
  y, state, z, source = over_shards(
    partial(_read_on_shard, mlp),
    z,
    source,
    mlp.params(h.dtype),
    state,
    pending + counts,
    dims=(("batch", "sequence", "mlp"), tokens, PARAM_DIMS, state_dims, ("batch",)),
    out_dims=(tokens, state_dims, FAST_CACHE.z, FAST_CACHE.source),
  )
  if not aligned:
    index = pending[:, None] + jnp.arange(h.shape[1], dtype=jnp.int32)[None]
    y = jnp.take_along_axis(y, index[..., None], axis=1)
  has_tokens = (counts > 0)[:, None, None]  # other rows keep their unfinished chunk
  z, source = (
    jnp.where(has_tokens, new.astype(old.dtype), old)
    for old, new in ((cache.z, z), (cache.source, source))
  )
  return y, FastCache(_from_state(mlp, state), z, source)


def _read_on_shard(mlp: TttMlp, z, source, params, state, lengths, *, axes: Axes):
  """Returns this shard's outputs, the state, and z and the source of each row's unfinished chunk."""
  y, state = inplace_ttt(
    z,
    mlp.targets(source, params),
    params.w_down,
    state=state,
    lengths=lengths,
    context_axis=axes.context,
    tensor_axis=axes.tensor,
    **mlp.options(params),
  )
  c = mlp.ttt.chunk_size
  start = lengths // c * c
  pending = (chunk_at(x, start, c, axes.context) for x in (z, source))
  return y, state, *pending


def join_chunk(
  old: Float[Array, "B C N"], new: Float[Array, "B T N"], pending: Int[Array, "B"], *, room: int
) -> Float[Array, "B L N"]:
  """Joins the first `pending` tokens of `old` and all of `new`, padded to T + room tokens by any values."""
  both = jnp.concatenate([old.astype(new.dtype), new], axis=1)
  position = jnp.arange(new.shape[1] + room, dtype=jnp.int32)[None]
  from_new = old.shape[1] + position - pending[:, None]
  index = jnp.where(position < pending[:, None], position, jnp.minimum(from_new, both.shape[1] - 1))
  return jnp.take_along_axis(both, index[..., None], axis=1)


def chunk_at(x, start, size, context_axis):
  """Returns tokens `start` to `start + size - 1` of each row on every shard, zeros past the row's end."""
  index = start[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  if context_axis is not None:
    index -= x.shape[1] * jax.lax.axis_index(context_axis)
  inside = (index >= 0) & (index < x.shape[1])
  taken = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[..., None], axis=1)
  taken = jnp.where(inside[..., None], taken, jnp.zeros_like(taken))
  return taken if context_axis is None else jax.lax.psum(taken, context_axis)
