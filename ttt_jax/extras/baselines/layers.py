"""Defines the layers that replace attention in the baselines: gated linear attention and DeltaNet.

Each has as many parameters as the attention that it replaces, so that a model's number of parameters is
within 2 % of the plain model's (from d_model 64 on, with d_ff three times that). Neither has rotary
positions, since the order of the updates already encodes positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import AttentionConfig, ModelConfig
from ttt_jax.errors import UnsupportedError
from ttt_jax.extras.baselines.ops import delta_rule, gated_linear_attention, short_convolution
from ttt_jax.nn.layers import PROJECTED, RMSNorm, add_bias, normal_init, project
from ttt_jax.nn.mixers import Mixer, register_mixer
from ttt_jax.ops.manual import shard_count
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import Axes, over_shards

# Published values: alpha = sigmoid(.)^(1/16) with a projection of rank 16 at most, and in DeltaNet a
# convolution over four tokens.
TEMPERATURE = 16
_DECAY_RANK = 16
_SHORT_CONV = {"gla": 1, "delta_net": 4}


class LinearCache(NamedTuple):
  """Holds what a layer keeps of its rows, in memory that does not grow with their length.

  Attributes:
    state: the state of the recurrence, float32 or wider.
    recent: the last tokens' projections, inputs of the short convolution; None without a convolution.
  """

  state: Float[Array, "B H K M"]
  recent: Float[Array, "B before H channels"] | None


LINEAR_CACHE = LinearCache(
  state=("batch", "kv_heads", None, None), recent=("batch", None, "kv_heads", None)
)


class Sizes(NamedTuple):
  """Holds the number of heads, a head's key and value widths, and the decay's rank (0: no decay)."""

  heads: int
  key: int
  value: int
  rank: int


def linear_sizes(model: ModelConfig, mixer: str) -> Sizes:
  """Returns sizes that give a mixer's projections as many parameters as the attention it replaces.

  With H query heads and G key heads of width K, attention has 2 D (H + G) K parameters. The mixers have G
  heads, like attention's keys and values, with one state each, and values of width `M = K (1 + H/G) / 2`.
  DeltaNet has four projections of D G M parameters (q, k, v, out). In GLA keys are half as wide as values,
  as published: two projections have half as many (q, k), and three have D G M (v, output gate, out).
  """
  value = model.head_size * (model.num_kv_heads + model.num_heads) // (2 * model.num_kv_heads)
  if mixer == "delta_net":
    return Sizes(model.num_kv_heads, value, value, 0)
  return Sizes(model.num_kv_heads, value // 2, value, max(1, min(_DECAY_RANK, model.d_model // 8)))


def short_conv_width(attention: AttentionConfig, mixer: str) -> int:
  """Returns the width in tokens of a mixer's short convolution; 1 means no convolution."""
  return _SHORT_CONV[mixer] if attention.short_conv is None else attention.short_conv


