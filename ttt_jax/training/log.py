"""Writes the metrics of a run to `metrics.jsonl`, TensorBoard and Weights & Biases, and traces steps."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from ttt_jax.config import Config
from ttt_jax.errors import UserError
from ttt_jax.files import write_text
from ttt_jax.parallel.processes import is_main
from ttt_jax.training.rundir import METRICS_FILE, MetricsLog


@runtime_checkable
class Writer(Protocol):
  """Writes records to one destination."""

  def write(self, record: dict[str, Any]) -> None:
    """Writes a record, which has a `step`."""

  def close(self) -> None:
    """Closes the destination; no record follows."""


class Log:
  """Writes every record to all writers; only the first process has writers."""

  def __init__(self, writers: list[Writer]):
    self._writers = writers

  def write(self, record: dict[str, Any]) -> None:
    for writer in self._writers:
      writer.write(record)


@contextmanager
def open_log(config: Config, run_dir: Path, *, resume_step: int) -> Iterator[Log]:
  """Opens the log of a run that resumes after `resume_step`.

  Raises:
    UserError: the package of a writer in `train.writers` is not installed.
  """
  with ExitStack() as stack:
    writers = []
    if is_main():
      openers = [_open_jsonl, *(_OPENERS[name] for name in config.train.writers)]
      for opener in openers:
        writers.append(opener(config, run_dir, resume_step))
        stack.callback(writers[-1].close)
    yield Log(writers)


def check_writers(config: Config) -> None:
  """Raises UserError if the package of a writer in `train.writers` is not installed."""
  for name in config.train.writers:
    _import_package(*_PACKAGES[name])


def _open_jsonl(config: Config, run_dir: Path, resume_step: int) -> Writer:
  return MetricsLog.open(run_dir / METRICS_FILE, resume_step=resume_step)


class _TensorBoard:
  def __init__(self, config: Config, run_dir: Path, resume_step: int):
    # Steps after `resume_step` are repeated: TensorBoard drops their old records.
    self._writer = _import_package(*_PACKAGES["tensorboard"]).SummaryWriter(
      str(run_dir / "tensorboard"), purge_step=resume_step + 1
    )

  def write(self, record: dict[str, Any]) -> None:
    for name, value in scalars(record).items():
      self._writer.add_scalar(name, value, record["step"])
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _Wandb:
  def __init__(self, config: Config, run_dir: Path, resume_step: int):
    # A run directory keeps one identity, so that a resumed run continues its own curves.
    file = run_dir / "wandb_id"
    wandb = _import_package(*_PACKAGES["wandb"])
    if not file.exists():
      write_text(file, wandb.util.generate_id())
    self._run = wandb.init(
      project="ttt_jax", name=config.name, id=file.read_text(), resume="allow", dir=str(run_dir)
    )

  def write(self, record: dict[str, Any]) -> None:
    self._run.log(scalars(record), step=record["step"])

  def close(self) -> None:
    self._run.finish()


_OPENERS: dict[str, Callable[[Config, Path, int], Writer]] = {
  "tensorboard": _TensorBoard,
  "wandb": _Wandb,
}


# By writer: the package that it imports, and the extra of ttt_jax that installs the package.
_PACKAGES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb", "wandb")}


def _import_package(package: str, extra: str):
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as error:
    raise UserError(
      f"train.writers names {extra!r}, which needs {package}: pip install 'ttt_jax[{extra}]'"
    ) from error


def scalars(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
  """Flattens a record to its numbers by path, such as `ttt/2/state_ratio`; None is left out."""
  flat = {}
  for name, value in record.items():
    if isinstance(value, dict):
      flat |= scalars(value, f"{prefix}{name}/")
    elif value is not None and name != "step":
      flat[prefix + name] = value
  return flat


class Profile:
  """Traces steps `first` to `last` into `run_dir/profile` (TensorBoard, Perfetto); a context manager."""

  def __init__(self, steps: tuple[int, int] | None, run_dir: Path):
    self._steps = steps
    self._path = run_dir / "profile"
    self._running = False
    self._latest = None  # the state that the last traced step returns

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *exception) -> None:
    self._stop()

  def before(self, step: int, state: Any) -> None:
    """Starts the trace if `step` is its first; called with the input state before each step."""
    if self._steps is None:
      return
    first, last = self._steps
    self._latest = None  # donated to the step
    if first <= step <= last and not self._running:
      jax.block_until_ready(state)  # else the trace would contain the end of earlier steps
      jax.profiler.start_trace(str(self._path))
      self._running = True

  def after(self, step: int, state: Any) -> None:
    """Stops the trace if `step` is its last; called with the returned state after each dispatch."""
    if self._running:
      self._latest = state
      if step >= self._steps[1]:
        self._stop()

  def _stop(self) -> None:
    if self._running:
      # When `after` is called, the step is only dispatched: wait, so that the trace contains it.
      jax.block_until_ready(self._latest)
      jax.profiler.stop_trace()
      self._running, self._latest = False, None
