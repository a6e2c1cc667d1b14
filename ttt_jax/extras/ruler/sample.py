"""Defines samples, drafts of samples, their random numbers, and the scores of answers."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Sample:
  """Holds a document and a question about it.

  Attributes:
    task: the name of the task, one of `TASKS`.
    length: the largest number of tokens of prompt and answer together.
    context: the document after its instruction.
    question: the question, followed by the first words of the answer.
    answers: the strings that the answer has to contain.
  """

  task: str
  length: int
  context: str
  question: str
  answers: tuple[str, ...]

  @property
  def prompt(self) -> str:
    return self.context + self.question


@dataclass(frozen=True)
class Draft:
  """Makes a sample with any number of units (sentences, words, or documents) in its document.

  Attributes:
    make: returns the sample with so many units.
    least: the fewest units that make sense.
    tokens: entry n estimates the tokens of n units, each counted by itself, up to the most units that
      exist. Only differences are used.
  """

  make: Callable[[int], Sample]
  least: int
  tokens: Int[np.ndarray, "N"]

  @property
  def most(self) -> int:
    return len(self.tokens) - 1


@dataclass(frozen=True)
class Draw:
  """Makes the random numbers of a sample: `draw(part)` is a fresh generator for one part of the sample.

  The numbers depend on these fields only, not on how many samples are made or how many units fit.
  """

  seed: int
  task: str
  length: int
  index: int

  def __call__(self, part: str) -> random.Random:
    return random.Random(f"{self.seed} {self.task} {self.length} {self.index} {part}")

  def sample(self, context: str, question: str, answers: Sequence[str]) -> Sample:
    return Sample(self.task, self.length, context, question, tuple(answers))


def string_match_all(answer: str, expected: Sequence[str]) -> float:
  """Returns the fraction of the expected strings that the answer contains, case ignored."""
  answer = _cleaned(answer)
  return sum(text.lower() in answer for text in expected) / len(expected)


def string_match_part(answer: str, expected: Sequence[str]) -> float:
  """Returns 1 if the answer contains any of the expected strings, case ignored, else 0.

  RULER defines it so. The harness (0.4.13) has a fraction here too: 0.5 where it finds one of two.
  """
  answer = _cleaned(answer)
  return float(any(text.lower() in answer for text in expected))


def _cleaned(answer: str) -> str:
  return _UNPRINTABLE.sub("\n", answer.strip()).strip().lower()
