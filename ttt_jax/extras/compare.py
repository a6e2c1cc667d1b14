"""Compares two models sample by sample, from the results that one evaluation wrote for each of them.

Texts differ more than models do, so that the difference on the same texts is known better than either mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ttt_jax.errors import UserError
from ttt_jax.evaluation.paired import paired
from ttt_jax.evaluation.plots import subplots
from ttt_jax.evaluation.result_file import CELLS, different, load_results
from ttt_jax.files import write_json

_WITHOUT_FAST_WEIGHTS = ("plain", "model")  # modes of `eval perplexity` and `eval facts`


class _Measure(NamedTuple):
  """Says how a measure of `compare.json` is shown: its label with the unit, and the factor of the unit."""

  label: str
  factor: int
  more_is_better: bool


_MEASURES = {
  "loss": _Measure("loss, nats per token", 1, False),
  "score": _Measure("score, %", 100, True),
  "right": _Measure("right tokens, %", 100, True),
  "nats": _Measure("nats per token", 1, False),
}


class _Key(NamedTuple):
  """Names what is measured: where (task and length, or context), the measure, the mode of reading."""

  where: tuple[str, ...]
  measure: str
  mode: str


_Values = dict[_Key, dict[Any, float]]  # by key, the value of every sample


def is_results(path: str | Path) -> bool:
  """Tells whether a path is a directory with the results of an evaluation."""
  return (Path(path) / CELLS).is_file()


def compare(
  a: str | Path,
  b: str | Path,
  *,
  out: Path,
  names: tuple[str, str] | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Pairs the samples of two results, prints a table, and writes `compare.json` and `compare.png`.

  A sample is a document of `eval perplexity`, a sample of `eval ruler`, a row of `eval facts`: facts of one
  row share its text, and the row's value is the mean over its facts. A model without fast weights has one
  way of reading, which is compared with all of the other model's.

  Args:
    a, b: directories with the results of `eval perplexity`, `eval ruler` or `eval facts`.
    out: a directory, created if missing.
    names: what to call the models; None for the paths of their results.
    console: the output.

  Returns:
    The content of `compare.json`: `evaluation`, `a` and `b` (name, fingerprint of the model), `settings`
    that both share, and `rows`: `name`, `where`, `measure`, `mode_a`, `mode_b`, the results of `paired`,
    and at how many samples B is `better` and `worse`.

  Raises:
    UserError: there are no such results; they differ in a setting other than the model, or in their
      samples; no result is in both.
  """
  console = Console() if console is None else console
  names = (str(a), str(b)) if names is None else names
  (settings_a, found_a), (settings_b, found_b) = (_load(Path(path)) for path in (a, b))
  _check_settings(names, settings_a, settings_b)
  evaluation = settings_a["evaluation"]
  values_a, values_b = (
    _VALUES[evaluation](found, name) for found, name in zip((found_a, found_b), names)
  )
  pairs = [(ka, kb) for ka in values_a for kb in values_b if _belong_together(ka, kb)]
  if not pairs:
    raise UserError(
      f"no result is in both: {names[0]} has {_listed(values_a)}; {names[1]} has {_listed(values_b)}. "
      "Evaluate both with the same options"
    )
  for ka, kb in pairs:
    _check_samples(names, ka, values_a[ka], values_b[kb])
  rows = [_row(ka, kb, [values_a[ka]], [values_b[kb]]) for ka, kb in pairs]
  if evaluation == "ruler":
    rows = _with_averages(rows, values_a, values_b)
  report = {
    "evaluation": evaluation,
    "a": {"name": names[0], "model": settings_a["model"]},
    "b": {"name": names[1], "model": settings_b["model"]},
    "settings": {name: x for name, x in settings_a.items() if name not in ("evaluation", "model")},
    "rows": rows,
  }
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / "compare.json", report)
  plot_compare(report, out / "compare.png")
  for name, values, of_pairs in zip(names, (values_a, values_b), zip(*pairs)):
    if only := {key: None for key in values if key not in of_pairs}:
      console.print(f"left out, since only {name} has it: {_listed(only)}", highlight=False)
  _print(report, console)
  console.print(f"written: {out / 'compare.json'}, {out / 'compare.png'}", highlight=False)
  return report


