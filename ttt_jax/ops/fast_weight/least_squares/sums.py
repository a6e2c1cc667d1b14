"""Computes the two sums of the least-squares rule, and what one chunk reads of them.

    k = z / |z|        A = sum of k^T k,   D = sum of k^T v           over the chunks before, decayed
    M = A + rho I      rho = ridge tr(A) / F
    R = k M^-1 D       l = k M^-1 A k^T                               both 0 while A = 0

R is the ridge regression of the values on the keys, evaluated at k. The leverage l says how much of k the
sums have seen, from 0 (nothing like it) to 1. One Cholesky factorisation of M and C solves, `U = M^-1 K^T`,
give both: `R = U^T D` and `l = |k|^2 - rho k U`.

Sources: least squares as a memory, von Oswald et al. (MesaNet, arXiv 2506.05233) and Wang et al.
(test-time regression, arXiv 2501.12352).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ttt_jax.ops.hardware import target_platform
from ttt_jax.ops.manual import varying_zeros
from ttt_jax.ops.numerics import where
from ttt_jax.ops.update import scale

# M must be positive definite in its own dtype: a ridge below this multiple of eps tr(A) is raised to it.
_RIDGE_IN_EPS = 8


class Sums(NamedTuple):
  """Holds A `[B, F, F]`, symmetric, and D `[B, F, D]`."""

  a: Float[Array, "B F F"]
  d: Float[Array, "B F D"]


class Factored(NamedTuple):
  """Holds M of every row, factored.

  Attributes:
    cholesky: lower triangular L with `M = L L^T`; the identity where A is 0.
    rho: the ridge on M's diagonal, `ridge_share * tr(A)`.
    is_learned: whether A is not 0; where it is NaN it is not 0.
  """

  cholesky: Float[Array, "B F F"]
  rho: Float[Array, "B"]
  is_learned: Bool[Array, "B"]


class Read(NamedTuple):
  """Holds what the tokens of a chunk read: R, their leverage, and the solves `U^T = K M^-1`."""

  r: Float[Array, "B C D"]
  leverage: Float[Array, "B C"]
  u: Float[Array, "B C F"]


def product(subscripts: str, x: Array, y: Array) -> Array:
  """Computes `einsum` in full precision: by default TPU and GPU round float32 products to fewer bits."""
  return jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST)


def unit_rows(z: Float[Array, "*B F"], dtype: jnp.dtype) -> Float[Array, "*B F"]:
  """Returns the keys `z / |z|`; a row of zeros stays 0 and has no gradient."""
  z = z.astype(dtype)
  square = jnp.sum(z * z, axis=-1, keepdims=True)
  return jnp.where(square == 0, 0, z * lax.rsqrt(jnp.where(square == 0, 1, square)))


def ridge_share(ridge: Float[Array, ""], f: int) -> Float[Array, ""]:
  """Returns rho / tr(A): `ridge / F`, or the least that keeps M positive definite in ridge's dtype."""
  return jnp.maximum(ridge / f, _RIDGE_IN_EPS * jnp.finfo(ridge.dtype).eps)


def _by_row(function: Callable, *arrays: Array) -> Array:
  """Applies `function` to batched arrays; on a CPU row by row.

  There jaxlib 0.10's LAPACK calls on several matrices wait in a thread of the pool for other threads of
  the pool, and a few such calls at once wait for ever.
  """
  if target_platform() != "cpu" or arrays[0].shape[0] == 1:
    return function(*arrays)
  return lax.map(lambda row: function(*row), arrays)


def cholesky(m: Float[Array, "B F F"]) -> Float[Array, "B F F"]:
  """Returns the lower Cholesky factors L of `m = L L^T`; only the lower triangles of m are read."""
  return _by_row(lambda m: lax.linalg.cholesky(m, symmetrize_input=False), m)


def solve_factored(
  factor: Float[Array, "B F F"], x: Float[Array, "B C F"]
) -> Float[Array, "B C F"]:
  """Returns `x (L L^T)^-1`, row by row of x."""

  def solve(factor, x):  # x L^-T L^-1
    half = lax.linalg.triangular_solve(factor, x, lower=True, transpose_a=True)
    return lax.linalg.triangular_solve(factor, half, lower=True)

  return _by_row(solve, factor, x)


