"""Does a whole run: loads the corpus, trains a model and its twin, evaluates both, and reports."""

import statistics
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.resolve import initial_model, resolve, resolve_run
from ttt_jax.checkpoints.runs import (
  BASELINE,
  abstract_model,
  evaluated_model,
  load_model,
  with_recorded_data,
)
from ttt_jax.config import Config
from ttt_jax.data import Corpus
from ttt_jax.data.load import load_data
from ttt_jax.errors import UserError
from ttt_jax.evaluation.heldout import check_evaluation, evaluate, evaluation_rows
from ttt_jax.evaluation.plots import plot_by_position, plot_training
from ttt_jax.files import write_json
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.parallel.mesh import make_mesh, row_shards
from ttt_jax.parallel.processes import is_main, on_every_process, on_main
from ttt_jax.parallel.trees import delete
from ttt_jax.training.log import check_writers
from ttt_jax.training.loop import model_summary, train
from ttt_jax.training.rundir import METRICS_FILE, hold_run, load_metrics, open_run


def run_training(config: Config, console: Console | None = None) -> dict[str, Any] | None:
  """Trains the model of a config (and its twin), evaluates, and draws the plots; returns the summary.

  The same call resumes from the last checkpoint. Returns None if it was interrupted.

  Raises:
    UserError: the run directory belongs to another config, or another process trains in it; as
      `resolve`, `make_mesh`, `load_data` and `train`.
  """
  console = Console(quiet=not is_main()) if console is None else console
  config = with_recorded_data(resolve(config))
  mesh = make_mesh(config.mesh)
  corpus = on_every_process(lambda: load_data(config))
  rows = on_every_process(lambda: check_ready(config, corpus, mesh))
  run_dir = Path(config.resolved_run_dir)
  with ExitStack() as held:
    on_main(lambda: held.enter_context(hold_run(run_dir, config)))
    return _train_and_report(config, corpus, mesh, run_dir, rows, console)


def check_ready(config: Config, corpus: Corpus, mesh: Mesh) -> Int32[np.ndarray, "B T"]:
  """Checks before the first step what the evaluation after the last needs; returns `evaluation_rows`.

  No file has been written yet.

  Raises:
    UserError, UnsupportedError: no held-out document is long enough; this mesh cannot evaluate documents
      of that length; `train.profile` ends after the last step; the package of a writer is not installed.
  """
  if is_main():
    check_writers(config)
    blocks = config.data.attend_blocks
    if blocks is not None and not config.ttt.layers:
      warnings.warn(
        f"data.attend.block={list(blocks.block)}, but ttt.layers=[]: without fast weights "
        "nothing is carried over a cut",
        stacklevel=2,
      )
  profile = config.train.profile
  if profile is not None and profile[1] > config.train.steps:
    raise UserError(
      f"train.profile={list(profile)} ends after the last step, train.steps={config.train.steps}: choose "
      "earlier steps, or null"
    )
  _check_memory(config, mesh, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))
  rows = evaluation_rows(config, corpus)
  check_evaluation(config, mesh)
  if config.eval.baseline:
    check_evaluation(config.without_ttt(), mesh)
  return rows


def _check_memory(config: Config, mesh: Mesh, limit: int | None) -> None:
  """Raises UserError if the sums of least squares alone are more than `limit` bytes, a device's memory.

  A row's layer holds A and its factor, `[R, R]`, and D; layers are read one after another.
  """
  ttt = config.ttt
  if limit is None or not ttt.layers or ttt.rule != "least_squares":
    return
  r = config.model.d_ff if ttt.key_rank is None else ttt.key_rank
  rows = config.train.batch_size // config.train.accumulate // row_shards(mesh)
  needed = rows * r * (2 * r + config.model.d_model) * 4
  if needed > limit:
    raise UserError(
      f"the sums of ttt.rule='least_squares' take {needed / 2**30:.1f} GiB for {rows} rows with keys of "
      f"{r} dimensions, and a device has {limit / 2**30:.1f} GiB: give a smaller ttt.key_rank, fewer rows "
      "(train.batch_size, train.accumulate) or more devices"
    )


def _train_and_report(config, corpus, mesh, run_dir, rows, console) -> dict[str, Any] | None:
  console.print(corpus.report(), highlight=False)
  console.print(f"{_devices(mesh)}; run directory {run_dir}", highlight=False)

  twin = config.eval.baseline
  shown = {"heldout": rows, "console": console}
  finished, step, model = _train(config, corpus, mesh, run_dir, keep_model=not twin, **shown)
  baseline = None
  if finished and twin:
    # The twin trains alone in memory; then the models are loaded from their checkpoints, one at a time.
    plain, plain_dir = config.without_ttt(), run_dir / BASELINE
    shown["title"] = "twin without TTT"
    finished, step, _ = _train(plain, corpus, mesh, plain_dir, keep_model=False, **shown)
    model = partial(load_model, config, mesh, run_dir)
    baseline = partial(load_model, plain, mesh, plain_dir)
  if not finished:
    console.print(f"stopped after step {step}, saved: the same command goes on from there")
    return None
  return _evaluate_and_report(config, model, baseline, corpus, mesh, run_dir, rows, console)


def _train(*args, keep_model: bool, **kwargs) -> tuple[bool, int, Callable[[], Transformer] | None]:
  """Calls `train`; returns whether it finished, its last step, and a function that hands over its model.

  All other arrays of the state are deleted, since a run that just fits leaves no memory for the evaluation.
  """
  result = train(*args, **kwargs)
  finished, step, state = result.finished, int(result.state.step), result.state
  delete(state._replace(model=None) if keep_model else state)
  return finished, step, _handed_over(state.model) if keep_model else None


