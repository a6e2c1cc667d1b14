"""The gated MLP, and the one whose down projection is a fast weight."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.nn.layers import normal_init, project
from ttt_jax.ops.fast_weight import inplace_ttt
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.ops.target import ntp_targets
from ttt_jax.sharding import over_shards

# inner rate = base * exp(10 s): s then moves on the scale that AdamW moves other parameters on.
INNER_RATE_SPEED = 10.0


class MlpStats(NamedTuple):
  """How a TTT layer's fast weight compares with its slow one, over the rows and shards of a batch.

  Attributes:
    update_ratio: mean of `|update| / |W|`, Frobenius norms, over the last chunks of the shards.
    state_ratio: largest `|S| / |W|` at the end of a shard.
    output_ratio: `|z S| / |z W|` over 256 tokens of every shard: the fast part of the output against
      the slow one.
    inner_lr: the inner rate.
  """

  update_ratio: Float[Array, ""]
  state_ratio: Float[Array, ""]
  output_ratio: Float[Array, ""]
  inner_lr: Float[Array, ""]


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
    gate = project("btd,df->btf", h, self.gate, h.dtype)
    up = project("btd,df->btf", h, self.up, h.dtype)
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
      kernel = kernel.at[width // 2 + 1].set(1)
    self.conv = nnx.Param(kernel)
    self.projection = nnx.Param(jnp.eye(d, dtype=param_dtype)) if ttt.projection else None
    self.log_rate = nnx.Param(jnp.zeros((), param_dtype)) if ttt.learn_inner_lr else None
    self.ttt = ttt
    self.base_rate = ttt.inner_lr / model.d_ff if ttt.inner_lr_scale == "1/F" else ttt.inner_lr
    self.state_dtype = model.state_dtype

  def inner_lr(self, dtype: DTypeLike) -> Float[Array, ""]:
    """`base_rate * exp(10 s)`, with s learned from 0, or `base_rate`."""
    if self.log_rate is None:
      return jnp.asarray(self.base_rate, dtype)
    return self.base_rate * jnp.exp(INNER_RATE_SPEED * self.log_rate[...].astype(dtype))

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
    lr = self.inner_lr(wide)
    tokens = ("batch", "sequence", None)
    y, stats = over_shards(
      self._learn,
      self.hidden(h),
      source,
      self.down[...].astype(h.dtype),
      self.conv[...],
      None if self.projection is None else self.projection[...],
      lr,
      segment_ids,
      dims=(
        tokens,
        tokens,
        None,
        None,
        None,
        None,
        tokens[:2] if segment_ids is not None else None,
      ),
      out_dims=(tokens, (tokens[:2],) * 4),
    )
    updates, state, fast, slow = (x.astype(wide) for x in stats)
    norm = jnp.linalg.norm(jax.lax.stop_gradient(self.down[...].astype(wide)))
    return y, MlpStats(
      update_ratio=jnp.mean(updates) / norm,
      state_ratio=jnp.max(state) / norm,
      output_ratio=jnp.linalg.norm(fast) / jnp.linalg.norm(slow),
      inner_lr=jax.lax.stop_gradient(lr),
    )

  def _learn(self, z, source, w_down, conv, projection, lr, segment_ids, *, context_axis):
    v = ntp_targets(
      source, conv, projection, chunk_size=self.ttt.chunk_size, segment_ids=segment_ids
    )
    y, _, stats = inplace_ttt(
      z,
      v,
      w_down,
      chunk_size=self.ttt.chunk_size,
      inner_lr=lr,
      segment_ids=segment_ids,
      decay=self.ttt.decay,
      clip_norm=self.ttt.clip_norm,
      context_axis=context_axis,
      implementation=self.ttt.implementation,
      merge=self.ttt.merge,
      wire_dtype=self.ttt.wire_dtype,
      collective=self.ttt.collective,
      state_dtype=self.state_dtype,
      return_stats=True,
    )
    return y, tuple(x[:, None] for x in stats)  # one entry per row and shard