def factor(a: Float[Array, "B F F"], ridge: Float[Array, ""]) -> Factored:
  """Returns the Cholesky factor of M; only the lower triangle of A is read."""
  f = a.shape[-1]
  trace = jnp.trace(a, axis1=-2, axis2=-1)
  rho = ridge_share(ridge, f) * trace
  identity = jnp.eye(f, dtype=a.dtype)[None]
  is_learned = trace != 0
  m = jnp.where(is_learned[:, None, None], a + rho[:, None, None] * identity, identity)
  return Factored(cholesky(m), rho, is_learned)


def read(keys: Float[Array, "B C F"], d: Float[Array, "B F D"], factored: Factored) -> Read:
  """Returns R and the leverage of a chunk's keys."""
  u = where(factored.is_learned, solve_factored(factored.cholesky, keys))
  square = where(factored.is_learned, jnp.sum(keys * keys, axis=-1))
  leverage = square - factored.rho[:, None] * jnp.sum(keys * u, axis=-1)
  return Read(product("bcf,bfd->bcd", u, d), leverage, u)


def condition(factored: Factored) -> Float[Array, "B"]:
  """Returns a lower bound of M's condition number, from its Cholesky factor's diagonal; 1 where A is 0."""
  diagonal = jnp.diagonal(factored.cholesky, axis1=-2, axis2=-1)
  return (jnp.max(diagonal, axis=-1) / jnp.min(diagonal, axis=-1)) ** 2


def write(
  sums: Sums, keep: Float[Array, "B"] | None, keys: Float[Array, "B C F"], v: Float[Array, "B C D"]
) -> Sums:
  """Returns `keep A + K^T K` and `keep D + K^T V`; a keep of 0 drops what was there, None is 1."""
  kept = sums if keep is None else Sums(scale(keep, sums.a), scale(keep, sums.d))
  return Sums(
    kept.a + product("bcf,bcg->bfg", keys, keys), kept.d + product("bcf,bcd->bfd", keys, v)
  )


def packed_shape(f: int, d: int) -> tuple[int, int]:
  """Returns the shape of a row's packed sums."""
  return f, f // 2 + 1 + d


def pack(sums: Sums) -> Float[Array, "B F P"]:
  """Packs both sums into one array without half of A, `P = F // 2 + 1 + D`: what travels.

  Row i holds `A[i, i], A[i, i + 1], ..., A[i, i + F // 2]`, columns counted modulo F.
  """
  f = sums.a.shape[-1]
  columns = (jnp.arange(f)[:, None] + jnp.arange(f // 2 + 1)[None]) % f
  half = jnp.take_along_axis(sums.a, columns[None], axis=2)
  return jnp.concatenate([half, sums.d], axis=2)


def unpack(packed: Float[Array, "B F P"]) -> Sums:
  """Returns the sums that were packed."""
  f = packed.shape[1]
  width = f // 2 + 1
  half, d = packed[:, :, :width], packed[:, :, width:]
  row, column = jnp.arange(f)[:, None], jnp.arange(f)[None, :]
  ahead = (column - row) % f  # of the diagonal, along the row
  is_own = ahead < width
  rows = jnp.where(is_own, row, column)
  places = jnp.where(is_own, ahead, (row - column) % f)
  return Sums(half[:, rows, places], d)


def symmetric(a: Float[Array, "B F F"]) -> Float[Array, "B F F"]:
  """Returns `(A + A^T) / 2`."""
  return (a + jnp.swapaxes(a, -1, -2)) / 2


def no_sums(like: Float[Array, "B *X"], f: int, d: int, dtype: jnp.dtype) -> Sums:
  """Returns the sums of nothing, which vary over the mesh axes of `like`, with as many rows."""
  b = like.shape[0]
  return Sums(*(varying_zeros(shape, dtype, like) for shape in ((b, f, f), (b, f, d))))
