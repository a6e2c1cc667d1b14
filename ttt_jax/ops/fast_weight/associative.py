"""`implementation="associative"`: runs `jax.lax.associative_scan` over the chunks of a device."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import incoming_state
from ttt_jax.ops.fast_weight.chunks import Chunks, UpdateSettings, keep_factors
from ttt_jax.ops.numerics import matmul, where
from ttt_jax.ops.update import Update, apply_update, clip_update, scale


def associative(
  chunks: Chunks, settings: UpdateSettings, exchange: Exchange | None
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"]]:
  """Returns R and the state after this device's last chunk; all chunks' states are in memory at once."""
  z, s_in, factors = chunks.z, chunks.s_in, keep_factors(chunks, settings)
  written = matmul("bncf,bncd->bnfd", where(chunks.writes, z), chunks.v)
  u = (chunks.lr * written).astype(settings.state_dtype)
  u = clip_update(u, settings.clip_norm, settings.tensor_axis)
  keeps_all = factors is None  # every chunk keeps the whole state
  factors = jnp.ones(z.shape[:2], u.dtype) if keeps_all else factors
  upto = lax.associative_scan(_combine, Update(factors, u), axis=1)
  total = Update(upto.keep[:, -1], upto.delta[:, -1])
  if s_in is None:
    s_in = jnp.zeros_like(total.delta)
  if exchange is not None:
    # The missing term, what earlier shards wrote: see `sequential._sequential_fwd`.
    s_in = incoming_state(total._replace(keep=None) if keeps_all else total, s_in, exchange)
  # Exclusive: chunk i reads the state made by chunks 0 to i-1, the incoming one for i = 0.
  after = scale(upto.keep, jnp.broadcast_to(s_in[:, None], u.shape)) + upto.delta
  before = jnp.concatenate([s_in[:, None], after[:, :-1]], axis=1)
  fast = matmul("bncf,bnfd->bncd", where(chunks.reads, z), before.astype(z.dtype))
  return where(chunks.reads, fast), apply_update(total, s_in)


def _combine(earlier: Update, later: Update) -> Update:
  """Composes as `update.combine` does, for keeps that have no gradient where they are 0."""
  return Update(earlier.keep * later.keep, scale(later.keep, earlier.delta) + later.delta)
