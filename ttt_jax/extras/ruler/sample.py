"""What a task asks, and how an answer is scored."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Sample:
  """A document and a question about it.

  Attributes:
    task: its name, see `TASKS`.
    length: tokens that the prompt and the answer may take.
    context: the document, with what is said in front of it.
    question: what follows it, with the words that the answer begins with.
    answers: what has to be found in the answer.
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
  """A sample whose document can have any number of units: sentences, words, or documents.

  Attributes:
    make: the sample with a document of so many units.
    least: the fewest units that make sense.
    tokens: entry n estimates the tokens of n units, each counted by itself; the last entry is that of the
      most units there are. Only differences are used.
  """

  make: Callable[[int], Sample]
  least: int
  tokens: Int[np.ndarray, "N"]

  @property
  def most(self) -> int:
    return len(self.tokens) - 1


@dataclass(frozen=True)
class Draw:
  """Where the random numbers of a sample come from: `draw(part)` is a fresh generator for one part of it.

  They depend on nothing else, so that a sample does not depend on how many are asked for, or on the units
  of its document.
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
  """The fraction of the expected strings that the answer contains, in upper or lower case."""
  answer = _cleaned(answer)
  return sum(text.lower() in answer for text in expected) / len(expected)


def string_match_part(answer: str, expected: Sequence[str]) -> float:
  """1 if the answer contains any of the expected strings, in upper or lower case, else 0.

  As RULER has it. The harness (0.4.13) has a fraction here too: 0.5 where one of two is found.
  """
  answer = _cleaned(answer)
  return float(any(text.lower() in answer for text in expected))


def _cleaned(answer: str) -> str:
  return _UNPRINTABLE.sub("\n", answer.strip()).strip().lower()
