"""The gated MLP, and the one whose down projection is a fast weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.nn.layers import PROJECTED, normal_init, project
from ttt_jax.nn.pending import FastCache, chunk_at, join_chunk
from ttt_jax.ops.fast_weight import FastWeightState, inplace_ttt
from ttt_jax.ops.numerics import accumulation_dtype, matmul
from ttt_jax.ops.target import ntp_targets
from ttt_jax.sharding import Axes, context_size, over_shards

# Logical dimensions of what `TttMlp._weights` returns, and of a row's cache.
_WEIGHTS = (("mlp", None), None, None, None, None)
FAST_CACHE = FastCache(
  s=("batch", "mlp", None), z=("batch", None, "mlp"), source=("batch", None, None)
)

# Inner rate and half-life are base * exp(10 s): s then moves on the scale that AdamW moves other
# parameters on.
LOG_SPEED = 10.0


class MlpStats(NamedTuple):
  """How a TTT layer's fast weight compares with its slow one, over the rows and shards of a batch.

  Attributes:
    update_ratio: mean of `|update| / |W|`, Frobenius norms, over the last chunks of the shards.
    state_ratio: largest `|S| / |W|` at the end of a shard.
    output_ratio: `|z S| / |z W|` over about 256 tokens of every shard: the fast part of the output
      against the slow one, each before they are added and rounded; 0 where nothing was learned.
    inner_lr: the inner rate.
    decay: the state's factor per chunk.
  """

  update_ratio: Float[Array, ""]
  state_ratio: Float[Array, ""]
  output_ratio: Float[Array, ""]
  inner_lr: Float[Array, ""]
  decay: Float[Array, ""]


def merge_stats(stats: MlpStats) -> MlpStats:
  """Those of a batch that was read in parts, from those of its parts, stacked on a leading axis."""
  mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), stats)
  return mean._replace(state_ratio=jnp.max(stats.state_ratio, axis=0))


class Mlp(nnx.Module):
  """`o = z W_down` with `z = silu(h W_gate) * (h W_up)`."""

  def __init__(self, model: ModelConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
    d, f = model.d_model, model.d_ff
    self.gate = normal_init(rngs.params(), (d, f), param_dtype, fan_in=d)
    self.up = normal_init(rngs.params(), (d, f), param_dtype, fan_in=d)
    gain = (2 * model.num_layers) ** -0.5
    self.down = normal_init(rngs.params(), (f, d), param_dtype, fan_in=f, gain=gain)

  def hidden(self, h: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """z, the gated activations."""
    gate, up = (
      checkpoint_name(project("btd,df->btf", h, kernel, h.dtype), PROJECTED)
      for kernel in (self.gate, self.up)
    )
    return jax.nn.silu(gate) * up

  def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return project("btf,fd->btd", self.hidden(h), self.down, h.dtype)


class TttMlp(Mlp):
  """The gated MLP that keeps learning: `W_down` is the initial value of a fast weight.

  Targets `V = conv(source) @ projection` come from the token embeddings or from the MLP's own input
  (`ttt.target`); the update and the inner rate are those of `ttt_jax.inplace_ttt`.
  """

  def __init__(self, model: ModelConfig, ttt: TTTConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
    super().__init__(model, param_dtype=param_dtype, rngs=rngs)
    d, width = model.d_model, ttt.conv_width
    kernel = jnp.zeros((width, d), param_dtype)
    if ttt.init != "identity":
      kernel = kernel.at[width // 2 + (ttt.init != "current_token")].set(1)
    self.conv = nnx.Param(kernel)
    self.projection = nnx.Param(jnp.eye(d, dtype=param_dtype)) if ttt.projection else None
    self.log_rate = nnx.Param(jnp.zeros((), param_dtype)) if ttt.learn_inner_lr else None
    self.log_half_life = nnx.Param(jnp.zeros((), param_dtype)) if ttt.learn_half_life else None
    self.ttt = ttt
    self.base_rate = ttt.inner_lr / model.d_ff if ttt.inner_lr_scale == "1/F" else ttt.inner_lr
    self.state_dtype = model.state_dtype

  def inner_lr(self, dtype: DTypeLike) -> Float[Array, ""]:
    """`base_rate * exp(10 s)`, with s learned from 0, or `base_rate`."""
    if self.log_rate is None:
      return jnp.asarray(self.base_rate, dtype)
    return self.base_rate * jnp.exp(LOG_SPEED * self.log_rate[...].astype(dtype))

  def learned_decay(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """`2^(-C / half-life)` of a half-life `ttt.half_life * exp(10 s)`, s learned from 0; else None."""
    if self.log_half_life is None:
      return None
    half_life = self.ttt.half_life * jnp.exp(LOG_SPEED * self.log_half_life[...].astype(dtype))
    return jnp.exp2(-self.ttt.chunk_size / half_life)

  def learn(
    self,
    h: Float[Array, "B T D"],
    source: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
  ) -> tuple[Float[Array, "B T D"], MlpStats]:
    """The output with the fast weight updating along each row; `__call__` is the one with it at rest.

    Args:
      h: the MLP's input.
      source: what the targets are made of.
      segment_ids: documents of the packed rows, 0 for padding.
    """
    wide = accumulation_dtype(h.dtype)
    weights = self._weights(h.dtype)
    *_, lr, decay = weights
    rows = ("batch", "sequence")
    y, stats = over_shards(
      self._learn,
      self.hidden(h),
      source,
      *weights,
      segment_ids,
      dims=(
        (*rows, "mlp"),
        (*rows, None),
        *_WEIGHTS,
        None if segment_ids is None else rows,
      ),
      out_dims=((*rows, None), (rows,) * 4),
    )
    updates, state, fast, slow = (x.astype(wide) for x in stats)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(self.down[...].astype(wide)))
    if decay is None:
      decay = jnp.asarray(1.0 if self.ttt.chunk_decay is None else self.ttt.chunk_decay, wide)
    return y, MlpStats(
      update_ratio=jnp.mean(updates) / norm,
      state_ratio=jnp.max(state) / norm,
      output_ratio=jnp.linalg.norm(fast) / jnp.linalg.norm(slow),
      inner_lr=jax.lax.stop_gradient(lr),
      decay=jax.lax.stop_gradient(decay),
    )

  def _learn(self, z, source, w_down, conv, projection, lr, decay, segment_ids, *, axes: Axes):
    y, _, stats = self._fast_weight(
      z,
      source,
      w_down,
      conv,
      projection,
      lr,
      decay,
      segment_ids=segment_ids,
      context_axis=axes.context,
      tensor_axis=axes.tensor,
      return_stats=True,
    )
    return y, tuple(x[:, None] for x in stats)  # one entry per row and shard

  def _fast_weight(
    self, z, source, w_down, conv, projection, lr, decay, *, segment_ids=None, **how
  ):
    """`inplace_ttt` as the config says."""
    ttt = self.ttt
    v = ntp_targets(source, conv, projection, chunk_size=ttt.chunk_size, segment_ids=segment_ids)
    return inplace_ttt(
      z,
      v,
      w_down,
      chunk_size=ttt.chunk_size,
      inner_lr=lr,
      segment_ids=segment_ids,
      decay=ttt.chunk_decay if decay is None else decay,
      clip_norm=ttt.clip_norm,
      implementation=ttt.implementation,
      merge=ttt.merge,
      wire_dtype=ttt.wire_dtype,
      collective=ttt.collective,
      state_dtype=self.state_dtype,
      **how,
    )

  def _weights(self, dtype: DTypeLike):
    """What `_fast_weight` takes besides activations: W, convolution, projection, inner rate, decay.

    In float32 or wider, although they are computed with in `dtype`: so are their gradients, which
    `over_shards` sums over the devices.
    """
    wide = accumulation_dtype(dtype)
    projection = None if self.projection is None else self.projection[...].astype(wide)
    conv = self.conv[...].astype(wide)
    rate, decay = self.inner_lr(wide), self.learned_decay(wide)
    return self.down[...].astype(wide), conv, projection, rate, decay

  def empty_cache(self, rows: int, dtype: DTypeLike) -> FastCache:
    """Of rows that have read nothing."""
    f, d = self.down.shape
    c = self.ttt.chunk_size
    return FastCache(
      s=jnp.zeros((rows, f, d), self.state_dtype),
      z=jnp.zeros((rows, c, f), dtype),
      source=jnp.zeros((rows, c, d), dtype),
    )

  def read_token(
    self,
    h: Float[Array, "B 1 D"],
    source: Float[Array, "B 1 D"],
    cache: FastCache,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
  ) -> tuple[Float[Array, "B 1 D"], FastCache]:
    """The output of one token per row, which joins the row's unfinished chunk if its count is 1.

    A chunk that is full thereby is learned by `learn_pending`, before the row's next token.
    """
    z = self.hidden(h)
    c = cache.z.shape[1]
    rows = jnp.arange(z.shape[0], dtype=jnp.int32)
    place = jnp.where(counts > 0, lengths % c, c)  # out of bounds: dropped

    def put(old, x):
      return old.at[rows, place].set(x[:, 0].astype(old.dtype), mode="drop", unique_indices=True)

    slow = project("btf,fd->btd", z, self.down, accumulation_dtype(h.dtype))
    fast = matmul("btf,bfd->btd", z, cache.s.astype(z.dtype))
    cache = cache._replace(z=put(cache.z, z), source=put(cache.source, source))
    return (slow + fast).astype(h.dtype), cache

  def learn_pending(self, cache: FastCache, row: Int[Array, ""]) -> FastCache:
    """The cache after one row's chunk, which is full, was learned."""
    of_row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), cache)
    _, state = self._fast_weight(
      of_row.z, of_row.source, *self._weights(cache.z.dtype), state=FastWeightState(of_row.s)
    )
    s = jax.lax.dynamic_update_slice_in_dim(cache.s, state.S.astype(cache.s.dtype), row, 0)
    return cache._replace(s=s)

  def read(
    self,
    h: Float[Array, "B T D"],
    source: Float[Array, "B T D"],
    cache: FastCache,
    lengths: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    aligned: bool,
  ) -> tuple[Float[Array, "B T D"], FastCache]:
    """The output of T new tokens, of which `counts` of a row are there, and what is learned of them.

    Args:
      aligned: no row that reads has an unfinished chunk. Else the new tokens are moved behind it, which
        takes room for another chunk.
    """
    z, c = self.hidden(h), self.ttt.chunk_size
    pending = jnp.zeros_like(lengths) if aligned else lengths % c
    if not aligned:
      z, source = (
        join_chunk(old, x, pending, room=c * context_size())
        for old, x in ((cache.z, z), (cache.source, source))
      )
    tokens = ("batch", "sequence", None)
    y, s, z, source = over_shards(
      self._read,
      z,
      source,
      *self._weights(h.dtype),
      cache.s,
      pending + counts,
      dims=(("batch", "sequence", "mlp"), tokens, *_WEIGHTS, FAST_CACHE.s, ("batch",)),
      out_dims=(tokens, *FAST_CACHE),
    )
    if not aligned:
      place = pending[:, None] + jnp.arange(h.shape[1], dtype=jnp.int32)[None]
      y = jnp.take_along_axis(y, place[..., None], axis=1)
    reads = (counts > 0)[:, None, None]  # other rows keep the chunk that they have begun
    z, source = (
      jnp.where(reads, new.astype(old.dtype), old)
      for old, new in ((cache.z, z), (cache.source, source))
    )
    return y, FastCache(s, z, source)

  def _read(self, z, source, w_down, conv, projection, lr, decay, s, lengths, *, axes: Axes):
    y, state = self._fast_weight(
      z,
      source,
      w_down,
      conv,
      projection,
      lr,
      decay,
      state=FastWeightState(s),
      lengths=lengths,
      context_axis=axes.context,
      tensor_axis=axes.tensor,
    )
    c = self.ttt.chunk_size
    start = lengths // c * c
    pending = (chunk_at(x, start, c, axes.context) for x in (z, source))
    return y, state.S, *pending
