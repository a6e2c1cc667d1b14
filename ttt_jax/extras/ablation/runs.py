"""Does the runs of an ablation, each in its own process, several at once on separate devices."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console

from ttt_jax.config import Config
from ttt_jax.config.recorded import CONFIG_FILE
from ttt_jax.extras.ablation.grid import Ablation, Variant
from ttt_jax.files import jsonable, lock
from ttt_jax.training.rundir import open_run

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "TPU_VISIBLE_DEVICES")
# The reports of the evaluations after training, in the run directory.
_PROBE = Path("probe", "perplexity.json")
_RECALL = Path("recall", "recall.json")
# The runs of a grid share their compiled programs: runs of one variant differ in their seed alone.
_COMPILED = "JAX_COMPILATION_CACHE_DIR"
_WORTH_KEEPING = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
_LAST_LINES = 5  # that are shown of a failed run's log
_ELSEWHERE = "another ttt-jax ablate is at this run"


def run_all(
  ablation: Ablation, console: Console, *, device_groups: Sequence[str] = ()
) -> dict[tuple[str, int], str]:
  """Trains and evaluates every unfinished run; returns the last lines of the logs of failed runs.

  An interrupted run resumes from its last checkpoint. A run that fails, because it diverges for instance,
  is reported, and the others continue. Runs share their compiled programs, in JAX_COMPILATION_CACHE_DIR
  or, where the environment does not set it, until the last run ends. Several calls may share a grid: a
  call waits for the runs of other calls after it has done all others.

  Args:
    device_groups: devices by number, such as `("0,1", "2,3")`, with one run at a time on each group; if
      empty, one run at a time on all devices.

  Raises:
    UserError: a run's directory holds something else, or the documents do not suffice for the grid's
      evaluations. No run has started.
  """
  runs, todo = list(ablation.runs()), []
  for variant, config in runs:
    open_run(config.resolved_run_dir, config, may_change=())
    if not finished(ablation, config):
      todo.append((variant, config))
  if ablation.probe is not None or ablation.recall is not None:
    from ttt_jax.extras.ablation.check import check_questions  # with the data readers

    check_questions(ablation, [(v, config) for v, config in todo if not _is_trained(config)])
  done, total = len(runs) - len(todo), len(runs)
  console.print(f"{ablation.name}: {total} runs, {done} of them finished", highlight=False)
  groups: SimpleQueue[str | None] = SimpleQueue()
  for group in device_groups or (None,):
    groups.put(group)
  started, ended = time.monotonic(), 0
  failed = {}

  def print_end(variant: Variant, config: Config, error: str | None) -> None:
    if error is None:
      loss = load_summary(config)["heldout_loss"]
      status = f"held-out loss {loss:.3f}" if loss is not None else "held-out loss not finite"
    else:
      failed[variant.name, config.seed] = error
      status = f"failed: {error.splitlines()[-1]} (see {_log(config)})"
    seconds_left = (time.monotonic() - started) / ended * (len(todo) - ended)
    console.print(
      f"{done + ended}/{total}  {variant.name}, seed {config.seed}: {status}"
      + (f"  {seconds_left:,.0f} s left" if seconds_left else ""),
      highlight=False,
    )

  with (
    tempfile.TemporaryDirectory(prefix="ttt_jax-compiled-", ignore_cleanup_errors=True) as compiled,
    ThreadPoolExecutor(max(1, len(device_groups))) as pool,
  ):
    environment = _WORTH_KEEPING | {_COMPILED: compiled} | os.environ
    results = pool.map(lambda run: _run(ablation, run[1], groups, environment), todo)
    elsewhere = []
    for (variant, config), error in zip(todo, results):
      if error is _ELSEWHERE:
        elsewhere.append((variant, config))
      else:
        ended += 1
        print_end(variant, config, error)
    results = pool.map(
      lambda run: _run(ablation, run[1], groups, environment, wait=True), elsewhere
    )
    for (variant, config), error in zip(elsewhere, results):
      ended += 1
      print_end(variant, config, error)
  return failed


def finished(ablation: Ablation, config: Config) -> bool:
  """Says whether a run is trained and has all evaluations of the ablation."""
  return not _missing_commands(ablation, config)


def load_summary(config: Config) -> dict[str, Any]:
  """Loads the `summary.json` of a finished run."""
  return _load(config, Path("summary.json"))


def load_probe(config: Config) -> dict[str, Any]:
  """Loads the `perplexity.json` of a finished run of an ablation with a probe."""
  return _load(config, _PROBE)


def load_recall(config: Config) -> dict[str, Any]:
  """Loads the `recall.json` of a finished run of an ablation with `recall`."""
  return _load(config, _RECALL)


def _load(config: Config, report: Path) -> dict[str, Any]:
  return json.loads((Path(config.resolved_run_dir) / report).read_text(encoding="utf-8"))


def _missing_commands(ablation: Ablation, config: Config) -> list[list[str]]:
  """Lists the `ttt-jax` commands that a run still needs, each as its words."""
  directory = Path(config.resolved_run_dir)
  commands = []
  if not _is_trained(config):
    commands.append(["train", str(directory / CONFIG_FILE)])  # written by `open_run`
  if ablation.probe is not None:
    probe = dataclasses.asdict(ablation.probe)
    if not _answers(config, _PROBE, asked=probe):
      words = ["eval", "perplexity", str(directory), "--out", str(directory / _PROBE.parent)]
      for name, value in probe.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if numbers:
          words += [f"--{name.replace('_', '-')}", *map(str, numbers)]
      commands.append(words)
  if ablation.recall is not None and not _answers(config, _RECALL, window=ablation.recall):
    words = ["--window", str(ablation.recall), "--out", str(directory / _RECALL.parent)]
    commands.append(["eval", "recall", str(directory), *words])
  return commands


def _is_trained(config: Config) -> bool:
  """Says whether the run has a summary of its last step; `ttt-jax eval` writes one of any checkpoint."""
  if not (Path(config.resolved_run_dir) / "summary.json").is_file():
    return False
  return load_summary(config).get("steps", config.train.steps) == config.train.steps


def _answers(config: Config, report: Path, **question: Any) -> bool:
  """Says whether the run has this report, with these settings."""
  if not (Path(config.resolved_run_dir) / report).is_file():
    return False
  loaded = _load(config, report)
  return {name: loaded.get(name) for name in question} == jsonable(question)


def _log(config: Config) -> Path:
  return Path(config.resolved_run_dir).with_suffix(".log")


def _run(
  ablation: Ablation,
  config: Config,
  groups: SimpleQueue,
  environment: dict[str, str],
  *,
  wait: bool = False,
) -> str | None:
  """Does a run in its own processes; returns None, or the last lines of its log if it failed.

  While another `ttt-jax ablate` does this run, the call waits for it, or returns `_ELSEWHERE`.
  """
  group = groups.get()
  status = 0
  try:
    if group is not None:
      environment = environment | dict.fromkeys(_VISIBLE, group)
    path = Path(config.resolved_run_dir)
    others = "a second ttt-jax ablate from this run"
    held = lock(path.with_suffix(".lock"), shown=str(path), others=others, wait=wait)
    with held as is_ours:
      if not is_ours:
        return _ELSEWHERE
      commands = _missing_commands(ablation, config)
      if not commands:  # another `ttt-jax ablate` finished it meanwhile; its log stays
        return None
      with _log(config).open("w", encoding="utf-8") as log:
        for words in commands:
          command = [sys.executable, "-m", "ttt_jax.cli", *words]
          status = subprocess.run(
            command, env=environment, stdout=log, stderr=log, check=False
          ).returncode
          if status:
            break
      if status == 0 and finished(ablation, config):
        return None
      lines = _log(config).read_text(encoding="utf-8", errors="replace").strip().splitlines()
  finally:
    groups.put(group)
  return "\n".join(lines[-_LAST_LINES:]) or f"exit status {status}"
