"""`implementation="sequential"` of least squares: carries one pair of sums through the chunks.

The backward pass keeps no sums either. What a chunk j adds to their cotangent has rank C,

    dD_j = U_j^T dR_j        dM_j = -W_j^T U_j,   W_j = dU_j M_j^-1

so a pass in the order of the chunks solves and keeps U and W, `[T, F]` like z, and a pass against it
gathers `G = sum over later chunks of (dA, dD)` without another factorisation.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import exchange_updates, incoming_state
from ttt_jax.ops.fast_weight.chunks import no_cotangent, set_chunk, take_chunk
from ttt_jax.ops.fast_weight.least_squares.rows import Outputs, Rows, row_factors
from ttt_jax.ops.fast_weight.least_squares.sums import (
  Sums,
  factor,
  no_sums,
  pack,
  product,
  read,
  ridge_share,
  solve_factored,
  symmetric,
  unit_rows,
  unpack,
  write,
)
from ttt_jax.ops.linear import reverse_only
from ttt_jax.ops.numerics import where
from ttt_jax.ops.update import Update, prefix_keeps, scale


def sequential(rows: Rows, exchange: Exchange | None) -> Outputs:
  """Returns R, the leverage and the sums; saves the inputs and the incoming sums for the backward pass."""
  starts_empty = rows.s_in is None and exchange is None
  if rows.s_in is None:
    f, d = rows.z.shape[-1], rows.v.shape[-1]
    rows = rows._replace(s_in=no_sums(rows.z, f, d, rows.v.dtype))
  rows = reverse_only(
    rows, "rule='least_squares' with implementation='sequential': pass implementation='associative'"
  )
  return _sequential(rows, exchange, starts_empty)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sequential(rows, exchange, starts_empty):
  return _sequential_fwd(rows, exchange, starts_empty)[0]


def _write(rows, factors, i, sums):
  """Returns the sums after chunk i."""
  keys = unit_rows(where(take_chunk(rows.writes, i), take_chunk(rows.z, i)), rows.v.dtype)
  return write(sums, take_chunk(factors, i), keys, take_chunk(rows.v, i))


def _read_keys(rows, i):
  return unit_rows(where(take_chunk(rows.reads, i), take_chunk(rows.z, i)), rows.v.dtype)


def _if_read(rows, i, sums, function, otherwise):
  """Returns `function()`, or at no cost `otherwise` where no token of the chunk reads sums other than 0."""
  trace = jnp.trace(sums.a, axis1=-2, axis2=-1)
  row_reads = jnp.bool_(True) if rows.reads is None else jnp.any(take_chunk(rows.reads, i), axis=-1)
  return lax.cond(jnp.any((trace != 0) & row_reads), function, lambda: otherwise)


def _total(rows, factors) -> Update:
  """Returns this shard's chunks as one update of packed sums."""
  with jax.named_scope("shard_total"):
    empty = jax.tree.map(jnp.zeros_like, rows.s_in)
    sums = lax.fori_loop(0, rows.z.shape[1], partial(_write, rows, factors), empty)
  return Update(None if factors is None else jnp.prod(factors, axis=1), pack(sums))


def _sequential_fwd(rows, exchange, starts_empty):
  n = rows.z.shape[1]
  factors, sums = row_factors(rows), rows.s_in
  total = None
  if exchange is not None:
    total = _total(rows, factors)
    sums = unpack(incoming_state(total, pack(sums), exchange))
  sums_in = sums
  r, leverage = jnp.zeros_like(rows.v), jnp.zeros_like(rows.v[..., 0])

  def read_chunk(i, sums, r, leverage):
    def solved():
      seen = read(_read_keys(rows, i), sums.d, factor(sums.a, rows.ridge))
      reads = take_chunk(rows.reads, i)
      return where(reads, seen.r), where(reads, seen.leverage)

    nothing = jnp.zeros_like(r[:, 0]), jnp.zeros_like(leverage[:, 0])
    r_i, leverage_i = _if_read(rows, i, sums, solved, nothing)
    return set_chunk(r, r_i, i), set_chunk(leverage, leverage_i, i)

  def body(i, carry):
    sums, r, leverage = carry
    sums = _write(rows, factors, i - 1, sums)
    return sums, *read_chunk(i, sums, r, leverage)

  with jax.named_scope("chunks"):
    if not starts_empty:
      r, leverage = read_chunk(0, sums, r, leverage)
    sums, r, leverage = lax.fori_loop(1, n, body, (sums, r, leverage))
  sums = _write(rows, factors, n - 1, sums)
  return Outputs(r, leverage, sums), (rows._replace(s_in=sums_in),)


class _Forwards(NamedTuple):
  """Holds what the pass in the order of the chunks carries.

  `u`, `w` and `rho` are of the solves; `diagonal` is what the ridge adds to dA, a multiple of I; `tangent`
  and `d_decay` count with a decay.
  """

  sums: Sums
  tangent: Sums | None
  u: Float[Array, "B N C F"]
  w: Float[Array, "B N C F"]
  rho: Float[Array, "B N"]
  diagonal: Float[Array, "B N"]
  d_ridge: Float[Array, ""]
  d_decay: Float[Array, ""]


