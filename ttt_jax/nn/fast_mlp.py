"""Implements the gated MLP whose down projection is a fast weight that learns along a row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.nn.mlp import Mlp
from ttt_jax.ops.fast_weight.api import inplace_ttt
from ttt_jax.ops.fast_weight.targets import ntp_targets
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import Axes, over_shards

# Inner rate and half-life are base * exp(LOG_SCALE s), so that AdamW's step sizes suit s as they suit other
# parameters.
LOG_SCALE = 10.0


class FastWeightParams(NamedTuple):
  """Holds the parameters of a fast weight.

  Attributes:
    w_down: the slow down projection, the initial value.
    conv, projection: the parameters of the target, see `ntp_targets`.
    inner_lr: the inner rate.
    decay: the state's factor per chunk if a half-life is learned, else None.
  """

  w_down: Float[Array, "F D"]
  conv: Float[Array, "W D"]
  projection: Float[Array, "D D"] | None
  inner_lr: Float[Array, ""]
  decay: Float[Array, ""] | None


# Logical dimensions of `FastWeightParams`.
PARAM_DIMS = FastWeightParams(("mlp", None), None, None, None, None)


class MlpStats(NamedTuple):
  """Compares a TTT layer's fast weight with its slow weight, over the rows and shards of a batch.

  Attributes:
    update_ratio: mean of `|update| / |W|`, Frobenius norms, over the last chunks of the shards.
    state_ratio: largest `|S| / |W|` at the end of a shard.
    output_ratio: `|z S| / |z W|` over about 256 tokens of every shard, the fast part of the output
      against the slow part, both before they are added and rounded; 0 where nothing was learned.
    inner_lr: the inner rate.
    decay: the state's factor per chunk.
  """

  update_ratio: Float[Array, ""]
  state_ratio: Float[Array, ""]
  output_ratio: Float[Array, ""]
  inner_lr: Float[Array, ""]
  decay: Float[Array, ""]


def merge_stats(stats: MlpStats) -> MlpStats:
  """Combines the stats of microbatches, stacked on a leading axis, into those of the batch."""
  mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), stats)
  return mean._replace(state_ratio=jnp.max(stats.state_ratio, axis=0))


class TttMlp(Mlp):
  """The gated MLP keeps learning: `W_down` is the initial value of a fast weight.

  Targets are `V = conv(source) @ projection`, with the token embeddings or the MLP's input as source
  (`ttt.target`); the update is that of `ttt_jax.inplace_ttt`.
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
    """Returns `base_rate * exp(10 s)` with s learned from 0, or `base_rate`."""
    if self.log_rate is None:
      return jnp.asarray(self.base_rate, dtype)
    return self.base_rate * jnp.exp(LOG_SCALE * self.log_rate[...].astype(dtype))

  def learned_decay(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """Returns `2^(-C / h)` of the half-life `h = ttt.half_life * exp(10 s)`, s learned from 0; or None."""
    if self.log_half_life is None:
      return None
    half_life = self.ttt.half_life * jnp.exp(LOG_SCALE * self.log_half_life[...].astype(dtype))
    return jnp.exp2(-self.ttt.chunk_size / half_life)

  def learn(
    self,
    h: Float[Array, "B T D"],
    source: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
  ) -> tuple[Float[Array, "B T D"], MlpStats]:
    """Returns the output with updates along each row, and statistics; `__call__` makes no updates.

    Args:
      h: the MLP's input.
      source: the input of the targets' convolution.
      segment_ids: documents of the packed rows, 0 for padding.
    """
    wide = accumulation_dtype(h.dtype)
    params = self.params(h.dtype)
    rows = ("batch", "sequence")
    y, stats = over_shards(
      self._learn,
      self.hidden(h),
      source,
      params,
      segment_ids,
      dims=((*rows, "mlp"), (*rows, None), PARAM_DIMS, None if segment_ids is None else rows),
      out_dims=((*rows, None), (rows,) * 4),
    )
    updates, state, fast, slow = (x.astype(wide) for x in stats)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(self.down[...].astype(wide)))
    decay = params.decay
    if decay is None:
      decay = jnp.asarray(1.0 if self.ttt.chunk_decay is None else self.ttt.chunk_decay, wide)
    return y, MlpStats(
      update_ratio=jnp.mean(updates) / norm,
      state_ratio=jnp.max(state) / norm,
      output_ratio=jnp.linalg.norm(fast) / jnp.linalg.norm(slow),
      inner_lr=jax.lax.stop_gradient(params.inner_lr),
      decay=jax.lax.stop_gradient(decay),
    )

  def _learn(self, z, source, params, segment_ids, *, axes: Axes):
    y, _, stats = self.fast_weight(
      z,
      source,
      params,
      segment_ids=segment_ids,
      context_axis=axes.context,
      tensor_axis=axes.tensor,
      return_stats=True,
    )
    return y, tuple(x[:, None] for x in stats)  # one entry per row and shard

  def fast_weight(self, z, source, params: FastWeightParams, *, segment_ids=None, **options):
    """Calls `inplace_ttt` with the config's options; `options` are further arguments."""
    ttt = self.ttt
    v = ntp_targets(
      source,
      params.conv,
      params.projection,
      chunk_size=ttt.chunk_size,
      segment_ids=segment_ids,
    )
    return inplace_ttt(
      z,
      v,
      params.w_down,
      chunk_size=ttt.chunk_size,
      inner_lr=params.inner_lr,
      segment_ids=segment_ids,
      decay=ttt.chunk_decay if params.decay is None else params.decay,
      clip_norm=ttt.clip_norm,
      implementation=ttt.implementation,
      merge=ttt.merge,
      wire_dtype=ttt.wire_dtype,
      collective=ttt.collective,
      state_dtype=self.state_dtype,
      **options,
    )

  def params(self, dtype: DTypeLike) -> FastWeightParams:
    """Returns the parameters of the fast weight, in float32 or wider although the op computes in `dtype`.

    Their gradients, which `over_shards` sums over the devices, are then float32 or wider too.
    """
    wide = accumulation_dtype(dtype)
    return FastWeightParams(
      w_down=self.down[...].astype(wide),
      conv=self.conv[...].astype(wide),
      projection=None if self.projection is None else self.projection[...].astype(wide),
      inner_lr=self.inner_lr(wide),
      decay=self.learned_decay(wide),
    )
