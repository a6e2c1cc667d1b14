"""`ttt-jax eval perplexity`: reads documents and writes a table, JSON and a plot."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.resolve import resolve, resolve_run
from ttt_jax.checkpoints.runs import evaluated_model, with_recorded_data
from ttt_jax.config import Config
from ttt_jax.data import heldout_rows
from ttt_jax.data.load import load_data
from ttt_jax.evaluation.perplexity import (
  PerplexityConfig,
  evaluate_perplexity,
  settings,
  tokens_to_read,
)
from ttt_jax.evaluation.plots import plot_perplexity
from ttt_jax.evaluation.result_file import CELLS, ResultFile
from ttt_jax.files import write_json
from ttt_jax.generation.decoder import Reader
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.parallel.processes import is_main, on_every_process, on_main
from ttt_jax.progress import Progress


def run_perplexity(
  config: Config,
  evaluation: PerplexityConfig,
  *,
  is_run: bool,
  out: Path | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Evaluates, prints, writes `perplexity.json` and `.png`, and each result at once to `cells.jsonl`.

  The same call again resumes after the last document that was read.

  Args:
    config: the model, and the held-out documents that it reads.
    evaluation: the options of the evaluation.
    is_run: whether the model is in a run's checkpoints; otherwise it is that of `init_from`.
    out: the directory, created if missing; None for `runs/perplexity_NAME`.
    console: the output; None for that of the main process.

  Raises:
    UserError: no document is long enough; `out` holds results of other settings.
  """
  config = with_recorded_data(resolve_run(config) if is_run else resolve(config))
  out = Path("runs") / f"perplexity_{config.name}" if out is None else out
  console = Console(quiet=not is_main()) if console is None else console
  corpus = on_every_process(lambda: load_data(config))
  console.print(corpus.report(), highlight=False)
  rows = heldout_rows(
    corpus.sources,
    seq_len=evaluation.tokens,
    max_documents=evaluation.documents,
    seed=evaluation.seed,
    name="the longest of --lengths and the --block behind it",
  )
  if len(rows) < evaluation.documents:
    console.print(
      f"{len(rows)} held-out documents have {evaluation.tokens} tokens", highlight=False
    )
  model = Reader.of(evaluated_model(config, make_mesh(config.mesh), is_run=is_run), donate=True)
  results = ResultFile(out / CELLS, settings(model, rows, evaluation))
  with Progress("reading", tokens_to_read(model, len(rows), evaluation)) as progress:
    report = evaluate_perplexity(model, rows, evaluation, results, on_read=progress.advance)
  report = {"name": config.name, "layers": list(model.ttt.layers), **report}
  on_main(lambda: _write(report, out, console))
  return report


def _write(report: dict[str, Any], out: Path, console: Console) -> None:
  write_json(out / "perplexity.json", report)
  plot_perplexity(report, out / "perplexity.png")
  _print(report, console)
  console.print(f"written: {out / 'perplexity.json'}, {out / 'perplexity.png'}", highlight=False)


def _print(report: dict[str, Any], console: Console) -> None:
  table = Table()
  for title in (
    "context",
    "read with fast weights",
    "loss",
    "95 %",
    "perplexity",
    "gain over frozen",
    "95 %",
  ):
    table.add_column(title, justify="right")
  for row in report["by_context"]:
    gain = ("", "") if "gain" not in row else (f"{row['gain']:+.4f}", _interval(row, "gain_"))
    table.add_row(
      str(row["context"]),
      row["mode"],
      f"{row['loss']:.4f}",
      _interval(row, ""),
      f"{row['perplexity']:.3f}",
      *gain,
    )
  console.print(
    f"nats per token in the last {report['block']} tokens of {report['documents']} held-out documents",
    highlight=False,
  )
  console.print(table)


def _interval(row: dict[str, Any], prefix: str) -> str:
  low, high = row[f"{prefix}low"], row[f"{prefix}high"]
  return "" if low is None else f"{low:.4f} to {high:.4f}"