class _Backwards(NamedTuple):
  """Holds what the pass against the chunks' order carries: the cotangent of the sums, symmetric in A."""

  g: Sums
  dz: Float[Array, "B N C F"]
  dv: Float[Array, "B N C D"]


def _sequential_bwd(exchange, starts_empty, saved, cotangents):
  """Passes over the chunks twice.

  Forwards, with the sums recomputed, chunk j's read `R = U D`, `l = |k|^2 - rho k U`, `U = K M^-1`:

      dU = dR D^T - rho dl K        W = dU M^-1        dM = -W^T U        dD = U^T dR
      dK = W + 2 dl K - rho dl U    drho = tr(dM) - <dl, k U>             dA = dM + drho share I

  Backwards, with G_j the cotangent of the sums before chunk j (of A symmetric):

      G_j = f_j G_{j+1} + (dA_j, dD_j)        dK_j += 2 K_j G_A + V_j G_D^T        dV_j = K_j G_D

  where the G on the right is `G_{j+1}`. The decay's gradient is carried forwards, as for the sum rule.
  """
  (rows,) = saved
  d_r, d_leverage, g_out = cotangents
  d_r, d_leverage = where(rows.reads, d_r), where(rows.reads, d_leverage)
  g_out = Sums(symmetric(g_out.a), g_out.d)
  factors = row_factors(rows)
  forwards = _forwards_pass(rows, factors, d_r, d_leverage, starts_empty)
  if exchange is not None:
    g_out = jax.tree.map(jnp.add, g_out, _of_later_shards(factors, forwards, d_r, g_out, exchange))
  d_decay = None
  if rows.decay is not None:
    d_decay = forwards.d_decay + sum(
      jnp.sum(t * g) for t, g in zip(forwards.tangent, g_out, strict=True)
    )
    d_decay = d_decay.astype(rows.decay.dtype)
  backwards = _backwards_pass(rows, factors, d_r, d_leverage, g_out, forwards)
  g_in = backwards.g
  if exchange is not None:
    # The sums before the whole sequence enter on the first shard only.
    first = lax.axis_index(exchange.axis) == 0
    g_in = jax.tree.map(lambda g: jnp.where(first, g, jnp.zeros_like(g)), g_in)
  return (
    Rows(
      z=backwards.dz,
      v=backwards.dv,
      s_in=g_in,
      keep=None if rows.keep is None else jnp.zeros_like(rows.keep),
      decay=d_decay,
      reads=no_cotangent(rows.reads),
      writes=no_cotangent(rows.writes),
      ridge=forwards.d_ridge,
    ),
  )


def _of_later_shards(factors, forwards, d_r, g_out, exchange) -> Sums:
  """Returns what later shards add to the cotangent of the outgoing sums, as for the sum rule."""
  with jax.named_scope("shard_cotangent"):
    u, w, diagonal = forwards.u, forwards.w, forwards.diagonal
    keep = None
    if factors is not None:
      kept = prefix_keeps(factors.T).T
      w, d_r, diagonal = scale(kept, w), scale(kept, d_r), scale(kept, diagonal)
      keep = jnp.prod(factors, axis=1)
    own = Sums(
      _with_diagonal(-symmetric(product("bncf,bncg->bfg", w, u)), jnp.sum(diagonal, axis=1)),
      product("bncf,bncd->bfd", u, d_r),
    )
    if keep is not None:
      g_out = Sums(scale(keep, g_out.a), scale(keep, g_out.d))
    delta = pack(jax.tree.map(jnp.add, g_out, own))
  return unpack(exchange_updates(Update(keep, delta), exchange, reverse=True).delta)


