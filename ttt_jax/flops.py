"""The FLOPs of a model, counted from its config: what MFU is measured against.

Only products count, two FLOPs for a multiplication and an addition, and only those that the model asks
for: nothing that remat computes again, no masked half of a causal attention.
"""

from typing import NamedTuple

from ttt_jax.config import AttentionConfig, Config, ModelConfig, TTTConfig
from ttt_jax.nn.transformer import layer_kinds


class Flops(NamedTuple):
  """FLOPs of one token in a row, on average."""

  projections: float  # of attention and MLPs
  attention: float  # scores and weighted values
  fast_weights: float  # what TTT layers do beyond their gated MLP
  head: float

  @property
  def forward(self) -> float:
    return sum(self)

  @property
  def training(self) -> float:
    """Forward and backward: a product has two in its backward pass, of as many FLOPs each."""
    return 3 * self.forward


def visible_keys(tokens: int, window: int | None) -> float:
  """Keys that a token of a row of `tokens` sees on average: `(T+1)/2`, or with a window of w
  `w - w(w-1)/(2T)`."""
  w = tokens if window is None else min(window, tokens)
  return w - w * (w - 1) / (2 * tokens)


def token_flops(
  model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig, tokens: int
) -> Flops:
  """FLOPs per token of one forward pass over rows of `tokens` tokens, each one document.

  With widths D, F, V, H query and G key heads of size K, for every layer

      projections   2 D (2 H K + 2 G K) + 2 * 3 D F
      attention     4 H K s            s: keys a token sees (`visible_keys`)
      fast weight   2 F D (update Z^T V) + 2 D^2 (projection of the target) + 2 w D (its convolution)

  the last one in TTT layers only, and `2 D V` for the head. Reading `Z (W + S)` is one product, as the
  MLP's own; that some implementations read W and S in two is their cost, not the model's.
  """
  d, f = model.d_model, model.d_ff
  heads, kv_heads = (n * model.head_size for n in (model.num_heads, model.num_kv_heads))
  kinds = layer_kinds(model, attention, ttt)
  projection = 2 * d * d if ttt.projection else 0
  per_ttt = 2 * f * d + projection + 2 * ttt.conv_width * d
  return Flops(
    projections=len(kinds) * (2 * d * (2 * heads + 2 * kv_heads) + 6 * d * f),
    attention=sum(4 * heads * visible_keys(tokens, kind.window) for kind in kinds),
    fast_weights=float(per_ttt * sum(kind.ttt for kind in kinds)),
    head=2 * d * model.vocab_size,
  )


def training_flops(config: Config) -> float:
  """FLOPs of one training step of a config, `6 N` per token and attention's, in all layers.

  Parameters that do not train (`train.trainable`) take no gradient: one of the three products less.
  """
  flops = token_flops(config.model, config.attention, config.ttt, config.data.seq_len)
  per_token = flops.training
  if config.train.trainable != "all":
    per_token -= flops.projections + flops.head
  return config.train.batch_size * config.data.seq_len * per_token
