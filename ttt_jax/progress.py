"""Shows how far long work is: a bar on a terminal, a line now and then elsewhere."""

from typing import Any, TypeVar

from rich import progress
from rich.console import Console

from ttt_jax.parallel.processes import is_main

T = TypeVar("T")

_LINES = 20  # lines of a whole training run where no bar can be drawn


class Progress:
  """Shows a bar on a terminal inside a `with`: how much is done, a `status`, and the time left.

  Args:
    title: what is done.
    total: how much there is to do; None where that is unknown.
    console: the output; None for that of the main process.
    done: how much was done before.
    status: the first status.
  """

  def __init__(
    self,
    title: str,
    total: int | None,
    *,
    console: Console | None = None,
    done: int = 0,
    status: str = "",
  ):
    self._console = Console(quiet=not is_main()) if console is None else console
    self._progress = progress.Progress(
      progress.TextColumn("{task.description}"),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[status]}"),
      progress.TimeElapsedColumn(),
      progress.TextColumn("left"),
      progress.TimeRemainingColumn(),
      console=self._console,
      disable=not self._console.is_terminal,
    )
    self._task = self._progress.add_task(title, total=total, completed=done, status=status)

  def __enter__(self: T) -> T:
    self._progress.start()
    return self

  def __exit__(self, *exception) -> None:
    self._progress.stop()

  @property
  def draws_bar(self) -> bool:
    """Says whether there is a terminal to draw the bar on."""
    return self._console.is_terminal

  def update(self, done: int, status: str) -> None:
    """Shows the amount that is done, and a status."""
    self._progress.update(self._task, completed=done, status=status)

  def advance(self, more: int = 1) -> None:
    """Shows that `more` is done since the last call."""
    self._progress.advance(self._task, more)

  def note(self, text: str, style: str | None = None) -> None:
    """Prints a line that stays."""
    self._console.print(text, highlight=False, style=style)


class TrainingProgress(Progress):
  """Shows loss, speed and time left of a training run: a bar on a terminal, some lines elsewhere.

  Args:
    title: what is trained.
    done, steps: the steps that were done before, and those of the whole run.
    console: the output; None for that of the main process.
  """

  def __init__(self, title: str, done: int, steps: int, console: Console | None = None):
    super().__init__(title, steps, console=console, done=done, status="compiling")
    self._title, self._steps = title, steps
    self._every = max(1, steps // _LINES)
    self._next_line = done + 1

  def show(self, done: int, record: dict[str, Any]) -> None:
    """Shows the newest record."""
    speed = record["tokens_per_second"]
    status = f"loss {record['loss']:.3f}" + (f"  {speed:,.0f} tok/s" if speed else "")
    if "heldout_loss" in record:
      status += f"  held-out loss {record['heldout_loss']:.3f}"
    self.update(done, status)
    if not self.draws_bar and (done >= self._next_line or done == self._steps):
      self._next_line = done + self._every
      left = ""
      if speed and done < self._steps:
        tokens_per_step = record["tokens"] / done
        left = f"  {(self._steps - done) * tokens_per_step / speed:,.0f} s left"
      self.note(f"{self._title}  step {done}/{self._steps}  {status}{left}")