def _handed_over(model: Transformer) -> Callable[[], Transformer]:
  """Makes a function that returns the model once and then keeps no reference to it."""
  return [model].pop


def run_evaluation(
  config: Config, *, is_run: bool = True, console: Console | None = None
) -> dict[str, Any]:
  """Evaluates a model again, with the config's `eval` section.

  Args:
    is_run: evaluate the newest checkpoint of a run, and its twin's; else the model of `init_from` as it
      is, in a new run directory.

  Raises:
    UserError: there is no run or no checkpoint, or the checkpoint is another model's; the run directory
      belongs to another run; as `load_pretrained`.
  """
  console = Console(quiet=not is_main()) if console is None else console
  config = with_recorded_data(resolve_run(config) if is_run else resolve(config))
  mesh = make_mesh(config.mesh)
  run_dir = Path(config.resolved_run_dir)
  corpus = on_every_process(lambda: load_data(config))
  rows = on_every_process(lambda: evaluation_rows(config, corpus))
  model, baseline = _handed_over(evaluated_model(config, mesh, is_run=is_run)), None
  if is_run and config.eval.baseline:
    baseline = partial(load_model, config.without_ttt(), mesh, run_dir / BASELINE)
  if not is_run:
    on_main(lambda: open_run(run_dir, config))
  console.print(corpus.report(), highlight=False)
  return _evaluate_and_report(config, model, baseline, corpus, mesh, run_dir, rows, console)


def _evaluate_and_report(
  config, model, baseline, corpus, mesh, run_dir, rows, console
) -> dict[str, Any]:
  """Evaluates, writes and prints; `model` and `baseline` are functions that return the models."""
  console.print("evaluating on held-out documents ...")
  runs = {}
  if (
    run_dir / METRICS_FILE
  ).exists():  # a pretrained model that was not trained here has no metrics
    name = "with fast weights" if config.ttt.layers else "model"
    runs[name] = load_metrics(run_dir / METRICS_FILE)
  if baseline is not None:
    runs["twin without"] = load_metrics(run_dir / BASELINE / METRICS_FILE)
  before = partial(initial_model, config, mesh) if config.eval.before else None
  shapes = abstract_model(config, mesh)
  records = next(iter(runs.values()), [])
  summary = {
    "name": config.name,
    "steps": records[-1]["step"] if records else 0,
    "params": count_parameters(shapes),
    "params_baseline": None
    if baseline is None
    else count_parameters(abstract_model(config.without_ttt(), mesh)),
    "devices": mesh.size,
    "processes": jax.process_count(),
    "device_kind": mesh.devices.flat[0].device_kind,
    "mesh": dict(mesh.shape),
    "jax_version": jax.__version__,
    "tokens": records[-1]["tokens"] if records else 0,
    "tokens_per_second": _speed(records),
    "tokens_per_second_baseline": _speed(runs["twin without"]) if baseline is not None else None,
    "skipped": corpus.skipped.counts(),
    **evaluate(config, model, baseline, before, corpus, mesh, rows=rows),
  }
  on_main(lambda: _write_summary(config, shapes, summary, runs, run_dir, console))
  return summary


def _write_summary(config, model, summary, runs, run_dir, console) -> None:
  write_json(run_dir / "summary.json", summary)
  plot_by_position(summary, run_dir / "loss_by_position.png")
  if runs:
    plot_training(runs, run_dir / "training_loss.png")
  _print_summary(config, model, summary, run_dir, console)


def _speed(records: list[dict[str, Any]]) -> float | None:
  """Returns the median of the tokens per second over the logged intervals."""
  speeds = [r["tokens_per_second"] for r in records if r["tokens_per_second"]]
  return statistics.median(speeds) if speeds else None


def _devices(mesh: Mesh) -> str:
  kind = mesh.devices.flat[0].device_kind
  axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
  return f"{mesh.size} {kind} device{'s' if mesh.size > 1 else ''}" + (f" ({axes})" if axes else "")


def _print_summary(config, model, summary, run_dir, console) -> None:
  table = Table()
  columns = {
    "loss_before": "before",
    "loss_before_updates_off": "before, updates off",
    "loss": "updates on" if config.ttt.layers else "loss",
    "loss_updates_off": "updates off",
    "loss_baseline": "twin",
  }
  columns = {k: v for k, v in columns.items() if summary["heldout_by_position"][0][k] is not None}
  table.add_column("position", justify="right")
  for title in columns.values():
    table.add_column(title, justify="right")
  for row in summary["heldout_by_position"]:
    table.add_row(f"{row['from']} - {row['to']}", *(f"{row[k]:.3f}" for k in columns))
  overall = {"loss": "heldout_loss", **{k: f"heldout_{k}" for k in columns if k != "loss"}}
  table.add_row("all", *(f"{summary[overall[k]]:.3f}" for k in columns), style="bold")
  console.print(model_summary(config, model), highlight=False)
  documents = f"{summary['heldout_documents']} documents of {summary['heldout_seq_len']} tokens"
  console.print(f"held-out loss by position in nats per token, {documents}", highlight=False)
  console.print(table)
  if summary["sample"] is not None:
    console.rule("a held-out document, continued by the model", align="left")
    console.print(
      summary["sample"]["prompt"][-200:], style="dim", markup=False, highlight=False, end=""
    )
    console.print(summary["sample"]["continuation"], style="bold", markup=False, highlight=False)
    console.rule()
  names = ("summary.json", "loss_by_position.png", "training_loss.png", METRICS_FILE)
  written = [str(run_dir / name) for name in names if (run_dir / name).exists()]
  console.print("written: " + ", ".join(written), highlight=False)
