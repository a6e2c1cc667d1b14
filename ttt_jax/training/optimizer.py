"""Makes AdamW with warm-up, cosine decay and gradient clipping, from optax."""

from typing import Any

import jax
import optax

from ttt_jax.config import TrainConfig
from ttt_jax.nn.fast_mlp import LEARNED

# Weight decay leaves these out: 0 is not their neutral value (scales, convolutions, inner rates,
# half-lives), or they are biases.
_BIASES = ("query_bias", "key_bias", "value_bias", "out_bias", "decay_bias")
_NO_DECAY = ("scale", "conv", "short_conv", *LEARNED, *_BIASES)


def learning_rate(config: TrainConfig) -> optax.Schedule:
  """Rises linearly from 0 over `warmup_steps`, then falls as a cosine to `final_lr_ratio` at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=config.steps,
    end_value=config.learning_rate * config.final_lr_ratio,
  )


def decays(params: Any) -> Any:
  """Returns a pytree like `params` of booleans, by the parameters' paths: whether weight decay applies."""

  def applies(path, _):
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return not any(name in _NO_DECAY for name in names)

  return jax.tree_util.tree_map_with_path(applies, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  limit = config.clip_grad_norm
  return optax.chain(
    optax.identity() if limit is None else optax.clip_by_global_norm(limit),
    optax.adamw(
      learning_rate(config),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=decays,
    ),
  )
