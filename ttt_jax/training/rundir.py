"""Manages the run directory: its config, its lock and its metrics.

A run directory belongs to one config: the same config resumes the run, and any other is refused before a
file changes. `checkpoints/orbax.py` manages the checkpoints.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ttt_jax.config import Config
from ttt_jax.config.recorded import (
  CONFIG_FILE,
  record_config,
  recorded_config,
  recorded_data_of,
  with_recorded,
)
from ttt_jax.config.yaml import config_difference, flatten
from ttt_jax.errors import UserError
from ttt_jax.files import jsonable, lock, unfinished_path, write_text

METRICS_FILE = "metrics.jsonl"
_LOCK_FILE = ".lock"
# Settings of the machine, which change no result: a resumed run may change them.
_NOT_COMPARED = ("run_dir", "runtime", "plan")
# A resumed run may also change these: its length, its mesh, how often it logs and saves, its evaluation.
MAY_CHANGE = (
  "train.steps",
  "train.log_every",
  "train.writers",
  "train.profile",
  "data.max_bad_records",
  "mesh",
  "checkpoint",
  "eval",
)


def open_run(path: str | Path, config: Config, *, may_change: tuple[str, ...] = MAY_CHANGE) -> Path:
  """Makes the directory of a new run, or opens the directory of a run to resume; returns its path.

  Args:
    path: the directory.
    config: the run's config. It is written to `config.yaml` in a new directory, and where it differs
      in `may_change` from the recorded one.
    may_change: fields and sections in which the config of a resumed run may differ.

  Raises:
    UserError: the directory is not a run directory, or belongs to another config. No file has changed.
  """
  path = Path(path)
  changed = _check_run(path, config, may_change)
  _make_directory(path)
  if changed is not None:
    record_config(path, changed)
  return path


@contextmanager
def hold_run(path: str | Path, config: Config) -> Iterator[None]:
  """Locks the run directory against other processes for the `with` block, and calls `open_run`.

  The operating system releases the lock when the process ends, however it ends. Where files cannot be
  locked, a warning says so.

  Raises:
    UserError: another process has the lock; the directory cannot be written to; as `open_run`. No file
      has changed.
  """
  path = Path(path)
  _check_run(path, config, MAY_CHANGE)
  _make_directory(path)
  try:
    tempfile.TemporaryFile(dir=path).close()
  except OSError as error:
    raise UserError(f"run_dir={str(path)!r} cannot be written to: {error.strerror}") from error
  shown = f"run_dir={str(path)!r}"
  with lock(path / _LOCK_FILE, shown=shown, others="a second process out") as is_ours:
    if not is_ours:
      raise UserError(
        f"{shown} is in use, another process trains there: wait for its end, or give another --run_dir"
      )
    open_run(path, config)
    yield


class MetricsLog:
  """Writes `metrics.jsonl`, one JSON object per line, each with its `step`; a context manager."""

  def __init__(self, path: str | Path):
    """Opens the file to append to it as it is; a resumed run uses `open`."""
    self._path = Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self._path.open("a", encoding="utf-8")

  @classmethod
  def open(cls, path: str | Path, resume_step: int) -> "MetricsLog":
    """Opens the log of a run that resumes after `resume_step`, so that it has every step once.

    Records of later steps, which will be repeated, and a line that a killed process left torn are dropped.
    """
    path = Path(path)
    if path.exists():
      text = path.read_text(encoding="utf-8", errors="replace")
      kept = [record for record in load_metrics(path) if record["step"] <= resume_step]
      lines = "".join(_line(record) for record in kept)
      if lines != text:
        write_text(path, lines)
    return cls(path)

  def __enter__(self) -> "MetricsLog":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def write(self, record: dict[str, Any]) -> None:
    """Appends a record and flushes it to the file; NaN and infinities become null."""
    self._file.write(_line(record))
    self._file.flush()

  def close(self) -> None:
    self._file.close()


def load_metrics(path: str | Path) -> list[dict[str, Any]]:
  """Loads the records of a `metrics.jsonl`, without a last line that a killed process left torn.

  Raises:
    UserError: a line before the last is no record.
  """
  path = Path(path)
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  records = []
  for number, line in enumerate(lines, start=1):
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      record = None
    if isinstance(record, dict) and isinstance(record.get("step"), int):
      records.append(record)
    elif number < len(lines):
      raise UserError(f"{path}, line {number} is not a record of metrics: {line[:80]!r}")
  return records


def _check_run(path: Path, config: Config, may_change: tuple[str, ...]) -> Config | None:
  """Refuses a directory of another config; returns the config to record, or None if it is recorded.

  In it, fields of `data` in which null means the recorded value have this value.
  """
  file = path / CONFIG_FILE
  if path.exists() and not path.is_dir():
    raise UserError(f"run_dir={str(path)!r} is a file: give another --run_dir")
  if not file.exists():
    # A run that was killed as it started leaves at most the lock and the unfinished config.
    if path.is_dir() and {p.name for p in path.iterdir()} - {
      unfinished_path(file).name,
      _LOCK_FILE,
    }:
      raise UserError(
        f"run_dir={str(path)!r} is not empty and not a run of ttt_jax (it has no {CONFIG_FILE}): "
        "give another --run_dir"
      )
    return config
  recorded = recorded_config(path)
  config = with_recorded(config, recorded_data_of(recorded))
  recorded, current = dataclasses.asdict(recorded), dataclasses.asdict(config)
  refused = config_difference(_without(recorded, may_change), _without(current, may_change))
  if refused:
    raise UserError(
      f"run_dir={str(path)!r} holds a run of another config:\n  "
      + "\n  ".join(refused)
      + f"\nto resume it use its own config, {file}; to start this one give another --run_dir"
    )
  return config if config_difference(_without(recorded, ()), _without(current, ())) else None


def _make_directory(path: Path) -> None:
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"run_dir={str(path)!r} cannot be made: {error.strerror}") from error


def _without(tree: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
  """Returns fields by dotted name, without `_NOT_COMPARED` and the fields and sections in `names`."""
  dropped = (*_NOT_COMPARED, *names)
  return {
    name: value
    for name, value in flatten(tree)
    if not any(name == drop or name.startswith(f"{drop}.") for drop in dropped)
  }


def _line(record: dict[str, Any]) -> str:
  return json.dumps(jsonable(record), allow_nan=False) + "\n"
