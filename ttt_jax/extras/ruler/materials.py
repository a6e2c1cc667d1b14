"""Loads and tokenises once what samples share: the text, the questions, short pieces."""

from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.extras.ruler.fit import TokenCounter
from ttt_jax.extras.ruler.haystack import NOISE, Text
from ttt_jax.extras.ruler.qa import Questions


class Materials:
  """Holds the token counter, the user's text and the files of questions.

  Args:
    haystack: the text that hides needles where RULER has essays; None for noise.
    squad, hotpot: the files of the two question tasks.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    haystack: str | None,
    squad: str | Path | None,
    hotpot: str | Path | None,
  ):
    self.counter = TokenCounter(tokenizer)
    self._haystack, self._files = haystack, {"squad": squad, "hotpot": hotpot}
    self._questions: dict[str, Questions] = {}
    self._pieces: dict[str, int] = {}
    self._numbers = np.zeros(1, np.int64)

  @cached_property
  def text(self) -> Text:
    return Text(NOISE if self._haystack is None else self._haystack, self.counter)

  def questions(self, name: str) -> Questions:
    """Returns the questions of the file `squad` or `hotpot`."""
    if name not in self._questions:
      if self._files[name] is None:
        raise UserError(
          f"ruler_qa_{name} needs a file of questions in SQuAD's or HotpotQA's format: --{name} FILE"
        )
      self._questions[name] = Questions(self._files[name], self.counter)
    return self._questions[name]

  def pieces(self, texts: list[str]) -> Int[np.ndarray, "N"]:
    """Counts the tokens of short texts, and caches the counts, since the texts recur."""
    new = [text for text in texts if text not in self._pieces]
    self._pieces.update(zip(new, self.counter.parts(new).tolist()))
    return np.array([self._pieces[text] for text in texts], np.int64)

  def number_tokens(self, last: int) -> Int[np.ndarray, "N"]:
    """Returns entry n = the tokens of " 1.", " 2." and so on to n together."""
    if len(self._numbers) <= last:
      tokens = self.counter.parts([f" {i}." for i in range(len(self._numbers), last + 1)])
      self._numbers = np.concatenate([self._numbers, self._numbers[-1] + np.cumsum(tokens)])
    return self._numbers
