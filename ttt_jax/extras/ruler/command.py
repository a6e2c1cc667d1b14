"""Runs `ttt-jax eval ruler`: reports a model's scores as a table, as JSON and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.open import open_model, open_tokenizer
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.extras.ruler.evaluate import ANSWERS, PICTURE, RESULTS, RulerConfig, evaluate_ruler
from ttt_jax.extras.ruler.tasks import TASKS
from ttt_jax.generation.decoder import Reader


def run(
  source: str,
  config: RulerConfig,
  *,
  out: Path | None,
  dtype: str | None,
  fields: Fields,
) -> int:
  """Evaluates the model of `source`, or resumes its evaluation; returns the exit status."""
  console = Console()
  name = Path(source).stem
  if out is None:
    out = Path("runs") / f"ruler_{name}{'_strict' if config.strict else ''}"
  tokenizer = open_tokenizer(source)
  config.ruler(tokenizer).sample(
    config.chosen[0], min(config.lengths), 0
  )  # a mistake shows before the model loads
  model = Reader.of(open_model(source, dtype=dtype, fields=fields), donate=True)
  if left_out := config.left_out():
    console.print(left_out)
  try:
    report = evaluate_ruler(model, tokenizer, config, out, name=name)
  except KeyboardInterrupt:
    console.print(f"stopped; the same command goes on with what is missing in {out}")
    return 130
  console.print(_table(report))
  console.print(f"written: {out / RESULTS}, {out / PICTURE}, {out / ANSWERS}/", highlight=False)
  return 0


def _table(report: dict[str, Any]) -> Table:
  """Makes a table of scores in percent with 95 % intervals, a row per task, two columns per length."""
  cells = {
    (cell["task"], str(cell["length"])): (cell["score"], cell["low"], cell["high"])
    for cell in report["cells"]
  }
  settings, averages = report["settings"], report["averages"]
  mode = ", only through the fast weights" if settings["strict"] else ""
  table = Table(title=f"RULER: {report['name']}, {settings['samples']} samples each, %{mode}")
  table.add_column("task")
  for length in averages:
    table.add_column(length, justify="right")
    table.add_column("95 %", justify="right")

  def add_row(name: str, row: Sequence[tuple], style: str | None = None) -> None:
    texts = (text for found in row for text in _percent(*found))
    table.add_row(name, *texts, style=style)

  missing = (None, None, None)
  for task in TASKS:
    row = [cells.get((task, length), missing) for length in averages]
    if any(found is not missing for found in row):
      add_row(task, row)
  intervals = report["average_intervals"]
  add_row("average", [(averages[length], *intervals[length]) for length in averages], "bold")
  return table


def _percent(score: float | None, low: float | None, high: float | None) -> tuple[str, str]:
  return (
    "" if score is None else f"{100 * score:.1f}",
    "" if low is None else f"{100 * low:.1f} to {100 * high:.1f}",
  )
