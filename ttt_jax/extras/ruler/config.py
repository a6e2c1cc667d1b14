"""Configures which samples are made, and from which files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.extras.ruler.generate import Ruler
from ttt_jax.extras.ruler.tasks import TASKS, task_named

_QUESTIONS = {"ruler_qa_squad": "squad", "ruler_qa_hotpot": "hotpot"}


@dataclass(frozen=True)
class SamplesConfig:
  """Chooses the samples of some tasks at some lengths.

  Attributes:
    tasks: names; None for all tasks, without those that lack their file of questions.
    lengths: tokens of prompt and answer together.
    samples: the number of samples per task and length.
    haystack: a text file that hides needles where RULER takes essays; None for RULER's noise.
    squad, hotpot: files of questions, in SQuAD's or HotpotQA's format.
  """

  tasks: tuple[str, ...] | None = None
  lengths: tuple[int, ...] = (4096,)
  samples: int = 100
  haystack: Path | None = None
  squad: Path | None = None
  hotpot: Path | None = None
  seed: int = 0

  def __post_init__(self):
    for task in self.chosen:
      task_named(task)
    if self.samples < 1:
      raise UserError(f"samples={self.samples} must be at least 1")
    if not self.lengths or not self.chosen:
      raise UserError(f"tasks={self.tasks} and lengths={self.lengths}: give at least one of each")

  @property
  def chosen(self) -> tuple[str, ...]:
    """Returns the names of the tasks."""
    if self.tasks is not None:
      return tuple(dict.fromkeys(self.tasks))
    return tuple(task for task in TASKS if task not in _QUESTIONS or self._questions(task))

  @property
  def pairs(self) -> list[tuple[str, int]]:
    """Lists all pairs of task and length, short lengths first."""
    return [(task, length) for length in sorted(set(self.lengths)) for task in self.chosen]

  def left_out(self) -> str | None:
    """Says which tasks lack a file of questions; None if no task is left out."""
    missing = [task for task in TASKS if self.tasks is None and task not in self.chosen]
    return f"left out, for want of --squad or --hotpot: {', '.join(missing)}" if missing else None

  def ruler(self, tokenizer: Tokenizer) -> Ruler:
    """Makes the generator of these samples."""
    haystack = None if self.haystack is None else _text(self.haystack)
    return Ruler(tokenizer, seed=self.seed, haystack=haystack, squad=self.squad, hotpot=self.hotpot)

  def check(self, ruler: Ruler) -> None:
    """Makes the last sample of every task and length, so that errors show before hours of work.

    Raises:
      UserError: as `Ruler.sample`.
    """
    for task, length in self.pairs:
      ruler.sample(task, length, self.samples - 1)

  def haystack_digest(self) -> str:
    """Returns a digest of the haystack, or "noise"."""
    return "noise" if self.haystack is None else _digest(self.haystack)

  def questions_digest(self, task: str) -> str | None:
    """Returns a digest of the task's file of questions; None for a task without one."""
    file = self._questions(task)
    return None if file is None else _digest(file)

  def _questions(self, task: str) -> Path | None:
    return getattr(self, _QUESTIONS[task]) if task in _QUESTIONS else None


def _digest(path: Path) -> str:
  return hashlib.sha256(_load(path)).hexdigest()[:16]


def _text(path: Path) -> str:
  try:
    return _load(path).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _load(path: Path) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
