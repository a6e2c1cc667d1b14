"""Writes files and directories atomically, and locks them for one process at a time."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ttt_jax.errors import UserError


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
  """Yields a path to write to; when the block ends, the new file replaces `path` atomically.

  The new file is synced to disk before it is renamed. If the block fails, `path` does not change.
  """
  path = Path(path)
  unfinished = unfinished_path(path)
  try:
    yield unfinished
    with unfinished.open("rb") as file:
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def unfinished_path(path: Path) -> Path:
  """Returns the path that `atomic_file` writes to; a process killed in the block leaves this file."""
  return path.with_name(f".{path.name}.tmp")


def load_text(path: str | Path) -> str:
  """Returns the text of a UTF-8 file, without a byte order mark.

  Raises:
    UserError: the file cannot be opened, or is not UTF-8.
  """
  try:
    return Path(path).read_text(encoding="utf-8-sig")
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 text: {error}") from error


def check_new(path: str | Path) -> None:
  """Raises UserError if `path` exists and is not an empty directory."""
  path = Path(path).expanduser()
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise UserError(f"{path} exists already: nothing is written over it, give another path")


def write_text(path: str | Path, text: str) -> None:
  """Writes a text file atomically."""
  with atomic_file(path) as unfinished:
    unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | Path, data: Any) -> None:
  """Writes a JSON file atomically; NaN and infinities become null."""
  text = json.dumps(jsonable(data), indent=2, ensure_ascii=False, allow_nan=False)
  write_text(path, f"{text}\n")


def jsonable(value: Any) -> Any:
  """Converts `value` to types that JSON has; NaN and infinities become None."""
  if isinstance(value, dict):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return jsonable(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


@contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
  """Yields a directory to fill; it becomes `path` when the block ends, and is deleted if the block fails.

  Raises:
    UserError: `path` exists and is not an empty directory. Nothing has been written.
  """
  check_new(path)
  path = Path(path).expanduser()
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  unfinished.mkdir(parents=True)
  try:
    yield unfinished
    os.rename(unfinished, path)  # also replaces an empty directory
  except BaseException:
    shutil.rmtree(unfinished, ignore_errors=True)
    raise


@contextmanager
def lock(path: str | Path, *, shown: str, others: str, wait: bool = False) -> Iterator[bool]:
  """Holds a lock file during the block and yields True; yields False while another process holds it.

  The system releases the lock when the process ends, however it ends. If the file system has no locks, a
  warning says so, and the block runs unlocked.

  Args:
    path: the lock file.
    shown: the name of the guarded resource, for the warning.
    others: the processes to keep out and from what, for the warning.
    wait: whether to wait for the other process in place of yielding False.
  """
  held = FileLock(path, timeout=-1 if wait else 0)
  try:
    held.acquire()
  except Timeout:
    yield False
    return
  except (OSError, NotImplementedError) as error:  # not every file system has locks
    warnings.warn(f"{shown} cannot be locked ({error}): nothing keeps {others}", stacklevel=4)
  try:
    yield True
  finally:
    held.release()
