"""`implementation="dual"`: scores every chunk against all earlier ones instead of carrying a state.

    R_i = sum_{j<i} w_ij (Z_i Z_j^T) r_j lr V_j        w_ij = f_{j+1} ... f_{i-1}

This is linear attention in its quadratic form: cheaper while few earlier tokens are visible.

The products also include tokens of other documents and later tokens, whose weight of 0 would not keep a
NaN out. So products take the finite part of their operands, and NaN is added to the outputs of the tokens
that, by w, saw a NaN or an infinity.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import incoming_state
from ttt_jax.ops.fast_weight.chunks import Chunks, UpdateSettings, keep_factors, where_kept
from ttt_jax.ops.linear import finite_cotangent
from ttt_jax.ops.numerics import accumulation_dtype, finite, matmul, poison, where
from ttt_jax.ops.update import (
  Update,
  clip_factor,
  prefix_keeps,
  prefix_weights,
  scale,
  sum_over,
  times,
)

# Chunks are taken in this many groups, and a group is scored against the chunks before its end: a fraction
# (1 + 1/groups) / 2 of all products. More groups compute fewer masked products but make the program longer.
_GROUPS = 8


def dual(
  chunks: Chunks, settings: UpdateSettings, exchange: Exchange | None
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"]]:
  """Returns R and the state after this device's last chunk.

  Scores are computed for one chunk of queries at a time, `[B, C, T]`, and again in the backward pass.
  """
  z, s_in, factors = chunks.z, chunks.s_in, keep_factors(chunks, settings)
  b, n = z.shape[:2]
  state_dtype = settings.state_dtype
  keeps_all = factors is None  # every chunk keeps the whole state
  factors = jnp.ones((n, b), state_dtype) if keeps_all else factors.T
  rates = _rates(chunks, settings)
  fast = _read(chunks, _scaled(chunks.v, rates), prefix_weights(factors), is_mask=keeps_all)

  # The weights of every chunk's update in the outgoing state.
  kept = prefix_keeps(factors, reverse=True).T
  writes = None if chunks.writes is None else where_kept(chunks.writes, kept)
  updates = _scaled(where(writes, chunks.v), jnp.where(kept == 0, 0, rates * kept))
  total = Update(
    keep=jnp.prod(factors, axis=0),
    delta=matmul("bncf,bncd->bfd", where(writes, z), updates).astype(state_dtype),
  )
  if exchange is not None:
    s_in = jnp.zeros_like(total.delta) if s_in is None else s_in
    # The missing term, what earlier shards wrote: see `sequential._sequential_fwd`.
    s_in = incoming_state(total._replace(keep=None) if keeps_all else total, s_in, exchange)
  if s_in is None:
    return fast, total.delta
  # The weights of the incoming state in the state that every chunk reads.
  incoming_kept = prefix_keeps(factors).T
  seen = None if chunks.reads is None else where_kept(chunks.reads, incoming_kept)
  incoming = matmul("bncf,bfd->bncd", where(seen, z), s_in.astype(z.dtype))
  fast += scale(incoming_kept.astype(fast.dtype), where(seen, incoming))
  return fast, scale(total.keep, s_in) + total.delta


def _read(chunks, updates, weights, *, is_mask):
  """Returns the part of R that this device's own chunks wrote; `is_mask`: all weights are 0 or 1."""
  z, n = chunks.z, chunks.z.shape[1]
  keys, queries = where(chunks.writes, z), where(chunks.reads, z)
  bad_keys = jnp.any(~_is_finite(keys) | ~_is_finite(updates), axis=-1)  # [B, N]
  bad = jnp.any((weights != 0) & bad_keys.T[None], axis=1).T[..., None] | ~_is_finite(queries)
  keys, queries, updates = finite(keys), finite(queries), finite(updates)
  groups = [
    _read_group(queries, keys, updates, weights, begin, end, is_mask)
    for begin, end in _groups(n, min(n, _GROUPS))
  ]
  fast = finite_cotangent(jnp.concatenate(groups, axis=1), queries.astype(groups[0].dtype))
  return where(chunks.reads, fast + poison(bad, fast.dtype)[..., None])


def _is_finite(x):
  return jnp.all(jnp.isfinite(x), axis=-1)


def _rates(chunks: Chunks, settings: UpdateSettings) -> Float[Array, "B N"]:
  """Returns `lr r_j`; the clip takes `|Z^T V|_F^2 = <Z Z^T, V V^T>`, without computing the update."""
  lr = chunks.lr.astype(settings.state_dtype)
  if settings.clip_norm is None:
    return jnp.broadcast_to(lr, chunks.z.shape[:2])
  z = where(chunks.writes, chunks.z)
  z_gram = matmul("bncf,bnsf->bncs", z, z)
  v_gram = matmul("bncd,bnsd->bncs", chunks.v, chunks.v)
  square = sum_over(jnp.sum(z_gram * v_gram, axis=(-2, -1)), settings.tensor_axis)
  square = jnp.maximum(
    square.astype(settings.state_dtype), 0
  )  # a sum of both signs may round below
  return lr * clip_factor(lr**2 * square, settings.clip_norm).r


def _scaled(v: Float[Array, "B N C D"], rates: Float[Array, "B N"]) -> Float[Array, "B N C D"]:
  """Returns `rates * v`, rounded once to v's dtype."""
  wide = accumulation_dtype(v.dtype)
  return times(rates.astype(wide), v.astype(wide)).astype(v.dtype)


def _groups(n: int, groups: int) -> list[tuple[int, int]]:
  """Splits n chunks into groups of about equal size, as (begin, end)."""
  edges = [n * g // groups for g in range(groups + 1)]
  return list(itertools.pairwise(edges))


def _read_group(queries, keys, updates, weights, begin, end, is_mask):
  """Returns R of chunks `begin` to `end`, scored against the chunks before `end - 1`."""
  b, _, c, _ = keys.shape
  d = updates.shape[-1]
  wide = accumulation_dtype(keys.dtype)
  if end == 1:
    return jnp.zeros((b, 1, c, d), wide)  # no chunk lies before the first
  keys, values = keys[:, : end - 1], updates[:, : end - 1]

  @jax.checkpoint
  def read(inputs):
    z_i, weights_i = inputs  # [B, C, F], [N, B]
    scores = matmul("bcf,bnsf->bcns", z_i, keys)
    weights_i = weights_i.T[:, None, :, None].astype(wide)
    scores = jnp.where(weights_i == 0, 0, scores)  # not a product: a score may overflow
    if not is_mask:
      scores = scores * weights_i
    return matmul("bcns,bnsd->bcd", scores.astype(keys.dtype), values)

  inputs = (jnp.moveaxis(queries[:, begin:end], 1, 0), weights[begin:end, : end - 1])
  return jnp.moveaxis(lax.map(read, inputs), 0, 1)
