"""`implementation="associative"` of least squares: holds every chunk's sums in memory at once."""

import jax
import jax.numpy as jnp
from jax import lax

from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import incoming_state
from ttt_jax.ops.fast_weight.least_squares.rows import Outputs, Rows, row_factors
from ttt_jax.ops.fast_weight.least_squares.sums import (
  Sums,
  factor,
  no_sums,
  pack,
  product,
  read,
  unit_rows,
  unpack,
)
from ttt_jax.ops.numerics import where
from ttt_jax.ops.update import Update, scale


def associative(rows: Rows, exchange: Exchange | None) -> Outputs:
  """Returns R, the leverage and the sums, by `jax.lax.associative_scan`; has derivatives of every kind."""
  dtype = rows.v.dtype
  factors, known = row_factors(rows), rows.keep is None and rows.decay is None
  keys = unit_rows(where(rows.writes, rows.z), dtype)
  a = product("bncf,bncg->bnfg", keys, keys)
  d = product("bncf,bncd->bnfd", keys, rows.v)
  factors = jnp.ones(rows.z.shape[:2], dtype) if known else factors
  keeps, a, d = lax.associative_scan(_combine, (factors, a, d), axis=1)
  s_in = rows.s_in
  if s_in is None:
    s_in = no_sums(rows.z, rows.z.shape[-1], rows.v.shape[-1], dtype)
  if exchange is not None:
    total = Update(None if known else keeps[:, -1], pack(Sums(a[:, -1], d[:, -1])))
    s_in = unpack(incoming_state(total, pack(s_in), exchange))
  after = jax.tree.map(
    lambda own, before: scale(keeps, jnp.broadcast_to(before[:, None], own.shape)) + own,
    Sums(a, d),
    s_in,
  )
  # Exclusive: chunk i reads the sums of chunks 0 to i-1, the incoming ones for i = 0.
  before = jax.tree.map(
    lambda first, x: jnp.concatenate([first[:, None], x[:, :-1]], axis=1), s_in, after
  )

  queries = unit_rows(where(rows.reads, rows.z), dtype)
  as_rows = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  chunks are rows of their own
  found = read(as_rows(queries), as_rows(before.d), factor(as_rows(before.a), rows.ridge))
  r, leverage = found.r.reshape(rows.v.shape), found.leverage.reshape(rows.v.shape[:3])
  last = jax.tree.map(lambda x: x[:, -1], after)
  return Outputs(where(rows.reads, r), where(rows.reads, leverage), last)


def _combine(earlier, later):
  """Returns `update.combine` of both sums, of keeps that have no gradient where they are 0."""
  (k1, a1, d1), (k2, a2, d2) = earlier, later
  return k1 * k2, scale(k2, a1) + a2, scale(k2, d1) + d2
