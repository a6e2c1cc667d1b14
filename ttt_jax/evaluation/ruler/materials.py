"""What samples are made of besides random numbers, read and counted once."""

from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ttt_jax.evaluation.ruler.fit import TokenCounter
from ttt_jax.evaluation.ruler.haystack import NOISE, Text
from ttt_jax.evaluation.ruler.qa import Questions
from ttt_jax.pretrained.tokenizer import Tokenizer


class Materials:
  """A tokenizer, the user's text and the files with questions.

  Args:
    haystack: the text that needles are hidden in where RULER has essays; None for noise.
    squad, hotpot: files of the two tasks that ask questions.
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
    self._words: dict[str, int] = {}
    self._numbers = np.zeros(1, np.int64)

  @cached_property
  def text(self) -> Text:
    return Text(NOISE if self._haystack is None else self._haystack, self.counter)

  def questions(self, name: str) -> Questions:
    """Of the file `squad` or `hotpot`."""
    if name not in self._questions:
      if self._files[name] is None:
        raise ValueError(
          f"ruler_qa_{name} needs a file of questions in SQuAD's or HotpotQA's format: --{name} FILE"
        )
      self._questions[name] = Questions(self._files[name], self.counter)
    return self._questions[name]

  def word_tokens(self, words: list[str]) -> Int[np.ndarray, "N"]:
    """Of words behind a blank."""
    new = [word for word in words if word not in self._words]
    self._words.update(zip(new, self.counter.parts([f" {word}" for word in new]).tolist()))
    return np.array([self._words[word] for word in words], np.int64)

  def number_tokens(self, last: int) -> Int[np.ndarray, "N"]:
    """Entry n: of " 1.", " 2." and so on to n, together."""
    if len(self._numbers) <= last:
      tokens = self.counter.parts([f" {i}." for i in range(1, 2 * last)])
      self._numbers = np.concatenate([[0], np.cumsum(tokens)])
    return self._numbers