class _LinearAttention(nnx.Module):
  """Does what both mixers share: projections, the op on shards of rows and heads, the output.

  With a short convolution, queries, keys and values are `silu(conv(x (W_q, W_k, W_v)))`.
  """

  mixer: str
  op: Callable  # of queries, keys, values and a gate

  def __init__(
    self,
    model: ModelConfig,
    attention: AttentionConfig,
    *,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    d = model.d_model
    h, k, m, _ = self.sizes = linear_sizes(model, self.mixer)
    self.query = normal_init(rngs.params(), (d, h, k), param_dtype, fan_in=d)
    self.key = normal_init(rngs.params(), (d, h, k), param_dtype, fan_in=d)
    self.value = normal_init(rngs.params(), (d, h, m), param_dtype, fan_in=d)
    gain = (2 * model.num_layers) ** -0.5
    self.out = normal_init(rngs.params(), (h, m, d), param_dtype, fan_in=h * m, gain=gain)
    self.out_norm = RMSNorm(m, eps=model.norm_eps, param_dtype=param_dtype)
    self._init_gates(model, param_dtype, rngs)
    width = short_conv_width(attention, self.mixer)
    taps = (width, h, 2 * k + m)
    self.short_conv = (
      normal_init(rngs.params(), taps, param_dtype, fan_in=width) if width > 1 else None
    )

  def __call__(
    self,
    x: Float[Array, "B T D"],
    rotary: tuple[Float[Array, "T half"], Float[Array, "T half"]],
    documents: Int[Array, "B T"] | None,
  ) -> Float[Array, "B T D"]:
    """Mixes tokens as `Attention` does; `rotary` is not used."""
    q, k, v, gate, _ = self._inputs(x, documents, None)
    return self._out(x, self._mix(q, k, v, gate, documents, None)[0])

  def read(
    self,
    x: Float[Array, "B T D"],
    rotary: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
    cache: LinearCache,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B T D"], LinearCache]:
    """Does what `Attention.read` does: of T tokens the first `counts` are new, the others padding."""
    is_new = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    documents = is_new.astype(jnp.int32)  # right padding leaves the state as it is
    q, k, v, gate, projected = self._inputs(x, documents, cache.recent)
    mixed, state = self._mix(q, k, v, gate, documents, cache.state)
    recent = cache.recent
    if recent is not None:
      whole = jnp.concatenate([recent, projected.astype(recent.dtype)], axis=1)
      last = counts[:, None] + jnp.arange(recent.shape[1], dtype=jnp.int32)[None]
      recent = jnp.take_along_axis(whole, last[:, :, None, None], axis=1)
    return self._out(x, mixed), LinearCache(state, recent)

  def empty_cache(self, rows: int, capacity: int, dtype: DTypeLike) -> LinearCache:
    """Makes the cache of empty rows; its size does not depend on `capacity`."""
    h, k, m, _ = self.sizes
    state = jnp.zeros((rows, h, k, m), accumulation_dtype(dtype))
    if self.short_conv is None:
      return LinearCache(state, None)
    width, _, channels = self.short_conv.shape
    return LinearCache(state, jnp.zeros((rows, width - 1, h, channels), dtype))

  def _init_gates(self, model: ModelConfig, param_dtype: DTypeLike, rngs: nnx.Rngs):
    """Makes the parameters that only this mixer has."""
    raise NotImplementedError

  def _inputs(self, x, documents, recent):
    """Returns q, k, v, the op's gate, and the projections before the convolution, for the cache."""
    raise NotImplementedError

  def _project(self, x, documents, recent):
    """Returns q, k and v after any convolution, and the projections before it (None without one)."""
    q, k, v = (
      checkpoint_name(project("btd,dhk->bthk", x, kernel, x.dtype), PROJECTED)
      for kernel in (self.query, self.key, self.value)
    )
    if self.short_conv is None:
      return q, k, v, None
    projected = jnp.concatenate([q, k, v], axis=-1)
    mixed = short_convolution(projected, self.short_conv[...], segment_ids=documents, before=recent)
    width = self.sizes.key
    return *jnp.split(jax.nn.silu(mixed), (width, 2 * width), axis=-1), projected

  def _mix(self, q, k, v, gate, documents, state):
    """Returns the op's outputs and last state; every device computes its rows and heads."""
    tokens = ("batch", "sequence" if q.shape[1] > 1 else None)
    heads = (*tokens, "kv_heads", None)

    def mix(q, k, v, gate, documents, state, *, axes: Axes):
      if axes.context is not None and shard_count(axes.context) > 1:
        raise UnsupportedError(
          f"attention.mixer={self.mixer!r} on {shard_count(axes.context)} shards of the sequence: its "
          "state is not exchanged between them; use a mesh with context=1, and data, fsdp or tensor"
        )
      return self.op(q, k, v, gate, segment_ids=documents, state=state)

    mixed, state = over_shards(
      mix,
      q,
      k,
      v,
      gate,
      documents,
      state,
      dims=(
        heads,
        heads,
        heads,
        heads[: gate.ndim],
        None if documents is None else tokens,
        None if state is None else LINEAR_CACHE.state,
      ),
      out_dims=(heads, LINEAR_CACHE.state),
    )
    return checkpoint_name(mixed, PROJECTED), state

  def _out(self, x, mixed):
    return project("bthm,hmd->btd", self.out_norm(mixed), self.out, x.dtype)


class GatedLinearAttention(_LinearAttention):
  """Computes `out(norm(o) silu(x W_gate))` with o from `gated_linear_attention`.

      q = x W_q / sqrt(K)     k = x W_k     v = x W_v     alpha = sigmoid(x W_1 W_2 + b)^(1/16)

  It is the published block (Yang et al., arXiv 2312.06635; `fla`'s layer with its defaults): keys half as
  wide as values, a norm per head, an output gate, no short convolution. It differs in three points: it has
  as many heads as the model has key heads instead of four, RMSNorm replaces LayerNorm (as in `fla`), and
  the decay's projection has rank D/8 where that is below 16.
  """

  mixer = "gla"
  op = staticmethod(gated_linear_attention)

  def _init_gates(self, model, param_dtype, rngs):
    d, (h, k, m, rank) = model.d_model, self.sizes
    self.output_gate = normal_init(rngs.params(), (d, h, m), param_dtype, fan_in=d)
    self.decay_down = normal_init(rngs.params(), (d, rank), param_dtype, fan_in=d)
    self.decay_up = normal_init(rngs.params(), (rank, h, k), param_dtype, fan_in=rank)
    self.decay_bias = nnx.Param(jnp.zeros((h, k), param_dtype))

  def _inputs(self, x, documents, recent):
    q, k, v, projected = self._project(x, documents, recent)
    low = project("btd,dr->btr", x, self.decay_down, x.dtype)
    logits = project("btr,rhk->bthk", low, self.decay_up, accumulation_dtype(x.dtype))
    log_decay = jax.nn.log_sigmoid(add_bias(logits, self.decay_bias)) / TEMPERATURE
    return q * self.sizes.key**-0.5, k, v, log_decay, projected

  def _out(self, x, mixed):
    gate = jax.nn.silu(project("btd,dhm->bthm", x, self.output_gate, x.dtype))
    return project("bthm,hmd->btd", self.out_norm(mixed) * gate, self.out, x.dtype)


class DeltaNet(_LinearAttention):
  """Computes `out(norm(o))` with o from `delta_rule`.

      (q, k, v) = silu(conv(x (W_q, W_k, W_v)))     q, k of norm 1     beta = sigmoid(x W_beta)

  It is the published block (Yang et al., arXiv 2406.06484; `fla`'s layer with its defaults): a causal
  convolution of width 4 per channel, silu, keys and queries L2-normalised per head, RMSNorm per head. It
  differs in its number of heads, the model's key heads. As in the published block there is no output gate,
  no beta up to 2 and no feature map but silu, which stays without the convolution.
  """

  mixer = "delta_net"
  op = staticmethod(delta_rule)

  def _init_gates(self, model, param_dtype, rngs):
    d, h = model.d_model, self.sizes.heads
    self.beta = normal_init(rngs.params(), (d, h), param_dtype, fan_in=d)

  def _inputs(self, x, documents, recent):
    q, k, v, projected = self._project(x, documents, recent)
    if projected is None:
      q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
    beta = jax.nn.sigmoid(project("btd,dh->bth", x, self.beta, accumulation_dtype(x.dtype)))
    return l2_normalize(q), l2_normalize(k), v, beta, projected


def l2_normalize(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
  """Returns `x / sqrt(sum(x^2) + 1e-6)` over the last axis, computed in float32 or wider."""
  wide = x.astype(accumulation_dtype(x.dtype))
  return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def projection_flops(mixer: str, model: ModelConfig, attention: AttentionConfig) -> int:
  """Counts the FLOPs per token of a mixer's projections and short convolution."""
  d = model.d_model
  heads, key, value, rank = linear_sizes(model, mixer)
  keys, values = heads * key, heads * value
  width = short_conv_width(attention, mixer)
  short_conv = 2 * width * (2 * keys + values) if width > 1 else 0
  if mixer == "gla":
    return 2 * d * (2 * keys + 3 * values) + 2 * rank * (d + keys) + short_conv
  return 2 * d * (2 * keys + 2 * values + heads) + short_conv


def mixing_flops(mixer: str, model: ModelConfig) -> float:
  """Counts the FLOPs per token of a mixer's products with its state."""
  heads, key, value, _ = linear_sizes(model, mixer)
  return float({"gla": 4, "delta_net": 6}[mixer] * heads * key * value)


for _layer in (GatedLinearAttention, DeltaNet):
  register_mixer(
    _layer.mixer,
    Mixer(
      layer=_layer,
      cache_dims=LINEAR_CACHE._asdict(),
      projection_flops=partial(projection_flops, _layer.mixer),
      mixing_flops=partial(mixing_flops, _layer.mixer),
    ),
  )
