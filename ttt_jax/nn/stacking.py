"""Divides a model's layers into stacks, which are scanned, and into repeated patterns of stacks.

`group_layers` finds the shortest program for any choice of layers; `transformer.py` builds and runs it.
"""

import itertools
from typing import NamedTuple

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig


class LayerKind(NamedTuple):
  """Identifies layers whose parameters have equal shapes and can be stacked."""

  ttt: bool
  window: int | None  # of attention, in tokens
  mixer: str = "attention"


class LayerStack(NamedTuple):
  """Describes `length` consecutive layers of one kind."""

  kind: LayerKind
  length: int


class Group(NamedTuple):
  """Describes the stacks of `pattern`, repeated `repeats` times."""

  pattern: tuple[LayerStack, ...]
  repeats: int


def layer_kinds(
  model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig
) -> tuple[LayerKind, ...]:
  """Returns the kind of each layer, from the first to the last."""
  return tuple(
    LayerKind(
      ttt=layer in ttt.layers,
      window=None if layer in attention.full_layers or mixer != "attention" else attention.window,
      mixer=mixer,
    )
    for layer, mixer in enumerate(map(attention.mixer_of, range(model.num_layers)))
  )


def group_layers(kinds: tuple[LayerKind, ...]) -> tuple[Group, ...]:
  """Divides the layers into repeated patterns of stacks, so that the program has as few stacks as possible.

  `best[j]` is the cheapest division of the first j layers: the fewest stacks, then the fewest groups. Its
  last group covers layers i to j-1 with some period p that divides j - i.
  """
  best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())]
  for j in range(1, len(kinds) + 1):
    candidates = []
    for i in range(j):
      length = j - i
      for p in (p for p in range(1, length + 1) if length % p == 0):
        period = kinds[i : i + p]
        if kinds[i:j] == period * (length // p):
          stacks, groups, division = best[i]
          pattern = tuple(
            LayerStack(kind, len(list(same))) for kind, same in itertools.groupby(period)
          )
          group = Group(pattern, length // p)
          candidates.append((stacks + len(pattern), groups + 1, (*division, group)))
          break  # a longer period of the same layers has more stacks
    best.append(min(candidates, key=lambda candidate: candidate[:2]))
  return best[-1][2]
