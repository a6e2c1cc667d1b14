"""Makes samples of any task and length, for any tokenizer."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.extras.ruler.fit import TooLong, TooShort, fit
from ttt_jax.extras.ruler.materials import Materials
from ttt_jax.extras.ruler.sample import Draw, Sample
from ttt_jax.extras.ruler.tasks import Task, task_named

_MORE_UNITS = (1, 2, 8)  # times the estimated number of units, until they suffice


class Ruler:
  """Makes samples whose prompt and answer have a given length in tokens, or a little less.

  The tokens of the prompt and those reserved for the answer never exceed the length, and one more unit of
  the document would exceed it. A unit is a word of the text, a sentence of the noise, a needle, a word with
  its repetitions, or a paragraph. (The harness goes in steps of 5 to 500 units.)

  Args:
    tokenizer: the model's tokenizer; its special tokens count.
    seed: sample i of a task and length depends on the seed only.
    haystack: a text that hides needles where RULER takes essays, repeated if it is too short; None for
      RULER's noise sentences.
    squad, hotpot: files of questions, in SQuAD's or HotpotQA's format, for `ruler_qa_squad` and
      `ruler_qa_hotpot`.

  Example:
      ruler = Ruler(ttt_jax.load_tokenizer("models/smollm2"))
      sample = ruler.sample("niah_single_1", 4096, 0)
      print(sample.prompt[-200:], sample.answers)
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    haystack: str | None = None,
    squad: str | Path | None = None,
    hotpot: str | Path | None = None,
  ):
    self.seed = seed
    self._materials = Materials(tokenizer, haystack=haystack, squad=squad, hotpot=hotpot)

  def sample(self, task: str, length: int, index: int) -> Sample:
    """Makes a sample by its number, from 0 on.

    Raises:
      UserError: the task is unknown, the length is too small (the message has the smallest) or more than
        the file of questions can fill, a file is missing or damaged, or `wonderwords` is not installed.
    """
    try:
      return self._fit(task, length, index)
    except TooLong as error:
      smallest = self._smallest(task, error.tokens, index)
      raise UserError(
        f"{task} does not fit a length of {length} tokens: sample {index} takes {smallest} at least"
      ) from None
    except TooShort as error:
      raise UserError(
        f"{task} cannot reach a length of {length} tokens: all there is for sample {index} has "
        f"{error.tokens} with this tokenizer"
      ) from None

  def samples(self, task: str, length: int, count: int) -> Iterator[Sample]:
    """Yields the first `count` samples, which all cores make a few at a time."""
    if not count:
      return
    yield self.sample(task, length, 0)  # alone: it counts tokens that all samples share
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
      for start in range(1, count, workers):
        indices = range(start, min(start + workers, count))
        yield from pool.map(lambda i: self.sample(task, length, i), indices)

  def _fit(self, task: str, length: int, index: int) -> Sample:
    chosen = task_named(task)
    room = length - chosen.new_tokens
    draw = Draw(self.seed, task, length, index)
    for times in _MORE_UNITS[:-1]:
      try:
        return self._cut(chosen, draw, room, times * max(room, 0))
      except TooShort:
        pass
    return self._cut(chosen, draw, room, _MORE_UNITS[-1] * max(room, 0))

  def _cut(self, task: Task, draw: Draw, room: int, units_for: int) -> Sample:
    draft = task.draft(self._materials, draw, units_for)
    return fit(draft, room, self._materials.counter.prompt)

  def _smallest(self, task: str, tokens: int, index: int) -> int:
    """Returns a length that the shortest sample fits; the draw of the sample depends on the length."""
    new_tokens = task_named(task).new_tokens
    while True:
      try:
        self._fit(task, tokens + new_tokens, index)
      except TooLong as error:
        tokens = max(error.tokens, tokens + 1)
      else:
        return tokens + new_tokens
