"""What can stand in the place of attention, by the names of `attention.mixer`.

Attention is the library's own. Any other mixer is a package that registers itself when its name is first
asked for; nothing else in the library knows what it is.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from ttt_jax.config import AttentionConfig, ModelConfig


class Mixer(NamedTuple):
  """A module that mixes the tokens of a layer, and what others must know of it.

  Attributes:
    layer: makes a module with the methods of `Attention`, from (model, attention, *, param_dtype, rngs).
    cache_dims: logical dimensions of the arrays of its cache, a NamedTuple, by their names.
    projection_flops: FLOPs of its products with parameters, per token, from (model, attention).
    mixing_flops: FLOPs of its products with other tokens or a state, per token, from (model).
  """

  layer: Callable[..., nnx.Module]
  cache_dims: dict[str, tuple[str | None, ...]]
  projection_flops: Callable[[ModelConfig, AttentionConfig], int]
  mixing_flops: Callable[[ModelConfig], float]


# Where the mixers are that `attention.mixer` knows.
_PACKAGES = {"gla": "ttt_jax.extras.baselines", "delta_net": "ttt_jax.extras.baselines"}
_REGISTERED: dict[str, Mixer] = {}


def register_mixer(name: str, mixer: Mixer) -> None:
  """Makes a mixer known by its name; its package calls this when it is imported."""
  _REGISTERED[name] = mixer


def find_mixer(name: str) -> Mixer:
  """The mixer of a name other than "attention"."""
  if name not in _REGISTERED:
    importlib.import_module(_PACKAGES[name])
  return _REGISTERED[name]


def mixer_cache_dims() -> dict[str, tuple[str | None, ...]]:
  """Logical dimensions of what mixers keep, by array name, of all whose models were made here."""
  return {name: dims for mixer in _REGISTERED.values() for name, dims in mixer.cache_dims.items()}
