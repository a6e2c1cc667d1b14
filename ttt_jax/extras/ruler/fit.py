"""Fits as many units of a document as possible into a length, by tokenising few whole prompts."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.extras.ruler.sample import Draft, Sample

_MANY_TOKENS = 256  # enough to measure the error of the estimate


class TooLong(Exception):
  """Reports that even the shortest sample has too many tokens."""

  def __init__(self, tokens: int):
    super().__init__(tokens)
    self.tokens = tokens


class TooShort(Exception):
  """Reports that even the longest sample leaves room."""

  def __init__(self, tokens: int):
    super().__init__(tokens)
    self.tokens = tokens


class TokenCounter:
  """Counts the tokens of texts."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer

  def prompt(self, text: str) -> int:
    """Counts a prompt with the special tokens that the tokenizer puts around a text."""
    return self._tokenizer.count_batch([text], add_special_tokens=True)[0]

  def parts(self, texts: Sequence[str]) -> Int[np.ndarray, "N"]:
    """Counts each text by itself, as a part of a longer text, without special tokens."""
    return np.array(self._tokenizer.count_batch(texts, add_special_tokens=False), np.int64)


def fit(draft: Draft, room: int, count: Callable[[str], int]) -> Sample:
  """Returns the sample with the most units whose prompt has at most `room` tokens.

  The search counts the shortest prompt, jumps to the number of units that the draft's estimate predicts,
  and corrects it. The returned prompt has been counted, and one more unit would not fit. If units have
  other numbers of tokens together than apart, the search counts more prompts and stays correct.

  Raises:
    TooLong, TooShort: no number of units fits.
  """
  n, scale = draft.least, 1.0  # scale: counted tokens per estimated token
  fits, over, best_sample = draft.least - 1, draft.most + 1, None
  start = None
  while over - fits > 1:
    sample = draft.make(n)
    used = count(sample.prompt)
    spare = room - used
    if spare >= 0:
      fits, best_sample = n, sample
    else:
      over = n
    if start is None:
      start = (draft.tokens[n], used)
    elif draft.tokens[n] - start[0] >= _MANY_TOKENS:
      scale = max(used - start[1], 1) / (draft.tokens[n] - start[0])
    limit = draft.tokens[n] + spare / scale
    predicted = int(np.searchsorted(draft.tokens, limit, side="right")) - 1
    if predicted == n and n < draft.most:
      break
    n = min(max(predicted, fits + 1), over - 1)
  if best_sample is None:
    raise TooLong(used)
  if fits == draft.most:
    raise TooShort(used)
  return best_sample
