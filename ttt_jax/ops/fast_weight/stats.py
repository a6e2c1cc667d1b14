"""Computes norms of the parts of a fast weight, for logs; without gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ttt_jax.ops.fast_weight.chunks import Chunks, UpdateSettings
from ttt_jax.ops.numerics import accumulation_dtype, matmul, where
from ttt_jax.ops.update import clip_update, sum_over

_SAMPLED_TOKENS = 256  # per row and device, to estimate the norms of the output's two parts


class FastWeightStats(NamedTuple):
  """Holds the Frobenius norms of the parts of a fast weight; without gradient.

  RMSNorm hides a blow-up behind a finite loss: compare `update` and `state` with `|W|`, and `fast`
  with `slow`. The norms cost one chunk's update and the read of about 256 tokens, no pass over all chunks.

  Attributes:
    update: norm of the update of this device's last full chunk, after clipping.
    state: norm of S after that chunk.
    fast: norm of the part of y that S contributes, before the sum with W's part is rounded: exactly 0 where
      S is 0. Estimated from about 256 evenly spaced tokens, at least one of every chunk.
    slow: norm of the part of y that W contributes, estimated from the same tokens.
  """

  update: Float[Array, "*B"]
  state: Float[Array, "*B"]
  fast: Float[Array, "*B"]
  slow: Float[Array, "*B"]


class LeastSquaresStats(NamedTuple):
  """Holds the statistics of the least-squares rule; without gradient.

  Attributes:
    update: norm of `K^T V` of this device's last full chunk.
    state: norm of D after that chunk.
    fast, slow: as in `FastWeightStats`.
    leverage: mean leverage of the tokens that read.
    condition: a lower bound of the condition number of the system after that chunk.
  """

  update: Float[Array, "*B"]
  state: Float[Array, "*B"]
  fast: Float[Array, "*B"]
  slow: Float[Array, "*B"]
  leverage: Float[Array, "*B"]
  condition: Float[Array, "*B"]


def choose_sample_places(n: int, chunk_size: int) -> slice:
  """Chooses evenly spaced places in each of n chunks: `_SAMPLED_TOKENS` per row in all, at least n."""
  stride = -(-chunk_size // max(1, _SAMPLED_TOKENS // max(1, n)))
  return slice(stride // 2, None, stride)


def measure(
  chunks: Chunks,
  settings: UpdateSettings,
  w: Float[Array, "F D"],
  s: Float[Array, "B F D"],
  *,
  sample_places: slice,
  fast_part: Float[Array, "B N samples D"] | None,
) -> FastWeightStats:
  """Returns the statistics of a device's chunks.

  Args:
    chunks, rule, w: the arguments of the implementation, and the slow weight.
    s: the state after the last chunk.
    sample_places: the places in every chunk of the tokens to measure, see `choose_sample_places`.
    fast_part: R of these tokens; None where there is no full chunk.
  """
  chunks, w, fast_part, s = jax.lax.stop_gradient((chunks, w, fast_part, s))
  b, n, c, _ = chunks.z.shape
  wide = accumulation_dtype(chunks.z.dtype)

  def norm(x):
    return jnp.sqrt(jnp.sum(x * x, axis=(1, 2, 3)))

  def norm_over_f(x):
    return jnp.sqrt(sum_over(jnp.sum(x * x, axis=(1, 2)), settings.tensor_axis))

  update = jnp.zeros(b, s.dtype)
  fast = slow = jnp.zeros(b, wide)
  if n:
    last = where(None if chunks.writes is None else chunks.writes[:, -1], chunks.z[:, -1])
    u = (chunks.lr * matmul("bcf,bcd->bfd", last, chunks.v[:, -1])).astype(s.dtype)
    update = norm_over_f(clip_update(u, settings.clip_norm, settings.tensor_axis))
    z = chunks.z[:, :, sample_places]
    slow_part = matmul("bncf,fd->bncd", z, w.astype(z.dtype))
    slow_part, fast_part = sum_over(jnp.stack([slow_part, fast_part]), settings.tensor_axis)
    whole = (c / z.shape[2]) ** 0.5
    fast, slow = whole * norm(fast_part), whole * norm(slow_part)
  return FastWeightStats(update=update, state=norm_over_f(s), fast=fast, slow=slow)
