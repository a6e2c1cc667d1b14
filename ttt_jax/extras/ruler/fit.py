"""As many units of a document as fit: a search that counts the tokens of few whole prompts."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.extras.ruler.sample import Draft, Sample

_MANY_TOKENS = 256  # enough to see how far the estimate is off


class TooLong(Exception):
  """Even the shortest sample has more tokens than there is room for."""

  def __init__(self, tokens: int):
    super().__init__(tokens)
    self.tokens = tokens


class TooShort(Exception):
  """Even the longest sample leaves room for more."""

  def __init__(self, tokens: int):
    super().__init__(tokens)
    self.tokens = tokens


class TokenCounter:
  """How many tokens texts are."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer

  def prompt(self, text: str) -> int:
    """As the model reads it: with the special tokens that its tokenizer puts around a text."""
    return self._tokenizer.count_batch([text], add_special_tokens=True)[0]

  def parts(self, texts: Sequence[str]) -> Int[np.ndarray, "N"]:
    """Of each text as a part of a longer one, counted by itself."""
    return np.array(self._tokenizer.count_batch(texts, add_special_tokens=False), np.int64)


def fit(draft: Draft, room: int, count: Callable[[str], int]) -> Sample:
  """The sample with the most units whose prompt has at most `room` tokens.

  Counts the shortest prompt, goes to the length that the draft's estimate predicts, and corrects it: the
  prompt returned has been counted, and what is left over is less than the next unit takes. Units whose
  tokens together are more or fewer than those of each by itself make it count more often, not wrongly.

  Raises:
    TooLong, TooShort: there is no such sample.
  """
  n, scale = draft.least, 1.0
  fits, over, kept = draft.least - 1, draft.most + 1, None
  start = None
  while over - fits > 1:
    sample = draft.make(n)
    used = count(sample.prompt)
    spare = room - used
    if spare >= 0:
      fits, kept = n, sample
    else:
      over = n
    if start is None:
      start = (draft.tokens[n], used)
    elif draft.tokens[n] - start[0] >= _MANY_TOKENS:
      scale = max(used - start[1], 1) / (draft.tokens[n] - start[0])
    reach = draft.tokens[n] + spare / scale
    best = int(np.searchsorted(draft.tokens, reach, side="right")) - 1
    if best == n and n < draft.most:
      break
    n = min(max(best, fits + 1), over - 1)
  if kept is None:
    raise TooLong(used)
  if fits == draft.most:
    raise TooShort(used)
  return kept
