"""What a person sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

from ttt_jax.parallel.processes import is_main

_LINES = 20  # how many lines a whole run writes where no bar can be drawn


def _bar(console: Console) -> Progress:
  """How much is done, a `status`, and the time left; nothing where it cannot be drawn."""
  return Progress(
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[status]}"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
  )


class TrainingProgress:
  """Loss, speed and time left of a training run; None for `console`: the main process's output."""

  def __init__(self, title: str, done: int, steps: int, console: Console | None = None):
    self._console = Console(quiet=not is_main()) if console is None else console
    self._title, self._steps = title, steps
    self._every = max(1, steps // _LINES)
    self._next_line = done + 1
    self._progress = _bar(self._console)
    self._task = self._progress.add_task(title, total=steps, completed=done, status="compiling")

  def __enter__(self) -> "TrainingProgress":
    self._progress.start()
    return self

  def __exit__(self, *exception) -> None:
    self._progress.stop()

  def update(self, done: int, record: dict[str, Any]) -> None:
    """Shows the newest record."""
    speed = record["tokens_per_second"]
    status = f"loss {record['loss']:.3f}" + (f"  {speed:,.0f} tok/s" if speed else "")
    if "heldout_loss" in record:
      status += f"  held-out loss {record['heldout_loss']:.3f}"
    self._progress.update(self._task, completed=done, status=status)
    if not self._console.is_terminal and (done >= self._next_line or done == self._steps):
      self._next_line = done + self._every
      left = ""
      if speed and done < self._steps:
        tokens_per_step = record["tokens"] / done
        left = f"  {(self._steps - done) * tokens_per_step / speed:,.0f} s left"
      self._console.print(
        f"{self._title}  step {done}/{self._steps}  {status}{left}", highlight=False
      )

  def warn(self, message: str) -> None:
    self._console.print(f"[yellow]{message}[/yellow]")


class EvaluationProgress:
  """How far an evaluation is: a bar on a terminal; what is finished is a line everywhere."""

  def __init__(self, title: str, total: int):
    self._console = Console(quiet=not is_main())
    self._progress = _bar(self._console)
    self._task = self._progress.add_task(title, total=total, status="")

  def __enter__(self) -> "EvaluationProgress":
    self._progress.start()
    return self

  def __exit__(self, *exception) -> None:
    self._progress.stop()

  def update(self, done: int, status: str) -> None:
    """Shows how much is done, and what is being done."""
    self._progress.update(self._task, completed=done, status=status)

  def advance(self, more: int) -> None:
    """Shows that so much more is done."""
    self._progress.advance(self._task, more)

  def note(self, text: str) -> None:
    """A line that stays."""
    self._console.print(text, highlight=False)
