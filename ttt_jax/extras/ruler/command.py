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
  """Makes a table of scores in percent, a row per task and a column per length."""
  lengths = [int(length) for length in report["averages"]]
  scores = {(cell["task"], cell["length"]): cell["score"] for cell in report["cells"]}
  settings = report["settings"]
  mode = ", only through the fast weights" if settings["strict"] else ""
  table = Table(title=f"RULER: {report['name']}, {settings['samples']} samples each, %{mode}")
  table.add_column("task")
  for length in lengths:
    table.add_column(str(length), justify="right")

  def add_row(name: str, row: Sequence[float | None], style: str | None = None) -> None:
    percents = ("" if score is None else f"{100 * score:.1f}" for score in row)
    table.add_row(name, *percents, style=style)

  for task in TASKS:
    row = [scores.get((task, length)) for length in lengths]
    if any(score is not None for score in row):
      add_row(task, row)
  add_row("average", list(report["averages"].values()), "bold")
  return table
