"""The gated MLP whose down projection is a fast weight: its parameters, and how it learns along a row."""

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

# Inner rate and half-life are base * exp(10 s): s then moves on the scale that AdamW moves other
# parameters on.
LOG_SCALE = 10.0


class FastWeightParams(NamedTuple):
  """What a fast weight takes besides activations.

  Attributes:
    w_down: the slow down projection, its initial value.
    conv, projection: of the target, see `ntp_targets`.
    inner_lr: the inner rate.
    decay: the state's factor per chunk, where a half-life is learned; else None.
  """

  w_down: Float[Array, "F D"]
  conv: Float[Array, "W D"]
  projection: Float[Array, "D D"] | None
  inner_lr: Float[Array, ""]
  decay: Float[Array, ""] | None


# Logical dimensions of `FastWeightParams`.
PARAM_DIMS = FastWeightParams(("mlp", None), None, None, None, None)


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
    return self.base_rate * jnp.exp(LOG_SCALE * self.log_rate[...].astype(dtype))

  def learned_decay(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """`2^(-C / half-life)` of a half-life `ttt.half_life * exp(10 s)`, s learned from 0; else None."""
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
    """The output with the fast weight updating along each row; `__call__` is the one with it at rest.

    Args:
      h: the MLP's input.
      source: what the targets are made of.
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
    """`inplace_ttt` as the config says; `options` are its further arguments."""
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
    """The parameters of the fast weight.

    In float32 or wider, although they are computed with in `dtype`: so are their gradients, which
    `over_shards` sums over the devices.
    """
    wide = accumulation_dtype(dtype)
    return FastWeightParams(
      w_down=self.down[...].astype(wide),
      conv=self.conv[...].astype(wide),
      projection=None if self.projection is None else self.projection[...].astype(wide),
      inner_lr=self.inner_lr(wide),
      decay=self.learned_decay(wide),
    )
