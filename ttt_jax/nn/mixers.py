"""Finds the mixer of tokens that replaces attention, by its name in `attention.mixer`.

A mixer other than attention is a package that registers itself when its name is first used. The rest of the
library knows only the interface `Mixer`.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from ttt_jax.config import AttentionConfig, ModelConfig


class Mixer(NamedTuple):
  """Describes a module that mixes the tokens of a layer.

  Attributes:
    layer: makes a module with the methods of `Attention`, from (model, attention, *, param_dtype, rngs).
    cache_dims: logical dimensions of the arrays of its cache, a NamedTuple, by their names.
    projection_flops: computes the FLOPs per token of products with parameters, from (model, attention).
    mixing_flops: computes the FLOPs per token of products with other tokens or a state, from (model).
  """

  layer: Callable[..., nnx.Module]
  cache_dims: dict[str, tuple[str | None, ...]]
  projection_flops: Callable[[ModelConfig, AttentionConfig], int]
  mixing_flops: Callable[[ModelConfig], float]


# The packages of the mixers that `attention.mixer` can name.
_PACKAGES = {"gla": "ttt_jax.extras.baselines", "delta_net": "ttt_jax.extras.baselines"}
_REGISTERED: dict[str, Mixer] = {}


def register_mixer(name: str, mixer: Mixer) -> None:
  """Registers a mixer under its name; its package calls this when it is imported."""
  _REGISTERED[name] = mixer


def find_mixer(name: str) -> Mixer:
  """Returns the mixer of a name other than "attention"."""
  if name not in _REGISTERED:
    importlib.import_module(_PACKAGES[name])
  return _REGISTERED[name]


def mixer_cache_dims() -> dict[str, tuple[str | None, ...]]:
  """Returns the logical dimensions of the cache arrays of all registered mixers, by array name."""
  return {name: dims for mixer in _REGISTERED.values() for name, dims in mixer.cache_dims.items()}
