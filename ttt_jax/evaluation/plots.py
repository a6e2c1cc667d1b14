"""Draws the plots of runs and evaluations with matplotlib, from the JSON files that they write."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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


def shares(table: list[dict[str, Any]]) -> list[float]:
  """Returns the recall accuracy by distance; NaN, which is not drawn, where there were no queries."""
  return [float("nan") if row["right"] is None else row["right"] for row in table]


def _axes(title: str, x: str, y: str):
  figure, ((axes,),) = subplots(1, 1, 7.2, 4.4)
  axes.set_title(title, loc="left", fontsize=11)
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  return figure, axes


def plot_by_position(summary: dict[str, Any], path: Path) -> None:
  """Plots held-out loss against position in the document, one curve per column."""
  table = summary["heldout_by_position"]
  figure, axes = _axes(
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
  figure, axes = _axes("Training loss", "step", "loss (nats per token)")
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


def plot_reach(report: dict[str, Any], path: Path) -> None:
  """Plots the bits saved in a block against the bytes of its document before it."""
  settings, rows = report["settings"], report["by_context"][1:]
  contexts = [row["context"] for row in rows]
  figure, axes = _axes(
    f"What the past of a document saves ({len(report['measured'])} documents, "
    f"{settings['compressor']})",
    "bytes of the document before the block",
    f"bits saved of {settings['block']:,} bytes, over {settings['contexts'][0]:,} bytes before",
  )
  axes.plot(contexts, [row["saved_bits"] for row in rows], color="#0b4f9e", marker="o")
  if rows[0]["low"] is not None:
    low, high = ([row[end] for row in rows] for end in ("low", "high"))
    axes.fill_between(contexts, low, high, color="#0b4f9e", alpha=0.12)
  axes.set_ylim(min(0, *axes.get_ylim()), None)
  axes.set_xscale("log", base=2)
  axes.set_xticks(contexts, [_tokens(context) for context in contexts], minor=False)
  figure.savefig(path)


def plot_recall(report: dict[str, Any], path: Path) -> None:
  """Plots recall accuracy by the distance in windows."""
  figure, axes = _axes(
    f"Recall accuracy ({report['documents']} documents)",
    f"windows of {report['window']} tokens since the key's last occurrence",
    "recall accuracy",
  )
  looks = (("#0b4f9e", "o"), ("#d1620b", "s"), ("#5c5c5c", "^"))
  for (name, table), (color, marker) in zip(report["by_distance"].items(), looks):
    names = [
      f"{row['from'] // report['window']} - "
      + ("" if row["to"] is None else f"{row['to'] // report['window']}")
      for row in table
    ]
    axes.plot(names, shares(table), color=color, marker=marker, label=name)
  axes.axhline(report["chance"], color="#9a9a9a", linestyle=":", label="chance")
  axes.set_ylim(0, 1.02)
  axes.legend(frameon=False)
  figure.savefig(path)


def plot_bench(report: dict[str, Any], path: Path) -> None:
  """Plots time and memory relative to the dense MLP, and the states sent per device, if any."""
  exchange = [record for record in report["exchange"] if "," not in record["case"]]
  panels = 3 if exchange else 2
  figure, axes = subplots(1, panels, 4.6 * panels, 4.2)
  sizes = report["config"]
  names = [record["case"] for record in report["mlp"] if record["what"] == "forward"]
  for axis, quantity in zip(axes[0], ("time", "memory")):
    for offset, what, color in ((-0.2, "forward", "#7fb0e0"), (0.2, "both passes", "#0b4f9e")):
      records = {r["case"]: r for r in report["mlp"] if r["what"] == what}
      if quantity == "time":
        values = [records[n]["median_seconds"] / records["dense"]["median_seconds"] for n in names]
      else:
        values = [records[n]["total_bytes"] / records["dense"]["total_bytes"] for n in names]
      bars = axis.barh(
        [i + offset for i in range(len(names))], values, 0.38, color=color, label=what
      )
      axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(1, color="#5c5c5c", linewidth=1)
    axis.margins(x=0.12)
  axes[0][0].set_title("time against the dense MLP", loc="left", fontsize=11)
  axes[0][0].legend(frameon=False, fontsize=9)
  axes[0][1].set_title("memory against the dense MLP", loc="left", fontsize=11)
  axes[0][1].set_yticklabels([])
  if exchange:
    axis = axes[0][2]
    sent = [record["sent_bytes"] / record["state_bytes"] for record in exchange]
    bars = axis.bar([record["case"] for record in exchange], sent, 0.6, color="#0b4f9e")
    axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_title(f"states sent per device, {sizes['shards']} devices", loc="left", fontsize=11)
    axis.tick_params(axis="x", labelsize=9)
  for axis in axes[0]:
    axis.spines[["top", "right"]].set_visible(False)
  figure.suptitle(
    f"{report['machine']['device']}: T {sizes['tokens']}, C {sizes['chunk_size']}, "
    f"D {sizes['d_model']}, F {sizes['d_ff']}, {sizes['dtype']}",
    fontsize=11,
  )
  figure.savefig(path)


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
  axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
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


def _tokens(length: int) -> str:
  return f"{length // 1024}k" if length % 1024 == 0 else str(length)


class Measure(NamedTuple):
  """Says how a measure of `compare.json` is shown: its label with the unit, and the factor of the unit."""

  label: str
  factor: int
  more_is_better: bool


MEASURES = {
  "loss": Measure("loss, nats per token", 1, False),
  "score": Measure("score, %", 100, True),
  "right": Measure("right tokens, %", 100, True),
  "nats": Measure("nats per token", 1, False),
}


def plot_compare(report: dict[str, Any], path: Path) -> None:
  """Plots the differences B - A with 95 % intervals, a panel per measure.

  A dot is filled if the interval leaves out 0: blue where B is better, orange where it is worse.
  """
  measures = list(dict.fromkeys(row["measure"] for row in report["rows"]))
  panels = [[row for row in report["rows"] if row["measure"] == name] for name in measures]
  most = max(map(len, panels))
  figure, (all_axes,) = subplots(1, len(panels), 3.0 + 4.2 * len(panels), 1.7 + 0.32 * most)
  for axes, name, rows in zip(all_axes, measures, panels):
    label, factor, more_is_better = MEASURES[name]
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


def plot_calibration(report: dict[str, Any], path: Path) -> None:
  """Plots what each setting of `calibration.json` remembers against what it costs, and the frontier."""
  none, chosen = report["without_memory"], report["chosen"]
  settings = [result for result in report["tried"] if "loss" in result]
  figure, ((alone, prose),) = subplots(1, 2, 10.4, 4.4)
  layers = sorted({result["layer"] for result in settings})
  colors = dict(zip(layers, ("#0b4f9e", "#d1620b", "#3f8f4f", "#a05fa8", "#5c5c5c"), strict=False))
  for axes, kind, title in ((alone, "facts", "facts alone"), (prose, "prose", "facts in prose")):
    points = [(r["loss"] - none["loss"], r[kind]["answers"], r["layer"]) for r in settings]
    for layer in layers:
      x, y = zip(*[(rise, right) for rise, right, of in points if of == layer], strict=True)
      axes.scatter(x, y, s=22, color=colors.get(layer, "#5c5c5c"), label=f"layer {layer}")
    frontier, best = [(0.0, none[kind]["answers"])], none[kind]["answers"]
    for rise, right, _ in sorted(points):
      if right > best:
        frontier.append((max(rise, 0.0), right))
        best = right
    axes.step(
      *zip(*frontier, strict=True), where="post", color="#5c5c5c", linewidth=1, label="frontier"
    )
    axes.axhline(none[kind]["answers"], color="#5c5c5c", linestyle=":", label="without a memory")
    axes.axvline(
      report["config"]["max_loss_rise"], color="#b02a2a", linestyle="--", label="allowed"
    )
    if chosen is not None:
      at = chosen["loss"] - none["loss"], chosen[kind]["answers"]
      axes.scatter(*at, s=90, facecolor="none", edgecolor="black", label="chosen")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_ylim(0, 1)
    axes.set_title(f"{title}, behind a cut of attention", loc="left", fontsize=11)
    axes.set_xlabel("rise of the ordinary loss (nats per token)")
    axes.set_ylabel("right answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  alone.legend(frameon=False, fontsize=8)
  figure.savefig(path)
