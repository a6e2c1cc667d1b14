"""Saves the results of a long evaluation one by one, so that the same command resumes after the last."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttt_jax.errors import UserError
from ttt_jax.files import jsonable, write_text
from ttt_jax.parallel.processes import from_main, is_main


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
    lines, results = [], {}
    if self._path.exists():
      text = self._path.read_text(encoding="utf-8")
      lines = text.splitlines()[: None if text.endswith("\n") else -1]
    if lines:
      results = self._parse(lines, settings)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or [json.dumps({"settings": settings})]
    write_text(self._path, "".join(line + "\n" for line in lines))
    return results

  def _parse(self, lines: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    try:
      first, *records = map(json.loads, lines)
      recorded = first["settings"]
      results = {_encode(record["key"]): record["result"] for record in records}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise UserError(f"{self._path} is no file of results: give another --out") from error
    names = sorted(recorded.keys() | settings.keys())
    changed = [name for name in names if recorded.get(name) != settings.get(name)]
    if changed:
      raise UserError(
        f"{self._path} holds results of other settings: "
        + ", ".join(f"{n} was {recorded.get(n)!r}, is {settings.get(n)!r}" for n in changed)
        + ". Give another --out, or delete it"
      )
    return results

  def __contains__(self, key: tuple) -> bool:
    return _encode(key) in self._results

  def __iter__(self) -> Iterator[tuple]:
    """The keys, in the order of their results."""
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


def _encode(key) -> str:
  return json.dumps(list(key))
