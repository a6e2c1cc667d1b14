"""Which parameters train, and the model's arrays by their path, split into those and the rest.

Gradients are taken and optimiser state is kept for what `trained_parameters` returns and for nothing
else: the other arrays enter a step as constants and leave it as they came.
"""

from collections.abc import Callable
from typing import Any

import jax

from ttt_jax.nn.fast_mlp import LEARNED_LOGS
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.trees import named_leaves

# Of a TTT layer's MLP, by `train.trainable`.
_NAMES = {
  "ttt": ("conv", "projection", *LEARNED_LOGS),
  "ttt+down": ("conv", "projection", *LEARNED_LOGS, "down"),
}


def trained_parameters(model: Transformer, trainable: str) -> dict[str, Any]:
  """The arrays that train, under their path as `groups/0/1/mlp/conv/value`; the model may be abstract.

  Args:
    model: any, with layers of one kind stacked: those with and without fast weights lie in arrays of
      their own.
    trainable: "all"; "ttt": convolution, projection and inner rate of the TTT layers; "ttt+down":
      also their down projections.
  """
  trains = _trains(model, trainable)
  return {name: leaf for name, leaf in named_leaves(model).items() if trains(name)}


def with_parameters(model: Transformer, parameters: dict[str, Any]) -> Transformer:
  """The model with these arrays in the places of its own."""
  leaves = [parameters.get(name, leaf) for name, leaf in named_leaves(model).items()]
  return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _trains(model: Transformer, trainable: str) -> Callable[[str], bool]:
  if trainable == "all":
    return lambda name: True
  chosen = {
    f"groups/{g}/{p}/mlp/{name}/value"
    for g, (pattern, _) in enumerate(model.stacking)
    for p, run in enumerate(pattern)
    for name in _NAMES[trainable]
    if run.kind.ttt
  }
  return chosen.__contains__
