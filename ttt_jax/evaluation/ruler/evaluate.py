"""A model's scores at RULER, task by task and length by length, and what is written of them.

A directory of results belongs to one model and one set of settings. Every pair of task and length is
written when it is done and never done again, so that the same call goes on where the last one was stopped.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import jax

from ttt_jax.evaluation.ruler.generate import Ruler
from ttt_jax.evaluation.ruler.sample import Sample
from ttt_jax.evaluation.ruler.tasks import TASKS, Task, task_named
from ttt_jax.generation.generate import generate
from ttt_jax.generation.reader import Reader
from ttt_jax.nn.transformer import Transformer
from ttt_jax.plots import plot_ruler
from ttt_jax.pretrained.tokenizer import Tokenizer
from ttt_jax.progress import EvaluationProgress
from ttt_jax.rundir import write_json

RESULTS, PICTURE, ANSWERS = "ruler.json", "ruler.png", "answers"
_FILES = ("squad", "hotpot")


@dataclass(frozen=True)
class RulerConfig:
  """What is asked of a model.

  Attributes:
    tasks: None for all, but those without a file of questions.
    lengths: tokens of prompt and answer together.
    samples: of every task and length.
    strict: the document is read first, and the question with nothing of it but what the fast weights
      learned.
    haystack: a text file that needles are hidden in where RULER takes essays; None for its noise.
    squad, hotpot: files of questions, in SQuAD's or HotpotQA's format.
    batch_size: samples read together; it does not change the answers.
  """

  tasks: tuple[str, ...] | None = None
  lengths: tuple[int, ...] = (4096,)
  samples: int = 100
  strict: bool = False
  haystack: Path | None = None
  squad: Path | None = None
  hotpot: Path | None = None
  seed: int = 0
  batch_size: int = 4

  def __post_init__(self):
    for task in self.chosen:
      task_named(task)
    for name in ("samples", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if not self.lengths or not self.chosen:
      raise ValueError(f"tasks={self.tasks} and lengths={self.lengths}: give at least one of each")

  @property
  def chosen(self) -> tuple[str, ...]:
    if self.tasks is not None:
      return tuple(dict.fromkeys(self.tasks))
    missing = [f"ruler_qa_{name}" for name in _FILES if getattr(self, name) is None]
    return tuple(task for task in TASKS if task not in missing)

  def ruler(self, tokenizer: Tokenizer) -> Ruler:
    haystack = None if self.haystack is None else _read(self.haystack).decode("utf-8", "replace")
    return Ruler(tokenizer, seed=self.seed, haystack=haystack, squad=self.squad, hotpot=self.hotpot)


def evaluate_ruler(
  model: Transformer | Reader,
  tokenizer: Tokenizer,
  config: RulerConfig,
  out: str | Path,
  *,
  name: str = "model",
) -> dict[str, Any]:
  """The scores of a model, from 0 to 1; also written to `out`, with a picture and all answers.

  The likeliest token is taken at every step, up to as many as the task asks for, or one that ends a text.

  Returns:
    What `ruler.json` has: `settings`, `cells` (task, length, score, seconds), `averages` by length.

  Raises:
    ValueError: as `Ruler.sample`, before anything is read by the model; a tokenizer of another model;
      results of other settings in `out`; `strict` and no fast weights.
  """
  reader, out = Reader.of(model), Path(out)
  tokenizer.check_vocabulary(reader.model.vocab_size)
  if config.strict and not reader.ttt.layers:
    raise ValueError("strict: the model has no fast weights, so that nothing is left of a document")
  ruler = config.ruler(tokenizer)
  settings = _settings(reader, config)
  cells = _resume(out, settings)
  todo = [
    (task, length)
    for length in sorted(set(config.lengths))
    for task in config.chosen
    if (task, length) not in cells
  ]
  for task, length in todo:  # whatever is wrong with one of them is known before hours of reading
    ruler.sample(task, length, config.samples - 1)
  _check_positions(reader, todo)
  (out / ANSWERS).mkdir(parents=True, exist_ok=True)
  with EvaluationProgress("RULER", len(todo) * config.samples) as progress:
    for done, (task, length) in enumerate(todo):

      def show(samples, done=done, task=task, length=length):
        progress.update(done * config.samples + samples, f"{task} {length}")

      cell, answers = _evaluate_cell(reader, tokenizer, ruler, config, task, length, show)
      write_json(out / ANSWERS / f"{task}_{length}.json", answers)
      cells[task, length] = cell
      report = _report(name, settings, cells)
      write_json(out / RESULTS, report)
      progress.note(
        f"{task} at {length} tokens: {100 * cell['score']:.1f} % "
        f"({config.samples} samples, {cell['seconds']:.1f} s)"
      )
  report = _report(name, settings, cells)
  plot_ruler(report, out / PICTURE)
  return report


def _evaluate_cell(
  reader: Reader,
  tokenizer: Tokenizer,
  ruler: Ruler,
  config: RulerConfig,
  name: str,
  length: int,
  show: Callable[[int], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """A task at a length: its record, and every answer with what was expected and its score."""
  task, started, answers = TASKS[name], time.perf_counter(), []
  batch: list[Sample] = []
  for sample in ruler.samples(name, length, config.samples):
    batch.append(sample)
    if len(batch) == config.batch_size or len(answers) + len(batch) == config.samples:
      texts = _answer(reader, tokenizer, batch, task, strict=config.strict)
      answers.extend(
        {
          "question": sample.question,
          "expected": list(sample.answers),
          "answer": text,
          "score": task.score(text, sample.answers),
        }
        for sample, text in zip(batch, texts)
      )
      batch = []
      show(len(answers))
  score = mean(answer["score"] for answer in answers)
  seconds = time.perf_counter() - started
  return {"task": name, "length": length, "score": score, "seconds": seconds}, answers


def _answer(
  reader: Reader, tokenizer: Tokenizer, samples: Sequence[Sample], task: Task, *, strict: bool
) -> list[str]:
  """What the model says to each of them."""
  state, prompts = None, [tokenizer.encode(sample.prompt) for sample in samples]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*max_positions")  # `_check_positions` said so
    if strict:
      state = _learn(reader, tokenizer, [sample.context for sample in samples])
      prompts = [tokenizer.encode(sample.question) for sample in samples]
    result = generate(reader, prompts, max_new_tokens=task.new_tokens, state=state)
  return [tokenizer.decode(new.tolist(), skip_special_tokens=True) for new in result.new_tokens]


def _learn(reader: Reader, tokenizer: Tokenizer, documents: Sequence[str]):
  """What the fast weights learn of documents, which are filled up to whole chunks with empty lines.

  Else the tokens behind the last whole chunk would not be learned.
  """
  rows = [tokenizer.encode(document) for document in documents]
  empty = tokenizer.encode("\n", add_special_tokens=False)
  for row in rows:
    missing = -len(row) % reader.ttt.chunk_size
    fill = empty or row[-1:]
    row.extend((fill * missing)[:missing])
  return generate(reader, rows, max_new_tokens=0).state.fast_weights_only()


def _settings(reader: Reader, config: RulerConfig) -> dict[str, Any]:
  """What scores depend on, besides task and length."""
  return {
    "model": reader.fingerprint(),
    "seed": config.seed,
    "samples": config.samples,
    "strict": config.strict,
    "haystack": _digest(config.haystack) or "noise",
    **{name: _digest(getattr(config, name)) for name in _FILES},
  }


def _resume(out: Path, settings: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
  """The cells that are done; takes over the files of questions that this call does not name.

  Raises:
    ValueError: they were done with other settings.
  """
  file = out / RESULTS
  if not file.is_file():
    return {}
  try:
    before = json.loads(file.read_text(encoding="utf-8"))
    old, cells = before["settings"], before["cells"]
    done = {(cell["task"], cell["length"]): cell for cell in cells}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{file} is damaged, or no result of ttt_jax: give another --out") from error
  for name in _FILES:
    old[name], settings[name] = old.get(name) or settings[name], settings[name] or old.get(name)
  for name, value in settings.items():
    if old.get(name) != value:
      raise ValueError(
        f"{out} has results of {name}={old.get(name)}, this is {name}={value}: give another --out"
      )
  return done


def _report(name: str, settings: dict[str, Any], cells: dict) -> dict[str, Any]:
  order = {task: i for i, task in enumerate(TASKS)}
  ordered = sorted(cells.values(), key=lambda cell: (cell["length"], order[cell["task"]]))
  scores: dict[int, list[float]] = {}
  for cell in ordered:
    scores.setdefault(cell["length"], []).append(cell["score"])
  return {
    "name": name,
    "settings": settings,
    "device_kind": jax.devices()[0].device_kind,
    "jax_version": jax.__version__,
    "averages": {str(length): mean(values) for length, values in scores.items()},
    "cells": ordered,
  }


def _check_positions(reader: Reader, todo: Sequence[tuple[str, int]]) -> None:
  limit = reader.model.max_positions
  beyond = sorted({length for _, length in todo if limit is not None and length > limit})
  if beyond:
    warnings.warn(
      f"lengths {beyond} are beyond the model's max_positions={limit}: its attention was not trained "
      "there; its fast weights read on",
      stacklevel=3,
    )


def _digest(path: Path | None) -> str | None:
  return None if path is None else hashlib.sha256(_read(path)).hexdigest()[:16]


def _read(path: Path) -> bytes:
  try:
    return Path(path).read_bytes()
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error.strerror}") from error
