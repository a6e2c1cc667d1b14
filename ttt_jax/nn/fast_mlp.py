"""Implements the gated MLP whose down projection is a fast weight that learns along a row."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.nn.layers import normal_init
from ttt_jax.nn.mlp import Mlp
from ttt_jax.ops.fast_weight.api import inplace_ttt
from ttt_jax.ops.fast_weight.least_squares.api import Gate, LeastSquares
from ttt_jax.ops.fast_weight.stats import FastWeightStats, LeastSquaresStats
from ttt_jax.ops.fast_weight.targets import ntp_targets
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import Axes, over_shards

# Inner rate and half-life are base * exp(LOG_SCALE s), so that AdamW's step sizes suit s as they suit other
# parameters.
LOG_SCALE = 10.0
# The parameters s, with the same factor the direction of the gate, and the projection of keys.
LEARNED = (
  "log_rate",
  "log_half_life",
  "log_read_scale",
  "log_gate",
  "gate_key",
  "key_projection",
)


class FastWeightParams(NamedTuple):
  """Holds the parameters of a fast weight.

  Attributes:
    w_down: the slow down projection, the initial value.
    conv, projection: the parameters of the target, see `ntp_targets`.
    inner_lr: the inner rate of the sum, else None.
    decay: the state's factor per chunk if a half-life is learned, else None.
    read_scale: of least squares, else None.
    gate: threshold and sharpness of least squares with a gate, else None.
    gate_key: the direction of keys in that gate if it depends on them, else None.
    key_projection: the projection of keys if they have `ttt.key_rank` dimensions, else None.
  """

  w_down: Float[Array, "F D"]
  conv: Float[Array, "W D"]
  projection: Float[Array, "D D"] | None
  inner_lr: Float[Array, ""] | None
  decay: Float[Array, ""] | None
  read_scale: Float[Array, ""] | None
  gate: Float[Array, "2"] | None
  gate_key: Float[Array, "R"] | None
  key_projection: Float[Array, "F R"] | None

  @property
  def read_gate(self) -> tuple | None:
    """Returns the argument of `inplace_ttt`."""
    if self.gate is None:
      return None
    return (self.gate[0], self.gate[1], *(() if self.gate_key is None else (self.gate_key,)))


# Logical dimensions of `FastWeightParams`.
PARAM_DIMS = FastWeightParams(
  ("mlp", None), None, None, None, None, None, None, None, ("mlp", None)
)


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


class LeastSquaresMlpStats(NamedTuple):
  """Compares a fast weight of least squares with W: its update is `K^T V`, its state is D.

  Attributes:
    update_ratio, state_ratio, output_ratio, decay: as in `MlpStats`.
    read_scale: the factor of what is read.
    leverage: mean leverage of the tokens.
    condition: largest condition number of a solve at the end of a shard, a lower bound.
  """

  update_ratio: Float[Array, ""]
  state_ratio: Float[Array, ""]
  output_ratio: Float[Array, ""]
  read_scale: Float[Array, ""]
  decay: Float[Array, ""]
  leverage: Float[Array, ""]
  condition: Float[Array, ""]


def merge_stats(stats: MlpStats | LeastSquaresMlpStats) -> MlpStats | LeastSquaresMlpStats:
  """Combines the stats of microbatches, stacked on a leading axis, into those of the batch."""
  largest = ("state_ratio", "condition")
  return type(stats)(
    *((jnp.max if name in largest else jnp.mean)(x, axis=0) for name, x in stats._asdict().items())
  )


def _learned(base: Any, log: nnx.Param | None, dtype: DTypeLike) -> Array:
  """Returns `base * exp(10 s)`, or `base` where nothing is learned."""
  base = jnp.asarray(base, dtype)
  return base if log is None else base * jnp.exp(LOG_SCALE * log[...].astype(dtype))


class TttMlp(Mlp):
  """The gated MLP keeps learning: `W_down` is the initial value of a fast weight.

  Targets are `V = conv(source) @ projection`, with the token embeddings or the MLP's input as source
  (`ttt.target`); the update is that of `ttt_jax.inplace_ttt`.
  """

  def __init__(self, model: ModelConfig, ttt: TTTConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
    ttt.check()
    super().__init__(model, param_dtype=param_dtype, rngs=rngs)
    d, width = model.d_model, ttt.conv_width
    kernel = jnp.zeros((width, d), param_dtype)
    if ttt.init != "identity":
      kernel = kernel.at[width // 2 + (ttt.init != "current_token")].set(1)
    self.conv = nnx.Param(kernel)
    self.projection = nnx.Param(jnp.eye(d, dtype=param_dtype)) if ttt.projection else None

    def learned_from_zero(is_learned: bool, *shape: int) -> nnx.Param | None:
      return nnx.Param(jnp.zeros(shape, param_dtype)) if is_learned else None

    is_sum = ttt.rule == "sum"
    self.log_rate = learned_from_zero(is_sum and ttt.learn_inner_lr)
    self.log_half_life = learned_from_zero(ttt.learn_half_life)
    self.log_read_scale = learned_from_zero(not is_sum and ttt.learn_read_scale)
    self.log_gate = learned_from_zero(ttt.read_gate != "none" and ttt.learn_gate, 2)
    self.key_rank = model.d_ff if ttt.key_rank is None else ttt.key_rank
    self.gate_key = learned_from_zero(ttt.read_gate == "key", self.key_rank)
    projection = (model.d_ff, self.key_rank), param_dtype
    self.key_projection = (
      None if ttt.key_rank is None else normal_init(rngs.params(), *projection, fan_in=model.d_ff)
    )
    self.ttt = ttt
    self.base_rate = ttt.inner_lr / model.d_ff if ttt.inner_lr_scale == "1/F" else ttt.inner_lr
    self.state_dtype = model.state_dtype

  def inner_lr(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """Returns `base_rate * exp(10 s)` with s learned from 0, or `base_rate`; None with least squares."""
    return _learned(self.base_rate, self.log_rate, dtype) if self.ttt.rule == "sum" else None

  def read_scale(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """Returns `ttt.read_scale * exp(10 s)` with s learned from 0, or without; None with the sum."""
    if self.ttt.rule == "sum":
      return None
    return _learned(self.ttt.read_scale, self.log_read_scale, dtype)

  def read_gate(self, dtype: DTypeLike) -> Float[Array, "2"] | None:
    """Returns threshold and sharpness of the gate; None without one.

    `1 - threshold` and the sharpness are those of the config times `exp(10 s)`, s learned from 0.
    """
    if self.ttt.read_gate == "none":
      return None
    start = jnp.asarray([1 - self.ttt.gate_threshold, self.ttt.gate_sharpness], dtype)
    distance, sharpness = _learned(start, self.log_gate, dtype)
    return jnp.stack([1 - distance, sharpness])

  def gate_direction(self, dtype: DTypeLike) -> Float[Array, "R"] | None:
    """Returns the direction of keys in the gate, `10 s` with s learned from 0; None if there is none."""
    return None if self.gate_key is None else LOG_SCALE * self.gate_key[...].astype(dtype)

  def projection_of_keys(self, dtype: DTypeLike) -> Float[Array, "F R"] | None:
    """Returns the projection of the keys; None where they are all of z."""
    return None if self.key_projection is None else self.key_projection[...].astype(dtype)

  def learned_decay(self, dtype: DTypeLike) -> Float[Array, ""] | None:
    """Returns `2^(-C / h)` of the half-life `h = ttt.half_life * exp(10 s)`, s learned from 0; or None."""
    if self.log_half_life is None:
      return None
    half_life = _learned(self.ttt.half_life, self.log_half_life, dtype)
    return jnp.exp2(-self.ttt.chunk_size / half_life)

  def least_squares(self, dtype: DTypeLike) -> LeastSquares:
    """Returns how the rule of least squares reads."""
    gate = self.read_gate(dtype)
    return LeastSquares(
      ridge=jnp.asarray(self.ttt.ridge, dtype),
      read_scale=self.read_scale(dtype),
      gate=None if gate is None else Gate(gate[0], gate[1], self.gate_direction(dtype)),
      projection=self.projection_of_keys(dtype),
    )

  def learn(
    self,
    h: Float[Array, "B T D"],
    source: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
  ) -> tuple[Float[Array, "B T D"], MlpStats | LeastSquaresMlpStats]:
    """Returns the output with updates along each row, and statistics; `__call__` makes no updates.

    Args:
      h: the MLP's input.
      source: the input of the targets' convolution.
      segment_ids: documents of the packed rows, 0 for padding.
    """
    params = self.params(h.dtype)
    rows = ("batch", "sequence")

    def on_shard(z, source, params, segment_ids, *, axes: Axes):
      y, _, stats = inplace_ttt(
        z,
        self.targets(source, params, segment_ids),
        params.w_down,
        segment_ids=segment_ids,
        context_axis=axes.context,
        tensor_axis=axes.tensor,
        return_stats=True,
        **self.options(params),
      )
      return y, jax.tree.map(lambda x: x[:, None], stats)  # one entry per row and shard

    stats_type = FastWeightStats if self.ttt.rule == "sum" else LeastSquaresStats
    y, stats = over_shards(
      on_shard,
      self.hidden(h),
      source,
      params,
      segment_ids,
      dims=((*rows, "mlp"), (*rows, None), PARAM_DIMS, None if segment_ids is None else rows),
      out_dims=((*rows, None), stats_type(*(rows,) * len(stats_type._fields))),
    )
    wide = accumulation_dtype(h.dtype)
    return y, self._relative(jax.tree.map(lambda x: x.astype(wide), stats), params)

  def _relative(
    self, stats: FastWeightStats | LeastSquaresStats, params: FastWeightParams
  ) -> MlpStats | LeastSquaresMlpStats:
    """Returns the statistics of all shards relative to the slow weight."""
    wide = stats.update.dtype
    norm = jnp.linalg.norm(jax.lax.stop_gradient(self.down[...].astype(wide)))
    decay = params.decay
    if decay is None:
      decay = jnp.asarray(1.0 if self.ttt.chunk_decay is None else self.ttt.chunk_decay, wide)
    ratios = {
      "update_ratio": jnp.mean(stats.update) / norm,
      "state_ratio": jnp.max(stats.state) / norm,
      "output_ratio": jnp.linalg.norm(stats.fast) / jnp.linalg.norm(stats.slow),
      "decay": jax.lax.stop_gradient(decay),
    }
    if self.ttt.rule == "sum":
      return MlpStats(**ratios, inner_lr=jax.lax.stop_gradient(params.inner_lr))
    return LeastSquaresMlpStats(
      **ratios,
      read_scale=jax.lax.stop_gradient(params.read_scale),
      leverage=jnp.mean(stats.leverage),
      condition=jnp.max(stats.condition),
    )

  def targets(
    self,
    source: Float[Array, "B T D"],
    params: FastWeightParams,
    segment_ids: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns the values that updates store."""
    return ntp_targets(
      source,
      params.conv,
      params.projection,
      chunk_size=self.ttt.chunk_size,
      segment_ids=segment_ids,
    )

  def options(self, params: FastWeightParams) -> dict[str, Any]:
    """Returns the arguments of `inplace_ttt` that the config and the parameters determine."""
    ttt = self.ttt
    return {
      "chunk_size": ttt.chunk_size,
      "inner_lr": params.inner_lr,
      "decay": ttt.chunk_decay if params.decay is None else params.decay,
      "clip_norm": ttt.clip_norm,
      "rule": ttt.rule,
      "ridge": ttt.ridge,
      "read_scale": 1.0 if params.read_scale is None else params.read_scale,
      "read_gate": params.read_gate,
      "key_projection": params.key_projection,
      "implementation": ttt.implementation,
      "merge": ttt.merge,
      "wire_dtype": ttt.wire_dtype,
      "collective": ttt.collective,
      "state_dtype": self.state_dtype,
    }

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
      read_scale=self.read_scale(wide),
      gate=self.read_gate(wide),
      gate_key=self.gate_direction(wide),
      key_projection=self.projection_of_keys(wide),
    )
