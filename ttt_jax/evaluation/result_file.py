"""Saves the results of a long evaluation one by one, so that the same command resumes after the last."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttt_jax.errors import UserError
from ttt_jax.files import jsonable, write_text
from ttt_jax.parallel.processes import from_main, is_main

CELLS = "cells.jsonl"  # the name of the file in an evaluation's directory


class ResultFile:
  """A file stores results by key: `settings` on the first line, then one line per result, written at once.

  Each key has at most one result. A line that a killed process left incomplete is dropped. All processes
  hold the same results; only the first one writes the file.
  """

  def __init__(self, path: str | Path, settings: dict[str, Any]):
    """Opens or creates the file; all processes call it.

    Args:
      path: the file.
      settings: everything that the results depend on.

    Raises:
      UserError: the file holds results of other settings, or something else. It is not changed.
    """
    self._path = Path(path)
    settings = jsonable(settings)
    self._results: dict[str, Any] = from_main(lambda: self._open(settings))

  def _open(self, settings: dict[str, Any]) -> dict[str, Any]:
    lines, results = _whole_lines(self._path) if self._path.exists() else [], {}
    if lines:
      recorded, results = _parse(self._path, lines)
      self._check(recorded, settings)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or [json.dumps({"settings": settings})]
    write_text(self._path, "".join(line + "\n" for line in lines))
    return results

  def _check(self, recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    if changed := different(recorded, settings):
      raise UserError(
        f"{self._path} holds results of other settings: "
        + ", ".join(f"{n} was {recorded.get(n)!r}, is {settings.get(n)!r}" for n in changed)
        + ". Give another --out, or delete it"
      )

  def __contains__(self, key: tuple) -> bool:
    return _encode(key) in self._results

  def __iter__(self) -> Iterator[tuple]:
    """Yields the keys, in the order of their results."""
    return (tuple(json.loads(name)) for name in self._results)

  def __getitem__(self, key: tuple) -> Any:
    return self._results[_encode(key)]

  def __len__(self) -> int:
    return len(self._results)

  def add(self, key: tuple, result: Any) -> None:
    """Appends a JSON-able result; NaN and infinities become null."""
    if key in self:
      raise UserError(f"{self._path} has a result for {key} already")
    result = jsonable(result)
    if is_main():
      with self._path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": list(key), "result": result}, allow_nan=False) + "\n")
    self._results[_encode(key)] = result


def load_results(path: Path) -> tuple[dict[str, Any], dict[tuple, Any]]:
  """Returns the settings and the results of a file that a `ResultFile` wrote.

  Raises:
    UserError: it is another file, or has no complete line.
  """
  settings, results = _parse(path, _whole_lines(path))
  return settings, {tuple(json.loads(key)): result for key, result in results.items()}


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
  """Returns the names of settings that differ, sorted."""
  return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _whole_lines(path: Path) -> list[str]:
  text = path.read_text(encoding="utf-8")
  return text.splitlines()[: None if text.endswith("\n") else -1]


def _parse(path: Path, lines: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
  try:
    first, *records = map(json.loads, lines)
    return first["settings"], {_encode(record["key"]): record["result"] for record in records}
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path} is no file of results: give another directory") from error


def _encode(key) -> str:
  return json.dumps(list(key))
