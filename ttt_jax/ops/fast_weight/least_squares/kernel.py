"""`implementation="dual"` of the least-squares rule: scores tokens with one another, without sums.

With p the earlier tokens that are seen, each by its weight w_p (of decays), and the rows of K_p and V_p
multiplied by sqrt(w_p),

    R = k K_p^T (K_p K_p^T + rho I)^-1 V_p        rho = ridge sum(w_p |k_p|^2) / F

The cheaper way while fewer than F tokens are visible. A state from outside has no tokens to be scored.
"""

import jax
import jax.numpy as jnp

from ttt_jax.errors import UnsupportedError
from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.fast_weight.least_squares.rows import Outputs, Rows, row_factors
from ttt_jax.ops.fast_weight.least_squares.sums import (
  Sums,
  cholesky,
  product,
  ridge_share,
  solve_factored,
  unit_rows,
)
from ttt_jax.ops.numerics import where
from ttt_jax.ops.update import prefix_keeps, prefix_weights, scale


def kernel(rows: Rows, exchange: Exchange | None) -> Outputs:
  """Returns R, the leverage and the sums; a chunk's solve is made again in the backward pass."""
  if rows.s_in is not None or exchange is not None:
    raise UnsupportedError(
      "rule='least_squares' with implementation='dual' scores the tokens of one device and starts without "
      "a state: use implementation='sequential', or None, with a state or a context_axis"
    )
  dtype, (b, n) = rows.v.dtype, rows.z.shape[:2]
  factors = row_factors(rows)
  factors = jnp.ones((b, n), dtype) if factors is None else factors
  keys = unit_rows(where(rows.writes, rows.z), dtype)
  queries = unit_rows(where(rows.reads, rows.z), dtype)
  weights = prefix_weights(factors.T)  # [N, N, B]
  found = [_nothing(rows)] + [
    _read(queries[:, i], keys[:, :i], rows.v[:, :i], weights[i, :i].T, rows.ridge)
    for i in range(1, n)
  ]
  r, leverage = (jnp.stack(x, axis=1) for x in zip(*found))
  left = prefix_keeps(factors.T, reverse=True).T
  kept = scale(left, keys)
  sums = Sums(product("bncf,bncg->bfg", kept, keys), product("bncf,bncd->bfd", kept, rows.v))
  return Outputs(where(rows.reads, r), where(rows.reads, leverage), sums)


def _nothing(rows):
  zero = jnp.zeros_like(rows.v[:, 0])
  return zero, zero[..., 0]


@jax.checkpoint
def _read(queries, keys, v, weights, ridge):
  """Returns one chunk's R `[B, C, D]` and leverage, from the chunks `[B, p, C, ...]` before it."""
  b, p, c, f = keys.shape
  root = jnp.where(weights > 0, jnp.sqrt(jnp.where(weights > 0, weights, 1)), 0)
  keys = scale(root, keys).reshape(b, p * c, f)
  v = scale(root, v).reshape(b, p * c, -1)
  rho = ridge_share(ridge, f) * jnp.sum(keys * keys, axis=(1, 2))
  is_learned = rho != 0
  gram = product("bpf,bqf->bpq", keys, keys)
  identity = jnp.eye(p * c, dtype=keys.dtype)[None]
  m = jnp.where(is_learned[:, None, None], gram + rho[:, None, None] * identity, identity)
  scores = product("bcf,bpf->bcp", queries, keys)
  solved = solve_factored(cholesky(m), scores)
  return product("bcp,bpd->bcd", solved, v), jnp.sum(scores * solved, axis=-1)
