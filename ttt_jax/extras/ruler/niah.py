"""Drafts eight needle tasks: values of keys, hidden in noise, in a text, or among other needles."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from uuid import UUID

import numpy as np
from jaxtyping import Int

from ttt_jax.extras.ruler.haystack import NOISE
from ttt_jax.extras.ruler.materials import Materials
from ttt_jax.extras.ruler.sample import Draft, Draw, Sample
from ttt_jax.extras.ruler.words import compounds

CONTEXT = (
  "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
  "I will quiz you about the {values} afterwards.\n{context}\n"
)
QUESTION = (
  "What are all the special magic {values} for {query} mentioned in the provided text? "
  "The special magic {values} for {query} mentioned in the provided text are"
)
ONE_CONTEXT = CONTEXT.replace("Some", "A").replace("are", "is")
ONE_QUESTION = QUESTION.replace("are all", "is").replace("are", "is")
NEEDLE = "One of the special magic {values} for {key} is: {value}."

_DEPTHS = [round(100 * i / 39) for i in range(40)]  # in percent
_BLOCK = 256  # needles that are drawn and counted at once


@dataclass(frozen=True)
class Needles:
  """Configures a needle task.

  Attributes:
    haystack: "repeat" (noise), "essay" (the user's text, else noise), or "needle" (other needles).
    keys, values: "words", "numbers" or "uuids".
    num_keys, num_values, num_queries: keys in the document, values of each key, and keys asked for.
  """

  haystack: str
  keys: str = "words"
  values: str = "numbers"
  num_keys: int = 1
  num_values: int = 1
  num_queries: int = 1

  def draft(self, materials: Materials, draw: Draw, room: int) -> Draft:
    """Draws needles and hides them in a document."""
    rng = draw("needles")
    keys: list[str] = []
    while len(keys) < self.num_keys:
      key = _RANDOM[self.keys](rng)
      if key not in keys:
        keys.append(key)
    values = {key: [_RANDOM[self.values](rng) for _ in range(self.num_values)] for key in keys}
    needles = [self._needle(key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    queries = rng.sample(keys, self.num_queries)
    hide = {"essay": self._in_text, "repeat": self._in_noise, "needle": self._among_needles}
    document, least, tokens = hide[self.haystack](materials, draw, room, keys, needles)

    def make(n: int) -> Sample:
      return self._sample(draw, document(n), queries, [v for key in queries for v in values[key]])

    return Draft(make, least, tokens)

  def _sample(self, draw, document, queries, answers) -> Sample:
    one = len(answers) == 1
    values = self.values[:-1] if one else self.values
    context, question = (ONE_CONTEXT, ONE_QUESTION) if one else (CONTEXT, QUESTION)
    return draw.sample(
      context.format(values=values, context=document),
      question.format(values=values, query=_enumerated(queries)),
      answers,
    )

  def _needle(self, key: str, value: str) -> str:
    return NEEDLE.format(values=self.values, key=key, value=value)

  def _in_text(self, materials, draw, room, keys, needles):
    text = materials.text
    depths = draw("positions").sample(_DEPTHS, len(needles))
    return lambda n: text.with_needles(n, needles, depths), 1, text.tokens(room)

  def _in_noise(self, materials, draw, room, keys, needles):
    (tokens,) = materials.counter.parts([NOISE + "\n"])
    most = max(room // tokens, len(needles)) + 1

    def document(n):
      return _with_lines([NOISE] * n, needles, draw)

    return document, len(needles), np.arange(most + 1) * tokens

  def _among_needles(self, materials, draw, room, keys, needles):
    rng, lines, tokens = draw("haystack"), [], [np.zeros(1, np.int64)]
    while sum(int(t.sum()) for t in tokens) <= room or len(lines) <= len(needles):
      drawn = [_RANDOM[self.keys](rng) for _ in range(_BLOCK)]
      drawn = [key for key in drawn if key not in keys]  # such a key would have two answers
      block = [self._needle(key, _RANDOM[self.values](rng)) for key in drawn]
      if self.keys != "words":
        tokens.append(materials.counter.parts([line + "\n" for line in block]))
      else:
        key_tokens = _key_tokens(materials, drawn)
        if not lines:  # without its key, each line has nearly the same number of tokens
          line_tokens = materials.counter.parts([line + "\n" for line in block])
          rest = round(float(np.mean(line_tokens - key_tokens)))
        tokens.append(key_tokens + rest)
      lines.extend(block)

    def document(n):
      return _with_lines(lines[:n], needles, draw)

    return document, len(needles), np.cumsum(np.concatenate(tokens))


def _key_tokens(materials: Materials, keys: list[str]) -> Int[np.ndarray, "N"]:
  """Counts the tokens of `adjective-noun` keys as the sum of both halves, each counted once."""
  halves = [key.partition("-") for key in keys]
  first = materials.pieces([f" {adjective}" for adjective, *_ in halves])
  return first + materials.pieces([f"-{noun}" for *_, noun in halves])


def _with_lines(lines: list[str], needles: list[str], draw: Draw) -> str:
  places = sorted(draw("positions").sample(range(len(lines)), len(needles)), reverse=True)
  for place, needle in zip(places, needles):
    lines.insert(place, needle)
  return "\n".join(lines)


def _enumerated(queries: list[str]) -> str:
  if len(queries) == 1:
    return queries[0]
  return ", ".join(queries[:-1]) + ", and " + queries[-1]


def _number(rng: Random) -> str:
  return str(rng.randint(10**6, 10**7 - 1))


def _word(rng: Random) -> str:
  adjectives, nouns = compounds()
  return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"


def _uuid(rng: Random) -> str:
  return str(UUID(int=rng.getrandbits(128), version=4))


_RANDOM: dict[str, Callable[[Random], str]] = {"numbers": _number, "words": _word, "uuids": _uuid}
