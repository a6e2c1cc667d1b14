"""A whole run: corpus, mesh, training, its twin, evaluation, and what they leave in the run directory."""

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from ttt_jax.config import Config
from ttt_jax.data import VOCAB_SIZE, Corpus, load_corpus
from ttt_jax.distributed import is_main, on_main, together
from ttt_jax.errors import UserError
from ttt_jax.evaluate import evaluate
from ttt_jax.initial import initial_model, resolve
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.plots import plot_by_position, plot_training
from ttt_jax.pretrained.tokenizer import load_tokenizer
from ttt_jax.restore import load_model
from ttt_jax.rundir import METRICS_FILE, hold_run, open_run, read_metrics, write_json
from ttt_jax.sharding import make_mesh
from ttt_jax.train import model_summary, train

BASELINE = "baseline"  # the twin's directory inside the run's


def run_training(config: Config, console: Console | None = None) -> dict[str, Any] | None:
  """Trains the model of a config (and its twin), evaluates, draws; returns the summary.

  The same call again goes on from the last checkpoint. Returns None if it was interrupted.

  Raises:
    ValueError: the run directory is another config's, or another process trains there; as `resolve`,
      `make_mesh`, `load_data` and `train`.
  """
  console = Console(quiet=not is_main()) if console is None else console
  config = resolve(config)
  mesh = make_mesh(config.mesh)
  corpus = together(lambda: load_data(config))
  run_dir = Path(config.resolved_run_dir)
  with ExitStack() as held:
    on_main(lambda: held.enter_context(hold_run(run_dir, config)))
    return _train_and_report(config, corpus, mesh, run_dir, console)


def _train_and_report(config, corpus, mesh, run_dir, console) -> dict[str, Any] | None:
  console.print(corpus.report(), highlight=False)
  console.print(f"{_devices(mesh)}; run directory {run_dir}", highlight=False)

  result = train(config, corpus, mesh, run_dir, console=console)
  baseline = None
  if result.finished and config.eval.baseline:
    plain, where = config.without_ttt(), run_dir / BASELINE
    twin = train(plain, corpus, mesh, where, title="twin without TTT", console=console)
    result = result if twin.finished else twin
    baseline = twin.state.model
  if not result.finished:
    console.print(
      f"stopped after step {int(result.state.step)}, saved: the same command goes on from there"
    )
    return None
  return _evaluate_and_report(config, result.state.model, baseline, corpus, mesh, run_dir, console)


def run_evaluation(
  config: Config, *, is_run: bool = True, console: Console | None = None
) -> dict[str, Any]:
  """Evaluates a model again, with the config's `eval` section.

  Args:
    is_run: the newest checkpoint of a run, and its twin's; else the model of `init_from` as it is, in a
      run directory of its own.

  Raises:
    ValueError: there is no run or no checkpoint there, or it is another model's; the run directory is
      another run's; as `load_pretrained`.
  """
  console = Console(quiet=not is_main()) if console is None else console
  config = resolve(config)
  mesh = make_mesh(config.mesh)
  run_dir = Path(config.resolved_run_dir)
  corpus = together(lambda: load_data(config))
  model, baseline = evaluated_model(config, mesh, is_run=is_run), None
  if is_run and config.eval.baseline:
    baseline = load_model(config.without_ttt(), mesh, run_dir / BASELINE)
  if not is_run:
    on_main(lambda: open_run(run_dir, config))
  console.print(corpus.report(), highlight=False)
  return _evaluate_and_report(config, model, baseline, corpus, mesh, run_dir, console)


def evaluated_model(config: Config, mesh: Mesh, *, is_run: bool) -> Transformer:
  """The model of a run's newest checkpoint, or the pretrained one of a resolved config as it is."""
  if is_run:
    return load_model(config, mesh, Path(config.resolved_run_dir))
  return initial_model(config, mesh)


def load_data(config: Config) -> Corpus:
  """The documents of a resolved config, in the tokens that its model reads.

  Raises:
    ValueError: the model has not as many tokens as the tokenizer; as `load_tokenizer` and
      `load_corpus`.
  """
  tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
  tokens = VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
  if tokens > config.model.vocab_size:
    raise UserError(
      f"model.vocab_size={config.model.vocab_size} is less than the {tokens} tokens of "
      f"{config.tokenizer or 'bytes'}: "
      + (
        f"set model.vocab_size={tokens}"
        if config.init_from is None
        else f"data.tokenizer is not that of init_from={config.init_from!r}"
      )
    )
  return load_corpus(config.data, seed=config.seed, tokenizer=tokenizer)


def _evaluate_and_report(config, model, baseline, corpus, mesh, run_dir, console) -> dict[str, Any]:
  console.print("evaluating on held-out documents ...")
  runs = {}
  if (run_dir / METRICS_FILE).exists():  # else nothing was trained: a pretrained model as it is
    name = "with fast weights" if config.ttt.layers else "model"
    runs[name] = read_metrics(run_dir / METRICS_FILE)
  if baseline is not None:
    runs["twin without"] = read_metrics(run_dir / BASELINE / METRICS_FILE)
  before = initial_model(config, mesh) if config.eval.before else None
  records = next(iter(runs.values()), [])
  summary = {
    "name": config.name,
    "steps": records[-1]["step"] if records else 0,
    "params": count_parameters(model),
    "params_baseline": None if baseline is None else count_parameters(baseline),
    "devices": mesh.size,
    "processes": jax.process_count(),
    "device_kind": mesh.devices.flat[0].device_kind,
    "mesh": dict(mesh.shape),
    "jax_version": jax.__version__,
    "tokens": records[-1]["tokens"] if records else 0,
    "tokens_per_second": _speed(records),
    "tokens_per_second_baseline": _speed(runs["twin without"]) if baseline is not None else None,
    "skipped": corpus.skipped.counts(),
    **evaluate(config, model, baseline, before, corpus, mesh),
  }
  on_main(lambda: _write_summary(config, model, summary, runs, run_dir, console))
  return summary


def _write_summary(config, model, summary, runs, run_dir, console) -> None:
  write_json(run_dir / "summary.json", summary)
  plot_by_position(summary, run_dir / "loss_by_position.png")
  if runs:
    plot_training(runs, run_dir / "training_loss.png")
  _print_summary(config, model, summary, run_dir, console)


def _speed(records: list[dict[str, Any]]) -> float | None:
  """The median over the logged intervals."""
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
