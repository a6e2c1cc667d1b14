"""`ttt-jax eval recall`: measures recall accuracy and writes a table, JSON and a plot."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.resolve import resolve, resolve_run
from ttt_jax.checkpoints.runs import BASELINE, evaluated_model, load_model, with_recorded_data
from ttt_jax.config import Config
from ttt_jax.data import heldout_rows
from ttt_jax.data.load import load_data
from ttt_jax.errors import UserError
from ttt_jax.evaluation.plots import new_axes
from ttt_jax.extras.recall.task import CHANCE, by_distance, recalled, shares
from ttt_jax.files import write_json
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.processes import is_main, on_every_process, on_main


def run_recall(
  config: Config,
  *,
  is_run: bool,
  window: int | None = None,
  out: Path | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Reads the held-out documents with updates on, with updates off, and with the twin if the run has one.

  Writes `recall.json` and `recall.png`.

  Args:
    config: the model, and the held-out documents that it reads.
    is_run: whether the model is in a run's checkpoints; otherwise it is that of `init_from`.
    window: the unit of distances, in tokens; None for `attention.window`.
    out: the directory, created if missing; None for the run's.
    console: the output; None for that of the main process.

  Raises:
    UserError: neither argument nor config has a window, tokens are not bytes, the documents are not those
      of the recall task, or there is no checkpoint.
  """
  console = Console(quiet=not is_main()) if console is None else console
  config = with_recorded_data(resolve_run(config) if is_run else resolve(config))
  window = config.attention.window if window is None else window
  if window is None:
    raise UserError(
      "attention.window=null: say with --window how many tokens distances are counted by"
    )
  if window < 1:
    raise UserError(f"--window {window} must be positive: distances are counted by so many tokens")
  if config.tokenizer is not None:
    raise UserError(
      f"data.tokenizer={config.tokenizer!r}: the recall task is written in bytes, use bytes"
    )
  mesh = make_mesh(config.mesh)
  run_dir = Path(config.resolved_run_dir)
  out = run_dir if out is None else out
  rows = heldout_rows(
    on_every_process(lambda: load_data(config)).sources,
    seq_len=config.eval_seq_len,
    max_documents=config.eval.documents,
    seed=config.seed,
  )
  model = evaluated_model(config, mesh, is_run=is_run)
  readings = {"updates on" if config.ttt.layers else "model": (model, True)}
  if config.ttt.layers:
    readings["updates off"] = (model, False)
  if config.eval.baseline:
    readings["twin"] = (load_model(config.without_ttt(), mesh, run_dir / BASELINE), True)
  tables = {
    name: by_distance(recalled(model, rows, mesh, update=update), rows, window)
    for name, (model, update) in readings.items()
  }
  report = {
    "name": config.name,
    "documents": len(rows),
    "tokens": config.eval_seq_len,
    "window": window,
    "chance": CHANCE,
    "by_distance": tables,
  }
  on_main(lambda: _write(report, out, console))
  return report


def _write(report: dict[str, Any], out: Path, console: Console) -> None:
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / "recall.json", report)
  plot_recall(report, out / "recall.png")
  _print(report, console)
  written = ", ".join(str(out / f"recall.{end}") for end in ("json", "png"))
  console.print(f"written: {written}", highlight=False)


def _print(report: dict[str, Any], console: Console) -> None:
  tables = report["by_distance"]
  table = Table()
  for title in ("tokens since the key's last occurrence", "windows", "queries", *tables):
    table.add_column(title, justify="right")
  for rows in zip(*tables.values()):
    low, high, window = rows[0]["from"], rows[0]["to"], report["window"]
    distance = f"{low} - {high}" if high is not None else f"over {low}"
    windows = f"{low // window} - {high // window}" if high is not None else f"over {low // window}"
    accuracies = ("-" if row["right"] is None else f"{row['right']:.1%}" for row in rows)
    table.add_row(distance, windows, str(rows[0]["queries"]), *accuracies)
  console.print(
    f"recall accuracy on {report['documents']} held-out documents of {report['tokens']} bytes; chance is "
    f"{report['chance']:.1%}",
    highlight=False,
  )
  console.print(table)


def plot_recall(report: dict[str, Any], path: Path) -> None:
  """Plots recall accuracy by the distance in windows."""
  figure, axes = new_axes(
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
