"""`ttt-jax data reach`: measures the reach of a corpus and writes a table, JSON and a plot."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from ttt_jax.data.skipped import Skipped
from ttt_jax.evaluation.paired import bootstrap, interval, resampled_means
from ttt_jax.evaluation.plots import new_axes, tokens_label
from ttt_jax.extras.reach.measure import ReachConfig, Sample, bits, sample
from ttt_jax.files import write_json
from ttt_jax.progress import Progress

_LEVEL = 0.95
_RESAMPLES = 2000  # of a ratio


def run_reach(
  path: str | None,
  config: ReachConfig,
  *,
  out: Path | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Measures, prints a table, writes `reach.json` and `reach.png`, and returns the report.

  Args:
    path: as `data.path`.
    config: the measurement.
    out: the directory, created if missing; None writes nothing.
    console: the output.

  Raises:
    UserError: as `sample` and `bits`.
  """
  console = Console() if console is None else console
  skipped = Skipped()
  drawn = sample(path, config, skipped)
  console.print(
    f"{drawn.long:,} of {drawn.all:,} documents have {config.length:,} bytes, "
    f"{len(drawn.documents)} are measured; skipped: {skipped}",
    highlight=False,
  )
  coded = len(drawn.documents) * config.blocks * len(config.contexts)
  with Progress("coding", coded) as progress:
    measured = bits(drawn.documents, config, on_coded=lambda: progress.advance(1))
  report = {"path": path, **summary(measured, config), **_counts(drawn, skipped)}
  _print(report, console)
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "reach.json", report)
    plot_reach(report, out / "reach.png")
    console.print(f"written: {out / 'reach.json'}, {out / 'reach.png'}", highlight=False)
  return report


def summary(
  measured: Float[np.ndarray, "documents contexts"], config: ReachConfig
) -> dict[str, Any]:
  """Returns the settings, and a row per context with 95 % intervals over documents.

  saved(c) = bits(c_0) - bits(c), in bits of a block; share(c) = saved(c) / bits(c_0), and
  times(c) = saved(c) / saved(c_1), of means over documents.
  """
  saved = measured[:, :1] - measured
  table = []
  for i, context in enumerate(config.contexts):
    low, high = bootstrap(saved[:, i], seed=config.seed, level=_LEVEL)
    row = {
      "context": context,
      "bits_per_byte": measured[:, i].mean() / config.block,
      "saved_bits": saved[:, i].mean(),
      "low": low,
      "high": high,
      "share": saved[:, i].mean() / measured[:, 0].mean(),
    }
    if i > 1:
      row["times"], row["times_low"], row["times_high"] = _ratio(saved[:, i], saved[:, 1], config)
    table.append(row)
  settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
  return {"settings": settings, "by_context": table}


def _ratio(
  above: Float[np.ndarray, "documents"], below: Float[np.ndarray, "documents"], config: ReachConfig
) -> tuple[float | None, float | None, float | None]:
  """Returns the ratio of two means and its interval; None where the denominator may not be positive."""
  if below.mean() <= 0:
    return None, None, None
  ratio = float(above.mean() / below.mean())
  if len(above) < 2:
    return ratio, None, None
  rng = np.random.default_rng(config.seed)
  numerators, denominators = resampled_means(above, below, rng=rng, resamples=_RESAMPLES)
  if denominators.min() <= 0:
    return ratio, None, None
  return ratio, *interval(numerators / denominators, _LEVEL)


def _counts(drawn: Sample, skipped: Skipped) -> dict[str, Any]:
  return {
    "measured": [text.name for text in drawn.documents],
    "documents": drawn.all,
    "long_documents": drawn.long,
    "bytes": drawn.bytes,
    "skipped": skipped.counts(),
  }


def _print(report: dict[str, Any], console: Console) -> None:
  settings, rows = report["settings"], report["by_context"]
  table = Table()
  first, second = settings["contexts"][:2]
  for title in (
    "bytes before",
    "bits/byte",
    "saved bits (95 %)",
    "saved",
    f"times {second:,} (95 %)",
  ):
    table.add_column(title, justify="right")
  for i, row in enumerate(rows):
    saved = ("", "")
    if i:
      saved = (_interval(row, "saved_bits", ("low", "high"), 0), f"{row['share']:.1%}")
    times = _interval(row, "times", ("times_low", "times_high"), 2) if row.get("times") else ""
    table.add_row(f"{row['context']:,}", f"{row['bits_per_byte']:.3f}", *saved, times)
  console.print(
    f"bits of a block of {settings['block']:,} bytes after so many bytes of its document, and what they "
    f"save over {first:,} bytes ({settings['compressor']}; {len(report['measured'])} documents, "
    f"{settings['blocks']} blocks each; primer {settings['primer']:,} bytes)",
    highlight=False,
  )
  console.print(table)


def _interval(row: dict[str, Any], name: str, ends: tuple[str, str], digits: int) -> str:
  low, high = (row[end] for end in ends)
  interval = "" if low is None else f" ({low:.{digits}f} - {high:.{digits}f})"
  return f"{row[name]:.{digits}f}{interval}"


def plot_reach(report: dict[str, Any], path: Path) -> None:
  """Plots the bits saved in a block against the bytes of its document before it."""
  settings, rows = report["settings"], report["by_context"][1:]
  contexts = [row["context"] for row in rows]
  figure, axes = new_axes(
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
  axes.set_xticks(contexts, [tokens_label(context) for context in contexts], minor=False)
  figure.savefig(path)
