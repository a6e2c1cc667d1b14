"""Shows the progress of training and evaluation: a bar on a terminal, a line now and then elsewhere."""

from typing import Any, TypeVar

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

T = TypeVar("T")

_LINES = 20  # lines of a whole training run where no bar can be drawn


class _Display:
  """Shows a bar on a terminal inside a `with`: how much is done, a `status`, and the time left."""

  def __init__(self, title: str, total: int, *, console: Console, done: int = 0, status: str = ""):
    self._console = console
    self._progress = Progress(
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
    self._task = self._progress.add_task(title, total=total, completed=done, status=status)

  def __enter__(self: T) -> T:
    self._progress.start()
    return self

  def __exit__(self, *exception) -> None:
    self._progress.stop()


class TrainingProgress(_Display):
  """Shows loss, speed and time left of a training run: a bar on a terminal, some lines elsewhere.

  Args:
    title: what is trained.
    done, steps: the steps that were done before, and those of the whole run.
    console: the output; None for that of the main process.
  """

  def __init__(self, title: str, done: int, steps: int, console: Console | None = None):
    console = Console(quiet=not is_main()) if console is None else console
    super().__init__(title, steps, console=console, done=done, status="compiling")
    self._title, self._steps = title, steps
    self._every = max(1, steps // _LINES)
    self._next_line = done + 1

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


class EvaluationProgress(_Display):
  """Shows how far an evaluation is: a bar on a terminal, and everywhere a line for what is finished."""

  def __init__(self, title: str, total: int):
    super().__init__(title, total, console=Console(quiet=not is_main()))

  def update(self, done: int, status: str) -> None:
    """Shows the amount that is done, and a status."""
    self._progress.update(self._task, completed=done, status=status)

  def advance(self, more: int) -> None:
    """Shows that `more` is done since the last call."""
    self._progress.advance(self._task, more)

  def note(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, highlight=False)
