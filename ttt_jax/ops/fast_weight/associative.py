"""`implementation="associative"`: `jax.lax.associative_scan` over the chunks of a device."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.exchange.prefix import incoming_state
from ttt_jax.ops.fast_weight.chunks import Chunks, Options, factors_of
from ttt_jax.ops.numerics import matmul, where
from ttt_jax.ops.update import Update, apply_update, clip_update, scale


def associative(
  chunks: Chunks, options: Options
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"]]:
  """R and the state after this device's last chunk; every chunk's state is in memory at once."""
  z, s_in, factors = chunks.z, chunks.s_in, factors_of(chunks, options)
  written = matmul("bncf,bncd->bnfd", where(chunks.writes, z), chunks.v)
  u = (chunks.lr * written).astype(options.state_dtype)
  u = clip_update(u, options.clip_norm, options.tensor_axis)
  known = factors is None  # to be 1
  factors = jnp.ones(z.shape[:2], u.dtype) if known else factors
  upto = lax.associative_scan(_combine, Update(factors, u), axis=1)
  total = Update(upto.keep[:, -1], upto.delta[:, -1])
  if s_in is None:
    s_in = jnp.zeros_like(total.delta)
  if options.exchange is not None:
    s_in = incoming_state(total._replace(keep=None) if known else total, s_in, options.exchange)
  # Exclusive: chunk i reads the state made by chunks 0 to i-1, the incoming one for i = 0.
  after = scale(upto.keep, jnp.broadcast_to(s_in[:, None], u.shape)) + upto.delta
  before = jnp.concatenate([s_in[:, None], after[:, :-1]], axis=1)
  reads = matmul("bncf,bnfd->bncd", where(chunks.reads, z), before.astype(z.dtype))
  return where(chunks.reads, reads), apply_update(total, s_in)


def _combine(earlier: Update, later: Update) -> Update:
  """`update.combine`, of keeps that have no gradient where they are 0."""
  return Update(earlier.keep * later.keep, scale(later.keep, earlier.delta) + later.delta)
