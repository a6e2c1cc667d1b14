"""Grouped-query attention adds projections, positions and norms to `ttt_jax.ops.attention.api`."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import AttentionConfig, ModelConfig
from ttt_jax.nn.layers import PROJECTED, RMSNorm, add_bias, normal_init, project, rotate
from ttt_jax.ops.attention.api import attention
from ttt_jax.ops.attention.cached import KeyValueCache, attend_span, attend_token, write
from ttt_jax.parallel.mesh import Axes, constrain, over_shards

# Logical dimensions of queries, and of a KV cache, which is not split along the sequence.
_HEADS = ("batch", "sequence", "heads", None)
KEYS_AND_VALUES = KeyValueCache(*(("batch", None, "kv_heads", None),) * 2)


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape, dtype))


class Attention(nnx.Module):
  """Computes `softmax(q k^T / sqrt(K)) v` over the last `window` tokens of a token's document."""

  def __init__(
    self,
    model: ModelConfig,
    config: AttentionConfig,
    *,
    window: int | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    d, h, g, k = model.d_model, model.num_heads, model.num_kv_heads, model.head_size
    self.query = normal_init(rngs.params(), (d, h, k), param_dtype, fan_in=d)
    self.key = normal_init(rngs.params(), (d, g, k), param_dtype, fan_in=d)
    self.value = normal_init(rngs.params(), (d, g, k), param_dtype, fan_in=d)
    # This gain keeps the residual stream's variance independent of depth.
    gain = (2 * model.num_layers) ** -0.5
    self.out = normal_init(rngs.params(), (h, k, d), param_dtype, fan_in=h * k, gain=gain)
    bias = model.attention_bias
    self.query_bias = _zeros((h, k), param_dtype) if bias else None
    self.key_bias = _zeros((g, k), param_dtype) if bias else None
    self.value_bias = _zeros((g, k), param_dtype) if bias else None
    self.out_bias = _zeros((d,), param_dtype) if bias == "qkvo" else None
    norm = partial(RMSNorm, k, eps=model.norm_eps, param_dtype=param_dtype)
    self.query_norm = norm() if model.qk_norm else None
    self.key_norm = norm() if model.qk_norm else None
    self.window = window
    self.implementation = config.implementation
    self.balance = config.balance

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rotary: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    documents: Int[Array, "B T"] | None,
  ) -> Float[Array, "B T D"]:
    q, k, v = (checkpoint_name(a, PROJECTED) for a in self._project(x, rotary))
    kv_heads = ("batch", "sequence", "kv_heads", None)
    mixed = over_shards(
      self._attend,
      q,
      k,
      v,
      documents,
      dims=(_HEADS, kv_heads, kv_heads, None if documents is None else ("batch", "sequence")),
      out_dims=_HEADS,
      check_vma=False,  # refused by splash attention
    )
    return self._out(checkpoint_name(mixed, PROJECTED))

  def empty_cache(self, rows: int, capacity: int, dtype: DTypeLike) -> KeyValueCache:
    """Returns the cache of rows that have read nothing, with room for `capacity` tokens each."""
    slots = capacity if self.window is None else min(self.window, capacity)
    shape = (rows, slots, *self.key.shape[-2:])
    return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  def _out(self, mixed):
    return add_bias(project("bthk,hkd->btd", mixed, self.out, mixed.dtype), self.out_bias)

  def _project(self, x, rotary):
    q = add_bias(project("btd,dhk->bthk", x, self.query, x.dtype), self.query_bias)
    k = add_bias(project("btd,dgk->btgk", x, self.key, x.dtype), self.key_bias)
    v = add_bias(project("btd,dgk->btgk", x, self.value, x.dtype), self.value_bias)
    if self.query_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    return rotate(q, *rotary), rotate(k, *rotary), v

  def read(
    self,
    x: Float[Array, "B T D"],
    rotary: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    cache: KeyValueCache,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
    """Returns the output of new tokens after the cached ones, and the cache with their keys and values.

    Args:
      x: the input of T right-padded tokens.
      rotary: the angles of each row's positions.
      cache: keys and values of the earlier tokens.
      lengths: the number of earlier tokens per row.
      counts: the number of real new tokens per row.
    """
    q, k, v = self._project(x, rotary)
    k, v = (constrain(a, *dims) for a, dims in zip((k, v), KEYS_AND_VALUES))
    before, cache = cache, write(cache, k, v, lengths, counts)
    if x.shape[1] == 1:
      mixed = attend_token(q, cache, lengths)
    else:
      # Writing to a window's slots overwrites tokens that the first new token still sees.
      cached = cache if self.window is None else before
      mixed = over_shards(
        self._attend_span,
        q,
        k,
        v,
        *cached,
        lengths,
        dims=(_HEADS, *KEYS_AND_VALUES, *KEYS_AND_VALUES, ("batch",)),
        out_dims=_HEADS,
        check_vma=False,
      )
    return self._out(mixed), cache

  def _attend_span(self, q, k, v, cached_k, cached_v, lengths, *, axes: Axes):
    first = 0 if axes.context is None else q.shape[1] * jax.lax.axis_index(axes.context)
    return attend_span(
      q,
      k,
      v,
      KeyValueCache(cached_k, cached_v),
      lengths,
      window=self.window,
      first=first,
      implementation=self.implementation,
    )

  def _attend(self, q, k, v, documents, *, axes: Axes):
    window = self.window
    if window is not None and axes.context is None:
      window = min(window, q.shape[1])  # a window beyond the sequence sees all of it
    return attention(
      q,
      k,
      v,
      window=window,
      segment_ids=documents,
      context_axis=axes.context,
      implementation=self.implementation,
      balance=self.balance,
    )
