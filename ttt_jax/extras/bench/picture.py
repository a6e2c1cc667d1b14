"""Draws the plot of `ttt-jax bench` from its JSON file."""

from pathlib import Path
from typing import Any

from ttt_jax.evaluation.plots import subplots


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
