"""Draws the plots of runs and evaluations with matplotlib, from the JSON files that they write."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, whose state is the user's

# Label, colour and marker of the columns of the table by position, dark to light in the order of interest.
_CURVES = {
  "loss": ("fast weights updating", "#0b4f9e", "o"),
  "loss_updates_off": ("same model, updates off", "#d1620b", "s"),
  "loss_baseline": ("twin trained without fast weights", "#5c5c5c", "^"),
  "loss_before": ("before the first step", "#3f8f4f", "v"),
  "loss_before_updates_off": ("before the first step, updates off", "#a05fa8", "x"),
}


def subplots(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
  """Returns a figure of `width` by `height` inches, and its axes, `[rows, columns]`."""
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False)


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
  """Returns a figure of one plot, and its axes with a title and labels."""
  figure, ((axes,),) = subplots(1, 1, 7.2, 4.4)
  axes.set_title(title, loc="left", fontsize=11)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def tokens_label(length: int) -> str:
  """Returns a number of tokens or bytes as a label, in multiples of 1024 where it is one."""
  return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def plot_by_position(summary: dict[str, Any], path: Path) -> None:
  """Plots held-out loss against position in the document, one curve per column."""
  table = summary["heldout_by_position"]
  figure, axes = new_axes(
    f"Held-out loss along a document ({summary['heldout_documents']} documents, "
    f"{summary['steps']} steps)",
    "position in the document (tokens)",
    "loss (nats per token)",
  )
  middle = [(row["from"] + row["to"]) / 2 for row in table]
  for column, (label, color, marker) in _CURVES.items():
    if column == "loss" and table[0]["loss_updates_off"] is None:
      label = "model without fast weights"
    if table[0][column] is not None:
      losses = [row[column] for row in table]
      axes.plot(middle, losses, color=color, marker=marker, markersize=5, label=label)
  axes.set_xlim(0, table[-1]["to"])
  axes.legend(frameon=False)
  figure.savefig(path)


def plot_training(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
  """Plots training loss against the step, and its running mean, one colour per run."""
  figure, axes = new_axes("Training loss", "step", "loss (nats per token)")
  for (name, records), color in zip(runs.items(), ("#0b4f9e", "#5c5c5c")):
    steps = [r["step"] for r in records if r["loss"] is not None]
    losses = [r["loss"] for r in records if r["loss"] is not None]
    axes.plot(steps, losses, color=color, alpha=0.25, linewidth=1)
    smooth, mean = [], None
    for loss in losses:
      mean = loss if mean is None else 0.8 * mean + 0.2 * loss
      smooth.append(mean)
    axes.plot(steps, smooth, color=color, label=name)
  if len(runs) > 1:
    axes.legend(frameon=False)
  figure.savefig(path)


# Colour and marker of the modes in `perplexity.json`; all modes with resets share _RESET.
_MODES = {"updating": ("#0b4f9e", "o"), "frozen": ("#d1620b", "s"), "plain": ("#0b4f9e", "o")}
_RESET = ("#3f8f4f", "v")


def plot_perplexity(report: dict[str, Any], path: Path) -> None:
  """Plots the loss of the last block against its context, and by position, with intervals."""
  figure, ((left, right),) = subplots(1, 2, 11.0, 4.4)
  for mode in report["modes"]:
    color, marker = _MODES.get(mode, _RESET)
    by_context = [row for row in report["by_context"] if row["mode"] == mode]
    rows = [row[mode] for row in report["by_position"]]
    middle = [(row["from"] + row["to"]) / 2 for row in report["by_position"]]
    for axes, x, points in (
      (left, [row["context"] for row in by_context], by_context),
      (right, middle, rows),
    ):
      axes.plot(
        x, [p["loss"] for p in points], color=color, marker=marker, markersize=5, label=mode
      )
      if points[0]["low"] is not None:
        axes.fill_between(
          x, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.12
        )
  contexts = sorted({row["context"] for row in report["by_context"]})
  left.set_xscale("log", base=2)
  left.set_xticks(contexts, [f"{c:,}" for c in contexts], minor=False)
  left.set_title(f"The same last {report['block']} tokens", loc="left", fontsize=11)
  left.set_xlabel("tokens of context before them")
  right.set_title(
    f"Along the longest read ({report['documents']} documents)", loc="left", fontsize=11
  )
  right.set_xlabel("position in the document (tokens)")
  right.set_xlim(0, report["by_position"][-1]["to"])
  for axes in (left, right):
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  left.legend(frameon=False, title="fast weights" if len(report["modes"]) > 1 else None)
  figure.savefig(path)
