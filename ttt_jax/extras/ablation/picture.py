"""Draws the picture of an ablation from its report, with matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_jax.evaluation.plots import subplots
from ttt_jax.extras.recall.task import shares

# Rows of the report that have a loss, each with matplotlib's arguments for its line.
_Drawn = list[tuple[dict[str, Any], dict[str, Any]]]


def plot_ablation(report: dict[str, Any], path: Path) -> None:
  """Writes `draw_ablation` to a file."""
  draw_ablation(report).savefig(path)


def draw_ablation(report: dict[str, Any]) -> Figure:
  """Draws the held-out loss of every variant with its interval, and along a document.

  Further panels, where the report has their numbers, show the gain over the reference along a document, the
  loss after more and more context, and the recall accuracy.
  """
  rows = [row for row in report["variants"] if row.get("loss") is not None]
  colors = iter(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(rows))))
  drawn = []
  for row in rows:
    look = {"color": next(colors), "marker": "o", "markersize": 3, "label": row["variant"]}
    if row["variant"] == report["reference"]:
      look |= {"color": "#5c5c5c", "linestyle": "--"}
    drawn.append((row, look))
  panels = [_losses, _by_position]
  if any("difference" in row for row in rows):
    panels.append(_gain)
  panels += [
    panel
    for key, panel in (("by_context", _by_context), ("by_distance", _by_distance))
    if any(row.get(key) for row in rows)
  ]
  height = max(3.6, 1.4 + 0.34 * len(rows))
  figure, (places,) = subplots(1, len(panels), 2.5 + 4.5 * len(panels), height)
  for axes, panel in zip(places, panels):
    panel(axes, report, drawn)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  if rows:
    places[-1].legend(
      *places[1].get_legend_handles_labels(),
      frameon=False,
      fontsize=8,
      loc="upper left",
      bbox_to_anchor=(1, 1),
    )
  return figure


def _losses(axes: Axes, report: dict[str, Any], drawn: _Drawn) -> None:
  """Draws a dot for the mean over the seeds, ticks for the seeds, a line for the mean's interval."""
  for place, (row, look) in enumerate(drawn):
    color = look["color"]
    if row["low"] is not None:
      axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2, alpha=0.5)
    axes.plot(row["losses"], [place] * len(row["losses"]), "|", color=color, markersize=9)
    axes.plot(row["loss"], place, "o", color=color, markersize=6)
  axes.set_yticks(range(len(drawn)), [row["variant"] for row, _ in drawn])
  axes.invert_yaxis()
  axes.set_xlabel("held-out loss (nats per token)")
  # In an unfinished grid the counts differ; a variant whose loss is not finite counts without being drawn.
  counts = [len(row["seeds"]) for row in report["variants"] if row["seeds"]]
  seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
  title = f"{report['title']} ({seeds} seed{'s' if max(counts) > 1 else ''})"
  axes.set_title(title, loc="left", fontsize=11)


def _by_position(axes: Axes, report: dict[str, Any], drawn: _Drawn) -> None:
  for row, look in drawn:
    axes.plot(_middle(row), [part["loss"] for part in row["by_position"]], **look)
  axes.set_xlabel("position in the document (tokens)")
  axes.set_ylabel("loss (nats per token)")


def _gain(axes: Axes, report: dict[str, Any], drawn: _Drawn) -> None:
  """Draws the reference's loss less the variant's; the band is the interval of the pairs' mean."""
  for row, look in drawn:
    parts = row["by_position"]
    if any(part.get("difference") is None for part in parts):
      continue
    axes.plot(_middle(row), [-part["difference"] for part in parts], **look)
    if all(part["difference_low"] is not None for part in parts):
      low, high = ([-part[f"difference_{end}"] for part in parts] for end in ("high", "low"))
      axes.fill_between(_middle(row), low, high, color=look["color"], alpha=0.12, linewidth=0)
  axes.axhline(0, color="#5c5c5c", linewidth=1)
  axes.set_xlabel("position in the document (tokens)")
  axes.set_title(f"less than {report['reference']!r}, same seed", loc="left", fontsize=11)


def _by_context(axes: Axes, report: dict[str, Any], drawn: _Drawn) -> None:
  contexts = []
  for row, look in drawn:
    if row.get("by_context"):
      contexts = [part["context"] for part in row["by_context"]]
      axes.plot(contexts, [part["loss"] for part in row["by_context"]], **look)
  axes.set_xscale("log", base=2)
  axes.set_xticks(contexts, [f"{c:,}" for c in contexts], minor=False)
  axes.tick_params(axis="x", labelrotation=45)
  axes.set_xlabel("tokens read before the block")
  axes.set_title("loss of the same last block", loc="left", fontsize=11)


def _by_distance(axes: Axes, report: dict[str, Any], drawn: _Drawn) -> None:
  for row, look in drawn:
    if row.get("by_distance"):
      axes.plot([*map(_distance, row["by_distance"])], shares(row["by_distance"]), **look)
  axes.set_ylim(-0.02, 1.02)
  axes.tick_params(axis="x", labelrotation=45)
  axes.set_xlabel("tokens since the key came last")
  axes.set_title("recall accuracy", loc="left", fontsize=11)


def _middle(row: dict[str, Any]) -> list[float]:
  return [(part["from"] + part["to"]) / 2 for part in row["by_position"]]


def _distance(part: dict[str, Any]) -> str:
  return f"over {part['from']}" if part["to"] is None else f"{part['from']} - {part['to']}"
