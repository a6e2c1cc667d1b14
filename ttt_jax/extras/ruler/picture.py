"""Draws the plot of `ttt-jax eval ruler` from its JSON file."""

from pathlib import Path
from typing import Any

import numpy as np

from ttt_jax.evaluation.plots import subplots, tokens_label


def plot_ruler(report: dict[str, Any], path: Path) -> None:
  """Plots scores in percent as a heat map: a row per task and for their average, a column per length.

  The 95 % interval stands under the score, if the report has one.
  """
  lengths = [int(length) for length in report["averages"]]
  tasks = list(dict.fromkeys(cell["task"] for cell in report["cells"]))
  scores, low, high = cells = np.full((3, len(tasks) + 1, len(lengths)), np.nan)
  for cell in report["cells"]:
    found = [cell["score"], cell.get("low"), cell.get("high")]  # version 0.1.0 has no intervals
    cells[:, tasks.index(cell["task"]), lengths.index(cell["length"])] = found  # None is NaN
  scores[-1] = list(report["averages"].values())
  for column, interval in enumerate(report.get("average_intervals", {}).values()):
    cells[1:, -1, column] = interval
  cells *= 100
  figure, ((axes,),) = subplots(1, 1, 3.6 + 0.85 * len(lengths), 1.6 + 0.42 * len(scores))
  image = axes.imshow(scores, cmap="Blues", vmin=0, vmax=100, aspect="auto")
  axes.set_facecolor("0.92")  # cells without samples: not the white of a score of 0
  for (row, column), score in np.ndenumerate(scores):
    if np.isfinite(score):
      color = "white" if score > 60 else "black"
      style = {"ha": "center", "va": "center", "color": color}
      has_interval = np.isfinite(low[row, column])
      axes.text(column, row - 0.18 * has_interval, f"{score:.0f}", fontsize=9, **style)
      if has_interval:
        interval = f"{low[row, column]:.0f} - {high[row, column]:.0f}"
        axes.text(column, row + 0.24, interval, fontsize=6.5, **style)
  axes.axhline(len(tasks) - 0.5, color="white", linewidth=3)
  axes.set_xticks(range(len(lengths)), [tokens_label(length) for length in lengths])
  axes.set_yticks(range(len(scores)), [*tasks, "average"])
  axes.set_xlabel("tokens")
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  settings = report["settings"]
  note = "\nonly the fast weights carry the document" if settings["strict"] else ""
  note += "\nunder a score: its 95 % interval" if np.isfinite(low).any() else ""
  title = f"RULER: {report['name']}, {settings['samples']} samples each, %{note}"
  figure.suptitle(title, x=0.02, ha="left", fontsize=11)
  figure.colorbar(image, ax=axes, fraction=0.05, aspect=35, pad=0.02).outline.set_visible(False)
  figure.savefig(path)
