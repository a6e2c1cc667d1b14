"""The FLOPs of a model, counted from its config: what MFU is measured against.

Only products count, two FLOPs for a multiplication and an addition, and only those that the model asks
for: nothing that remat computes again, no masked half of a causal attention.
"""

from typing import NamedTuple

from ttt_jax.config import AttentionConfig, Config, ModelConfig, TTTConfig
from ttt_jax.nn.mixers import find_mixer
from ttt_jax.nn.transformer import LayerKind, layer_kinds


class Flops(NamedTuple):
  """FLOPs of one token in a row, on average."""

  projections: float  # of attention, or what is in its place, and MLPs
  attention: float  # scores and weighted values; of linear attention, its state
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

  the last one in TTT layers only, and `2 D V` for the head. Layers with linear attention have, with heads
  G, keys of width K and values of width M as in `ttt_jax.extras.baselines`, in the places of the first two

      gla           2 D (2 G K + 3 G M) + 2 r (D + G K) + 6 D F      4 G K M (k^T v, q S)
      delta_net     2 D (2 G K + 2 G M) + 2 D G + 6 D F              6 G K M (k S, k^T u, q S)

  where r is the rank of the decay's projection, and either has 2 c (2 G K + G M) for a short convolution
  of c tokens, which DeltaNet has unless `attention.short_conv` says otherwise: the recurrence,
  token by token. Reading `Z (W + S)` is one product, as the MLP's own; that some implementations read W and
  S in two, or take more products in chunks of a recurrence, is their cost, not the model's.
  """
  d, f = model.d_model, model.d_ff
  kinds = layer_kinds(model, attention, ttt)
  projection = 2 * d * d if ttt.projection else 0
  per_ttt = 2 * f * d + projection + 2 * ttt.conv_width * d
  return Flops(
    projections=sum(_mixer_projections(model, attention, kind.mixer) + 6 * d * f for kind in kinds),
    attention=sum(_mixing(model, kind, tokens) for kind in kinds),
    fast_weights=float(per_ttt * sum(kind.ttt for kind in kinds)),
    head=2 * d * model.vocab_size,
  )


def _mixer_projections(model: ModelConfig, attention: AttentionConfig, mixer: str) -> int:
  d = model.d_model
  if mixer == "attention":
    return 2 * d * 2 * (model.num_heads + model.num_kv_heads) * model.head_size
  return find_mixer(mixer).projection_flops(model, attention)


def _mixing(model: ModelConfig, kind: LayerKind, tokens: int) -> float:
  """What meets other tokens: scores and weighted values, or the products with a state."""
  if kind.mixer == "attention":
    return 4 * model.num_heads * model.head_size * visible_keys(tokens, kind.window)
  return find_mixer(kind.mixer).mixing_flops(model)


def training_flops(config: Config) -> float:
  """FLOPs of one training step of a config, `6 N` per token and attention's, in all layers.

  Parameters that do not train (`train.trainable`) take no gradient: one of the three products less.
  """
  flops = token_flops(config.model, config.attention, config.ttt, config.data.seq_len)
  per_token = flops.training
  if config.train.trainable != "all":
    per_token -= flops.projections + flops.head
  return config.train.batch_size * config.data.seq_len * per_token
