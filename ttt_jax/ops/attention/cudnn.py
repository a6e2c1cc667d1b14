"""Calls cuDNN's fused attention kernel on NVIDIA GPUs, and lists the reasons why it refuses a call.

The kernel counts positions from the first key, so that queries and keys must be the same tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.ops.attention.sharded import first_position, halo, zero_tokens
from ttt_jax.ops.hardware import cuda_capability, target_platform


def attend(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  window: int | None,
  context_axis: str | None,
) -> Float[Array, "B T H K"]:
  """Attends to the last `window` tokens, or on one device to all earlier ones.

  Over shards the tokens of the halo get dummy queries. On the first shards a part of the halo lies before
  the sequence: that part is moved behind the shard, where no query sees it.
  """
  fused = partial(
    jax.nn.dot_product_attention,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )
  if context_axis is None:
    return fused(q, k, v)
  with jax.named_scope("halo_exchange"):
    halo_k, halo_v, _ = halo(k, v, None, window - 1, context_axis)
  missing = jnp.maximum(0, window - 1 - first_position(q.shape[1], context_axis))
  rows = ((zero_tokens(q, window - 1), q), (halo_k, k), (halo_v, v))
  o = fused(*(jnp.roll(jnp.concatenate(x, axis=1), -missing, axis=1) for x in rows))
  return jnp.roll(o, missing, axis=1)[:, window - 1 :]


def refusals(
  q: Array, window: int | None, segment_ids: Int[Array, "B T"] | None, context_axis: str | None
) -> list[str]:
  """Lists what of a call the kernel cannot take; empty if it takes the call."""
  reasons = []
  if segment_ids is not None:
    reasons.append("segment_ids (its mask would be a [T, T] array)")
  if window is None and context_axis is not None:
    reasons.append("full attention over a sequence split over devices (queries start at key 0)")
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    reasons.append(f"dtype {q.dtype}")
  if target_platform() != "gpu":
    reasons.append(f"the {target_platform()} backend")
  elif (capability := cuda_capability()) is None or capability < 8:
    reasons.append("a GPU other than NVIDIA's of compute capability 8.0 and above")
  else:
    largest = 256 if capability >= 9 else 128
    if q.shape[3] % 8 or q.shape[3] > largest:
      reasons.append(f"head size {q.shape[3]} (a multiple of 8 up to {largest})")
  return reasons