def _load(path: Path) -> tuple[dict[str, Any], dict[tuple, Any]]:
  if not is_results(path):
    raise UserError(
      f"{path} has no {CELLS}: give the directory that eval {', eval '.join(_VALUES)} wrote (--out)"
    )
  settings, found = load_results(path / CELLS)
  if settings.get("evaluation") not in _VALUES or not found:
    raise UserError(
      f"{path / CELLS} has no results of {', '.join(_VALUES)}: evaluate the model, or give another "
      "directory"
    )
  return settings, found


def _check_settings(names: tuple[str, str], a: dict[str, Any], b: dict[str, Any]) -> None:
  """Raises UserError if results differ in more than the model."""
  if changed := [name for name in different(a, b) if name != "model"]:
    texts = (f"{name} ({a.get(name)!r} and {b.get(name)!r})" for name in changed)
    raise UserError(
      f"{names[0]} and {names[1]} were not evaluated on the same samples, they differ in "
      f"{', '.join(texts)}: evaluate both with the same options, data and tokenizer"
    )


def _check_samples(names: tuple[str, str], key: _Key, a: Mapping, b: Mapping) -> None:
  """Raises UserError unless both have the same samples."""
  if a.keys() != b.keys():
    raise UserError(
      f"{' '.join(key.where)}: of {len(a)} samples of {names[0]} and {len(b)} of {names[1]}, "
      f"{len(a.keys() & b.keys())} are the same. Repeat the command of an evaluation that was stopped; "
      "evaluate both models with the same data and tokenizer"
    )


def _belong_together(a: _Key, b: _Key) -> bool:
  one_way = a.mode in _WITHOUT_FAST_WEIGHTS or b.mode in _WITHOUT_FAST_WEIGHTS
  return a[:2] == b[:2] and (a.mode == b.mode or one_way)


def _of_perplexity(found: Mapping[tuple, Any], name: str) -> _Values:
  values: _Values = {}
  for (mode, context, document), result in found.items():
    key = _Key((f"{context} tokens before",), "loss", mode)
    values.setdefault(key, {})[document] = result["block"]
  return values


def _of_ruler(found: Mapping[tuple, Any], name: str) -> _Values:
  values: _Values = {}
  for task, length, asked in sorted(found, key=lambda key: key[1]):
    cell = found[task, length, asked]
    if "scores" not in cell:
      raise UserError(
        f"{name}: the results of {task} at {length} tokens are of version 0.1.0, which kept no scores of "
        "samples: evaluate again with another --out"
      )
    key = _Key((task, str(length)), "score", "")
    values[key] = {(cell["samples"], i): score for i, score in enumerate(cell["scores"])}
  return values


def _of_facts(found: Mapping[tuple, Any], name: str) -> _Values:
  return {
    _Key((place,), measure, reading): {
      i: np.mean([np.mean(np.array(fact[measure], float)) for fact in facts])
      for i, facts in enumerate(rows)
    }
    for measure in ("right", "nats")
    for (reading, place), rows in found.items()
  }


# The results of an evaluation by sample, from its file; the last argument names them in errors.
_VALUES = {"perplexity": _of_perplexity, "ruler": _of_ruler, "facts": _of_facts}


def _row(
  a: _Key, b: _Key, of_a: list[dict[Any, float]], of_b: list[dict[Any, float]]
) -> dict[str, Any]:
  """Compares one measure; a list has the samples of each group."""
  result = paired(
    [np.array(list(group.values()), float) for group in of_a],
    [np.array([of[sample] for sample in group], float) for group, of in zip(of_a, of_b)],
  )
  higher, lower = result.pop("higher"), result.pop("lower")
  better, worse = (higher, lower) if _MEASURES[a.measure].more_is_better else (lower, higher)
  modes = " / ".join(dict.fromkeys((a.mode, b.mode)))
  return {
    "name": " ".join(a.where) + (f", {modes}" if modes else ""),
    "where": list(a.where),
    "measure": a.measure,
    "mode_a": a.mode,
    "mode_b": b.mode,
    **result,
    "better": better,
    "worse": worse,
  }


