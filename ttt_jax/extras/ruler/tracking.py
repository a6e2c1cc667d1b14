"""Drafts variable tracking: a chain of assignments among noise, after a solved example."""

from itertools import pairwise
from random import Random
from string import ascii_uppercase

import numpy as np

from ttt_jax.extras.ruler.haystack import NOISE
from ttt_jax.extras.ruler.materials import Materials
from ttt_jax.extras.ruler.sample import Draft, Draw

NEW_TOKENS = 30
CONTEXT = (
  "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
  "{context}\n"
)
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above. "
ANSWER = (
  "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
  "assgined the value {value}, they are:"  # spelled as published
)

_VARIABLES = 5
_SENTENCE = NOISE + "\n"
_EXAMPLE_TOKENS = 500  # at most; an example has at least five sentences of noise
_EXAMPLE_STEP = 5


def draft(materials: Materials, draw: Draw, room: int) -> Draft:
  """Drafts a sample; a unit is a sentence of noise."""
  example = _example(materials, Draw(draw.seed, draw.task, draw.length, -1), draw("example names"))
  names, value, chain = _chain(draw("chain"), letters=5)
  question = QUESTION.format(value=value) + ANSWER.format(count=len(names), value=value)
  (tokens,) = materials.counter.parts([f" {_SENTENCE}"])
  most = max(room // tokens, _VARIABLES) + 1

  def make(n: int):
    document = _among_noise(chain, n, draw("positions"))
    return draw.sample(f"{example}\n\n{CONTEXT.format(context=document)}", question, names)

  return Draft(make, _VARIABLES + 1, np.arange(most + 1) * tokens)


def _example(materials: Materials, draw: Draw, rng: Random) -> str:
  """Makes a solved example, the same for all samples except for its names, which `rng` draws."""
  names, value, chain = _chain(draw("chain"), letters=3)
  renamed = dict(zip(names, _names(rng, len(names), letters=3)))
  chain = [" ".join(renamed.get(word, word) for word in line.split(" ")) for line in chain]
  question = QUESTION.format(value=value) + ANSWER.format(count=len(names), value=value)
  solved = question + "  " + " ".join(renamed.values()) + "\n\n"

  def text(n):
    return CONTEXT.format(context=_among_noise(chain, n, draw("positions"))) + solved

  n = _EXAMPLE_STEP
  while materials.counter.prompt(text(n + _EXAMPLE_STEP)) + NEW_TOKENS <= _EXAMPLE_TOKENS:
    n += _EXAMPLE_STEP
  return text(n)


def _chain(rng: Random, *, letters: int) -> tuple[list[str], str, list[str]]:
  """Returns variables of one value, the value, and the lines that assign them, in order."""
  names = _names(rng, _VARIABLES, letters=letters)
  value = str(rng.randint(10000, 99998))
  lines = [f"VAR {names[0]} = {value}"]
  lines += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
  return names, value, lines


def _names(rng: Random, count: int, *, letters: int) -> list[str]:
  names: list[str] = []
  while len(names) < count:
    name = "".join(rng.choices(ascii_uppercase, k=letters))
    if name not in names and name != "VAR":
      names.append(name)
  return names


def _among_noise(chain: list[str], n: int, rng: Random) -> str:
  """Puts the lines of a chain into n sentences of noise, or between their parts if n is small."""
  lines = [_SENTENCE] * n
  if n <= len(chain):
    parts = [part for line in lines for part in line.split(".")]
    lines = [part + "." if part.strip() else part for part in parts]
  for i, place in enumerate(sorted(rng.sample(range(len(lines)), len(chain)))):
    lines.insert(place + i, chain[i])
  return " ".join(lines).replace(". \n", ".\n")
