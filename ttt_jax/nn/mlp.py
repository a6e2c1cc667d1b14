"""Implements the gated MLP."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ttt_jax.config import ModelConfig
from ttt_jax.nn.layers import PROJECTED, normal_init, project


class Mlp(nnx.Module):
  """Computes `o = z W_down` with `z = silu(h W_gate) * (h W_up)`."""

  def __init__(self, model: ModelConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
    d, f = model.d_model, model.d_ff
    self.gate = normal_init(rngs.params(), (d, f), param_dtype, fan_in=d)
    self.up = normal_init(rngs.params(), (d, f), param_dtype, fan_in=d)
    gain = (2 * model.num_layers) ** -0.5
    self.down = normal_init(rngs.params(), (f, d), param_dtype, fan_in=f, gain=gain)

  def hidden(self, h: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
    """Returns z, the gated activations."""
    gate, up = (
      checkpoint_name(project("btd,df->btf", h, kernel, h.dtype), PROJECTED)
      for kernel in (self.gate, self.up)
    )
    return jax.nn.silu(gate) * up

  def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return project("btf,fd->btd", self.hidden(h), self.down, h.dtype)