def _with_averages(rows: list[dict[str, Any]], a: _Values, b: _Values) -> list[dict[str, Any]]:
  """Adds a row behind the tasks of each length: their average, over the samples of each task."""
  made = []
  for length in dict.fromkeys(row["where"][1] for row in rows):
    tasks = [row for row in rows if row["where"][1] == length]
    keys = [_Key(tuple(row["where"]), "score", "") for row in tasks]
    made += tasks
    if len(tasks) > 1:
      average = _Key(("average", length), "score", "")
      made.append(_row(average, average, [a[key] for key in keys], [b[key] for key in keys]))
  return made


def _listed(values: Mapping[_Key, Any]) -> str:
  return ", ".join(dict.fromkeys(" ".join((*key.where, key.mode)).strip() for key in values))


def _print(report: dict[str, Any], console: Console) -> None:
  for letter in "ab":
    console.print(f"{letter.upper()}: {report[letter]['name']}", highlight=False)
  for name in dict.fromkeys(row["measure"] for row in report["rows"]):
    console.print(_table(name, [row for row in report["rows"] if row["measure"] == name]))


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
  label, factor, more_is_better = _MEASURES[name]
  digits = ".1f" if factor == 100 else ".4f"
  title = f"{label}: {'more' if more_is_better else 'less'} is better; p by the sign test"
  table = Table(title=title, box=SIMPLE)
  table.add_column("")  # wraps where the terminal is narrow, numbers do not
  for title in ("A", "B", "B - A", "95 %", "better / worse", "p"):
    table.add_column(title, justify="right", no_wrap=title != "better / worse")

  def text(value: float, sign: str = "+") -> str:
    return f"{factor * value:{sign}{digits}}"

  for row in rows:
    table.add_row(
      row["name"],
      text(row["a"], ""),
      text(row["b"], ""),
      text(row["difference"]),
      "" if row["low"] is None else f"{text(row['low'])} to {text(row['high'])}",
      f"{row['better']} / {row['worse']} of {row['samples']}",
      f"{row['p']:.2g}",
    )
  return table


def plot_compare(report: dict[str, Any], path: Path) -> None:
  """Plots the differences B - A with 95 % intervals, a panel per measure.

  A dot is filled if the interval leaves out 0: blue where B is better, orange where it is worse.
  """
  measures = list(dict.fromkeys(row["measure"] for row in report["rows"]))
  panels = [[row for row in report["rows"] if row["measure"] == name] for name in measures]
  most = max(map(len, panels))
  figure, (all_axes,) = subplots(1, len(panels), 3.0 + 4.2 * len(panels), 1.7 + 0.32 * most)
  for axes, name, rows in zip(all_axes, measures, panels):
    label, factor, more_is_better = _MEASURES[name]
    axes.axvline(0, color="#5c5c5c", linewidth=1)
    for y, row in enumerate(rows):
      low, high = row["low"], row["high"]
      clear = low is not None and (low > 0 or high < 0)
      better = (row["difference"] > 0) == more_is_better
      color = "#5c5c5c" if not clear else "#0b4f9e" if better else "#d1620b"
      if low is not None:
        axes.plot([factor * low, factor * high], [y, y], color=color, linewidth=2)
      dot = {"marker": "o", "markersize": 6, "markerfacecolor": color if clear else "white"}
      axes.plot([factor * row["difference"]], [y], color=color, **dot)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{label}: B - A ({'more' if more_is_better else 'less'} is better)")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  title = f"A: {report['a']['name']}\nB: {report['b']['name']}"
  figure.suptitle(title, x=0.02, ha="left", fontsize=10)
  figure.savefig(path)