def _forwards_pass(rows, factors, d_r, d_leverage, starts_empty) -> _Forwards:
  n, f = rows.z.shape[1], rows.z.shape[3]

  def write_chunk(i, carry):
    tangent = carry.tangent
    if rows.decay is not None:
      kept = _scaled(take_chunk(rows.keep, i), carry.sums)
      tangent = jax.tree.map(jnp.add, _scaled(take_chunk(factors, i), tangent), kept)
    return carry._replace(sums=_write(rows, factors, i, carry.sums), tangent=tangent)

  def read_chunk(i, carry):
    sums, tangent, reads = carry.sums, carry.tangent, take_chunk(rows.reads, i)
    d_r_i, d_l = take_chunk(d_r, i), take_chunk(d_leverage, i)

    def solved():
      keys = _read_keys(rows, i)
      factored = factor(sums.a, rows.ridge)
      u = where(reads, read(keys, sums.d, factored).u)
      d_l_i = where(factored.is_learned, d_l)
      du = product("bcd,bfd->bcf", d_r_i, sums.d)
      du -= (factored.rho[:, None] * d_l_i)[..., None] * keys
      w = where(
        reads, where(factored.is_learned, solve_factored(factored.cholesky, where(reads, du)))
      )
      d_rho = -jnp.sum(w * u, axis=(1, 2)) - jnp.sum(d_l_i * jnp.sum(keys * u, axis=-1), axis=1)
      share, share_vjp = jax.vjp(lambda ridge: ridge_share(ridge, f), rows.ridge)
      diagonal = d_rho * share
      (d_ridge,) = share_vjp(jnp.sum(d_rho * jnp.trace(sums.a, axis1=-2, axis2=-1)))
      d_decay = jnp.zeros_like(carry.d_decay)
      if rows.decay is not None:
        t_a, t_d = tangent
        d_decay += jnp.sum(d_r_i * product("bcf,bfd->bcd", u, t_d))
        d_decay -= jnp.sum(w * product("bcf,bfg->bcg", u, t_a))
        d_decay += jnp.sum(diagonal * jnp.trace(t_a, axis1=-2, axis2=-1))
      return u, w, factored.rho, diagonal, d_ridge, d_decay

    zero = jnp.zeros_like
    rho, scalar = carry.rho[:, 0], carry.d_ridge
    nothing = (
      zero(carry.u[:, 0]),
      zero(carry.w[:, 0]),
      zero(rho),
      zero(rho),
      zero(scalar),
      zero(scalar),
    )
    u, w, rho, diagonal, d_ridge, d_decay = _if_read(rows, i, sums, solved, nothing)
    return carry._replace(
      u=set_chunk(carry.u, u, i),
      w=set_chunk(carry.w, w, i),
      rho=set_chunk(carry.rho, rho, i),
      diagonal=set_chunk(carry.diagonal, diagonal, i),
      d_ridge=carry.d_ridge + d_ridge,
      d_decay=carry.d_decay + d_decay,
    )

  like = rows.z.astype(rows.v.dtype)
  per_chunk, scalar = jnp.zeros_like(like[:, :, 0, 0]), jnp.zeros_like(like[0, 0, 0, 0])
  carry = _Forwards(
    sums=rows.s_in,
    tangent=None if rows.decay is None else jax.tree.map(jnp.zeros_like, rows.s_in),
    u=jnp.zeros_like(like),
    w=jnp.zeros_like(like),
    rho=per_chunk,
    diagonal=per_chunk,
    d_ridge=scalar,
    d_decay=scalar,
  )
  with jax.named_scope("chunks_forwards"):
    if not starts_empty:
      carry = read_chunk(0, carry)
    carry = lax.fori_loop(1, n, lambda i, carry: read_chunk(i, write_chunk(i - 1, carry)), carry)
  return carry if rows.decay is None else write_chunk(n - 1, carry)


def _backwards_pass(rows, factors, d_r, d_leverage, g_out, forwards) -> _Backwards:
  n, dtype = rows.z.shape[1], rows.v.dtype

  def step(j, carry):
    i = n - 1 - j
    g, reads, writes, z_i = (
      carry.g,
      take_chunk(rows.reads, i),
      take_chunk(rows.writes, i),
      take_chunk(rows.z, i),
    )
    u, w, d_l = (
      take_chunk(forwards.u, i),
      take_chunk(forwards.w, i),
      take_chunk(d_leverage, i)[..., None],
    )
    keys, unit_vjp = jax.vjp(lambda z: unit_rows(z, dtype), z_i)
    written = where(writes, keys)
    dv = where(writes, product("bcf,bfd->bcd", written, g.d))
    dk = 2 * product("bcf,bfg->bcg", written, g.a)
    dk = where(writes, dk + product("bcd,bfd->bcf", take_chunk(rows.v, i), g.d))
    rho = take_chunk(forwards.rho, i)[:, None, None]
    # Where nothing is learned the leverage is 0 whatever k is; rho is 0 there, too.
    of_leverage = where(rho[:, 0, 0] != 0, d_l * (2 * where(reads, keys) - rho * u))
    dk += where(reads, w + of_leverage)
    (dz,) = unit_vjp(dk)
    own = Sums(
      _with_diagonal(-symmetric(product("bcf,bcg->bfg", w, u)), take_chunk(forwards.diagonal, i)),
      product("bcf,bcd->bfd", u, take_chunk(d_r, i)),
    )
    g = jax.tree.map(jnp.add, _scaled(take_chunk(factors, i), g), own)
    return _Backwards(g, set_chunk(carry.dz, dz, i), set_chunk(carry.dv, dv, i))

  carry = _Backwards(g_out, jnp.zeros_like(rows.z), jnp.zeros_like(rows.v))
  with jax.named_scope("chunks_backwards"):
    return lax.fori_loop(0, n, step, carry)


def _scaled(keep, sums: Sums) -> Sums:
  return sums if keep is None else Sums(scale(keep, sums.a), scale(keep, sums.d))


def _with_diagonal(a, diagonal):
  return a + diagonal[:, None, None] * jnp.eye(a.shape[-1], dtype=a.dtype)[None]


_sequential.defvjp(_sequential_fwd, _sequential_bwd)
