"""Runs `ttt-jax ablate`: trains a grid, then prints a table and writes a picture and a JSON file."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ttt_jax.extras.ablation.grid import load_ablation
from ttt_jax.extras.ablation.picture import plot_ablation
from ttt_jax.extras.ablation.report import report
from ttt_jax.extras.ablation.runs import run_all
from ttt_jax.files import write_json


def run(
  path: str,
  overrides: Mapping[str, Any],
  *,
  device_groups: Sequence[str],
  report_only: bool,
  directory: str | None,
) -> int:
  """Does the unfinished runs and reports all; returns 1 if a run failed, else 0.

  Raises:
    UserError: as `load_ablation`, `run_all` and `report`.
  """
  console = Console()
  ablation = load_ablation(path, overrides, directory)
  failed = {}
  if not report_only:
    failed = run_all(ablation, console, device_groups=device_groups)
  results = report(ablation, failed)
  write_json(ablation.directory / "ablation.json", results)
  plot_ablation(results, ablation.directory / "ablation.png")
  _print(results, console)
  written = ", ".join(str(ablation.directory / f"ablation.{end}") for end in ("json", "png"))
  console.print(f"written: {written}", highlight=False)
  return 1 if failed else 0


def _print(results: dict[str, Any], console: Console) -> None:
  """Prints the means over the seeds, each with half of its 95 % interval."""
  reference = results["reference"]
  recalls = next(
    (row["by_distance"] for row in results["variants"] if row.get("by_distance")), None
  )
  titles, explained = ["seeds", "loss"], []
  if reference is not None:
    titles.append("difference")
    explained.append(f"difference: from {reference!r} of the same seed")
  if recalls:
    titles.append("recall")
    explained.append(f"recall: accuracy after {recalls[-1]['from']:,} tokens")
  else:
    titles += ["first", "last"]
    explained.append("first, last: loss in the first and the last part of the documents")
  titles.append("tok/s")
  table = Table(
    title=results["title"],
    title_justify="left",
    caption="; ".join(explained),
    caption_justify="left",
    box=box.SIMPLE_HEAD,
    collapse_padding=True,
    pad_edge=False,
  )
  table.add_column("variant", overflow="fold")
  for title in titles:
    table.add_column(title, justify="right", no_wrap=True)
  for row in results["variants"]:
    if not row["seeds"]:
      table.add_row(row["variant"], "0", *["-"] * (len(titles) - 1))
      continue
    if recalls:
      ends = [_share(row["by_distance"][-1]["right"])]
    else:
      ends = [_mean(row["by_position"][i]["loss"]) for i in (0, -1)]
    speed = row["tokens_per_second"]
    table.add_row(
      row["variant"],
      str(len(row["seeds"])),
      _mean(row["loss"], row["high"]),
      *([] if reference is None else [_difference(row)]),
      *ends,
      "-" if speed is None else f"{speed:,.0f}",
    )
  console.print(table)


def _mean(loss: float | None, high: float | None = None) -> str:
  if loss is None:
    return "-"
  return f"{loss:.3f}" + ("" if high is None else f" ± {high - loss:.3f}")


def _difference(row: dict[str, Any]) -> str:
  difference = row.get("difference")
  if difference is None:
    return "-"
  return ("+" if difference >= 0 else "") + _mean(difference, row["difference_high"])


def _share(right: float | None) -> str:
  return "-" if right is None else f"{right:.1%}"
