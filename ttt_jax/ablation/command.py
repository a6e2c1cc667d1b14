"""`ttt-jax ablate`: all runs of a grid, then one table, one picture, one JSON file."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.ablation.grid import load_ablation
from ttt_jax.ablation.report import report
from ttt_jax.ablation.runs import run_all
from ttt_jax.plots import plot_ablation
from ttt_jax.rundir import write_json


def run(
  path: str,
  overrides: Sequence[str],
  *,
  device_groups: Sequence[str],
  report_only: bool,
  directory: str | None,
) -> int:
  """Runs what is not finished and reports; 1 if a run failed.

  Raises:
    ValueError: as `load_ablation`, `run_all` and `report`.
  """
  console = Console()
  ablation = load_ablation(path, overrides, directory)
  failed = {}
  if not report_only:
    failed = run_all(ablation, console, device_groups=device_groups)
  found = report(ablation, failed)
  write_json(ablation.directory / "ablation.json", found)
  plot_ablation(found, ablation.directory / "ablation.png")
  _print(found, console)
  written = ", ".join(str(ablation.directory / f"ablation.{end}") for end in ("json", "png"))
  console.print(f"written: {written}", highlight=False)
  return 1 if failed else 0


def _print(found: dict[str, Any], console: Console) -> None:
  table = Table(title=found["title"], title_justify="left")
  table.add_column("variant")
  titles = ["seeds", "loss", "95 %", "first part", "last part", "updates off", "tokens/s"]
  recalls = next((row["by_distance"] for row in found["variants"] if row.get("by_distance")), None)
  if recalls:
    titles.append(f"known again after {recalls[-1]['from']:,} tokens")
  for title in titles:
    table.add_column(title, justify="right")
  for row in found["variants"]:
    if not row["seeds"]:
      table.add_row(row["variant"], "0", *["-"] * (len(titles) - 1))
      continue
    first, last = row["by_position"][0]["loss"], row["by_position"][-1]["loss"]
    between = "-" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
    speed = row["tokens_per_second"]
    table.add_row(
      row["variant"],
      str(len(row["seeds"])),
      _number(row["loss"]),
      between,
      _number(first),
      _number(last),
      _number(row["loss_updates_off"]),
      "-" if speed is None else f"{speed:,.0f}",
      *([_share(row["by_distance"][-1]["right"])] if recalls else []),
    )
  console.print(table)


def _share(right: float | None) -> str:
  return "-" if right is None else f"{right:.1%}"


def _number(loss: float | None) -> str:
  return "-" if loss is None else f"{loss:.3f}"
