"""Counts the FLOPs of a model from its config; MFU is measured against them.

Only products count, two FLOPs for a multiplication and an addition, and only products that the model asks
for: nothing that remat recomputes, and no masked half of a causal attention.
"""

from typing import NamedTuple

from ttt_jax.config import AttentionConfig, Config, ModelConfig, TTTConfig
from ttt_jax.nn.mixers import find_mixer
from ttt_jax.nn.stacking import LayerKind, layer_kinds


class Flops(NamedTuple):
  """Holds the FLOPs of one token of a row, on average."""

  projections: float  # of attention (or its replacement) and MLPs
  attention: float  # scores and weighted values; in linear attention the products with its state
  fast_weights: float  # of TTT layers, without their gated MLP
  head: float

  @property
  def forward(self) -> float:
    return sum(self)

  @property
  def training(self) -> float:
    """Counts both passes: each product has two products of the same FLOPs in its backward pass."""
    return 3 * self.forward


def visible_keys(tokens: int, window: int | None) -> float:
  """Counts the keys that a token sees on average in a row of T tokens.

  The number is `(T+1)/2`, or with a window of w `w - w(w-1)/(2T)`.
  """
  w = tokens if window is None else min(window, tokens)
  return w - w * (w - 1) / (2 * tokens)


def token_flops(
  model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig, tokens: int
) -> Flops:
  """Counts the FLOPs per token of one forward pass over rows of `tokens` tokens, each a single document.

  With widths D, F, V, H query and G key heads of size K, for every layer

      projections   2 D (2 H K + 2 G K) + 2 * 3 D F
      attention     4 H K s            s: keys that a token sees (`visible_keys`)
      fast weight   2 F D (update Z^T V) + 2 D^2 (projection of the target) + 2 w D (its convolution)

      least squares F^3 / 3 C (factor A) + 2 F^2 (solve) + 2 F D (read) + 2 F (F + D) (K^T [K | V]), and the
                    target as above, in place of the fast weight's; with `ttt.key_rank` R in place of F,
                    and 2 F R (projection of the keys)

  The fast weight counts in TTT layers only; the head has `2 D V`. In layers with linear attention, with G
  heads, keys of width K and values of width M as in `ttt_jax.extras.baselines`, the first two terms are

      gla           2 D (2 G K + 3 G M) + 2 r (D + G K) + 6 D F      4 G K M (k^T v, q S)
      delta_net     2 D (2 G K + 2 G M) + 2 D G + 6 D F              6 G K M (k S, k^T u, q S)

  where r is the rank of the decay's projection. Both add 2 c (2 G K + G M) for a short convolution of c
  tokens (`attention.short_conv`; 4 in DeltaNet by default). These are the products of the recurrence token
  by token. Reading `Z (W + S)` counts as the MLP's own product; an implementation that reads W and S in two
  products, or computes a recurrence in chunks with more products, does not raise these numbers.
  """
  d, f = model.d_model, model.d_ff
  kinds = layer_kinds(model, attention, ttt)
  projection = 2 * d * d if ttt.projection else 0
  update = 2 * f * d
  if ttt.rule == "least_squares":
    r = f if ttt.key_rank is None else ttt.key_rank
    project = 0 if ttt.key_rank is None else 2 * f * r
    update = project + r**3 / 3 / ttt.chunk_size + 2 * r * r + 2 * r * d + 2 * r * (r + d)
  per_ttt = update + projection + 2 * ttt.conv_width * d
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
  """Counts the products among tokens: scores and weighted values, or products with a state."""
  if kind.mixer == "attention":
    return 4 * model.num_heads * model.head_size * visible_keys(tokens, kind.window)
  return find_mixer(kind.mixer).mixing_flops(model)


def training_flops(config: Config) -> float:
  """Counts the FLOPs of one training step: `6 N` per token for N parameters, and attention's.

  Parameters that do not train (`train.trainable`) take no gradient, which saves one of three products.
  """
  flops = token_flops(config.model, config.attention, config.ttt, config.data.seq_len)
  per_token = flops.training
  if config.train.trainable != "all":
    per_token -= flops.projections + flops.head
  return config.train.batch_size * config.data.seq_len * per_token
