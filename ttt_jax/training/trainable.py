"""Selects the parameters that train, and puts updated ones back into the model.

Only the arrays that `trained_parameters` returns have gradients and optimiser state; all other arrays are
constants of a step.
"""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax.nn.fast_mlp import LEARNED
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.trees import named_leaves

# The parameters of a TTT layer's MLP that train, by `train.trainable`.
_NAMES = {
  "ttt": ("conv", "projection", *LEARNED),
  "ttt+down": ("conv", "projection", *LEARNED, "down"),
}


def trained_parameters(model: Transformer, trainable: str) -> dict[str, Any]:
  """Returns the arrays that train by their path, such as `groups/0/1/mlp/conv/value`.

  Args:
    model: a model, also an abstract one. Layers with and without fast weights are stacked in separate
      arrays, so that an array trains as a whole or not at all.
    trainable: as `train.trainable`.
  """
  trains = _trains(model, trainable)
  return {name: leaf for name, leaf in named_leaves(model).items() if trains(name)}


def with_parameters(model: Transformer, parameters: dict[str, Any]) -> Transformer:
  """Returns the model with these arrays in place of its own, by path."""
  leaves = [parameters.get(name, leaf) for name, leaf in named_leaves(model).items()]
  return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _trains(model: Transformer, trainable: str) -> Callable[[str], bool]:
  if trainable == "all":
    return lambda name: True
  if trainable == "ttt+above":
    return _above(model)
  chosen = {
    f"groups/{g}/{p}/mlp/{name}/value"
    for g, (pattern, _) in enumerate(model.stacking)
    for p, stack in enumerate(pattern)
    for name in _NAMES[trainable]
    if stack.kind.ttt
  }
  return chosen.__contains__


def _above(model: Transformer) -> Callable[[str], bool]:
  """Returns the condition of "ttt+above": the stacks of which no layer is below the first TTT layer."""
  places = [(g, p) for g, p, _ in model.layers()]
  is_ttt = [model.stacking[g].pattern[p].kind.ttt for g, p in places]
  first = is_ttt.index(True)
  stacks = set(places[first:]) - set(places[:first])
  prefixes = (*(f"groups/{g}/{p}/" for g, p in stacks), "norm/")
  return lambda name: name.startswith(prefixes)
