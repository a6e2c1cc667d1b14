"""Runs `ttt-jax data ruler`: writes samples as files for any program, and the time that they took."""

import dataclasses
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.tokenizer import load_tokenizer
from ttt_jax.extras.bench.machine import processor, wide_console
from ttt_jax.extras.ruler.config import SamplesConfig
from ttt_jax.extras.ruler.generate import Ruler
from ttt_jax.extras.ruler.tasks import TASKS
from ttt_jax.files import new_directory, write_json
from ttt_jax.progress import Progress

REPORT = "ruler_generation.json"


def write_samples(
  tokenizer: str, config: SamplesConfig, destination: str | Path, *, console: Console | None = None
) -> dict[str, Any]:
  """Writes `TASK_LENGTH.jsonl` for every task and length, and `ruler_generation.json`; prints a table.

  A line is a `Sample` with its number and the largest number of tokens of the answer. A prompt is the
  context followed by the question.

  Args:
    tokenizer: the argument of `load_tokenizer`.
    destination: a directory that does not exist yet; it appears when all files are written.

  Returns:
    The report, with the seconds per task and length, and the processor time of all cores.

  Raises:
    UserError: the directory exists; as `Ruler.sample`, before anything is written.
  """
  console = wide_console() if console is None else console
  loaded, rows = load_tokenizer(tokenizer), []
  with new_directory(destination) as directory:
    config.check(config.ruler(loaded))
    ruler = config.ruler(loaded)  # a new one, so that the measurement starts without cached counts
    if left_out := config.left_out():
      console.print(left_out)
    with Progress("making", len(config.pairs)) as progress:
      for task, length in config.pairs:
        progress.update(len(rows), f"{task} {length}")
        wall, cpu = time.perf_counter(), time.process_time()
        _write(ruler, config.samples, task, length, directory / f"{task}_{length}.jsonl")
        row = {"task": task, "length": length, "samples": config.samples}
        row |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        rows.append(row)
    report = {
      "tokenizer": Path(tokenizer).name,
      "seed": config.seed,
      "haystack": config.haystack_digest(),
      "questions": {task: x for task in config.chosen if (x := config.questions_digest(task))},
      "made": rows,
      "processor": processor(),
      "python": platform.python_version(),
      "tokenizers": version("tokenizers"),
      "ttt_jax": version("ttt_jax"),
    }
    write_json(directory / REPORT, report)
  console.print(_table(rows))
  console.print(f"written: {destination}", highlight=False, soft_wrap=True)
  return report


def _write(ruler: Ruler, count: int, task: str, length: int, path: Path) -> None:
  with path.open("w", encoding="utf-8") as file:
    for index, sample in enumerate(ruler.samples(task, length, count)):
      line = {"index": index, **dataclasses.asdict(sample), "new_tokens": TASKS[task].new_tokens}
      file.write(json.dumps(line) + "\n")


def _table(rows: list[dict[str, Any]]) -> Table:
  table = Table()
  table.add_column("task")
  for title in ("tokens", "samples", "seconds", "of all cores"):
    table.add_column(title, justify="right")
  for row in rows:
    seconds = (f"{row[name]:.1f}" for name in ("seconds", "cpu_seconds"))
    table.add_row(row["task"], str(row["length"]), str(row["samples"]), *seconds)
  return table
