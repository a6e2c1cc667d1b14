"""Hides needles between the sentences of a text: the published noise, or the user's text."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from ttt_jax.errors import UserError
from ttt_jax.extras.ruler.fit import TokenCounter

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SENTENCE_END = re.compile(r"""[.!?]["')\]\u201d\u2019]*$""")


class Text:
  """Holds the words of a text, repeated if it is too short, and where its sentences begin.

  A sentence ends with a word that ends with a full stop, an exclamation mark or a question mark, before any
  quotes and brackets. (The harness uses `nltk`, which downloads a model.)
  """

  def __init__(self, text: str, counter: TokenCounter):
    self._words = text.split()
    if not self._words:
      raise UserError("the haystack is empty: give a text with words in it")
    ends = [i + 1 for i, word in enumerate(self._words) if _SENTENCE_END.search(word)]
    if not ends or ends[-1] != len(self._words):
      ends.append(len(self._words))
    self._starts = [0, *ends[:-1]]
    vocabulary = sorted(set(self._words))
    tokens = dict(zip(vocabulary, counter.parts([f" {word}" for word in vocabulary]).tolist()))
    self._tokens = np.array([tokens[word] for word in self._words], np.int64)

  def tokens(self, room: int) -> Int[np.ndarray, "N"]:
    """Returns entry n = the tokens of the first n words, until they exceed `room`."""
    repeats = 1 + room // max(int(self._tokens.sum()), 1)
    return np.cumsum(np.concatenate([[0], np.tile(self._tokens, repeats), self._tokens[:1]]))

  def with_needles(self, words: int, needles: Sequence[str], depths: Sequence[int]) -> str:
    """Returns the first words with needles between sentences, at depths in percent of the sentences."""
    repeats = -(-words // len(self._words))
    text = (self._words * repeats)[:words]
    starts = [r * len(self._words) + start for r in range(repeats) for start in self._starts]
    starts = [*starts[: bisect_left(starts, words)], words]
    sentences = len(starts) - 1
    cuts = [0, *sorted(int(sentences * (depth / 100)) for depth in depths), sentences]
    pieces = []
    for i, (begin, end) in enumerate(pairwise(cuts)):
      pieces.append(" ".join(text[starts[begin] : starts[end]]))
      pieces.extend(needles[i : i + 1])
    return " ".join(pieces)
