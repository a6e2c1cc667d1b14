"""Evaluates a model on RULER, task by task and length by length, and writes the results.

A directory of results belongs to one model and one set of settings. `cells.jsonl` keeps every finished pair
of task and length, so that the same call resumes where it stopped, and another call adds tasks and lengths.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import jax
import numpy as np

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.evaluation.paired import bootstrap
from ttt_jax.evaluation.result_file import CELLS, ResultFile
from ttt_jax.extras.ruler.config import SamplesConfig
from ttt_jax.extras.ruler.generate import Ruler
from ttt_jax.extras.ruler.picture import plot_ruler
from ttt_jax.extras.ruler.sample import Sample
from ttt_jax.extras.ruler.tasks import TASKS, Task
from ttt_jax.files import write_json
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.nn.transformer import Transformer
from ttt_jax.progress import Progress

RESULTS, PICTURE, ANSWERS = "ruler.json", "ruler.png", "answers"


@dataclass(frozen=True)
class RulerConfig(SamplesConfig):
  """Chooses the samples, and how the model gets them.

  Attributes:
    strict: prefill the document first, and keep only what its fast weights learned for the question.
    batch_size: samples in a batch; it does not change the answers.
  """

  strict: bool = False
  batch_size: int = 4

  def __post_init__(self):
    super().__post_init__()
    if self.batch_size < 1:
      raise UserError(f"batch_size={self.batch_size} must be at least 1")


def evaluate_ruler(
  model: Transformer | Reader,
  tokenizer: Tokenizer,
  config: RulerConfig,
  out: str | Path,
  *,
  name: str = "model",
) -> dict[str, Any]:
  """Scores a model from 0 to 1; writes the scores to `out`, with a picture and all answers.

  Answers are greedy, up to the task's number of tokens or a token that ends a text.

  Returns:
    The content of `ruler.json` for all results in `out`: `settings`, `cells` (task, length, questions,
    score, low, high, seconds), and `averages` and `average_intervals` by length. `low` and `high` are the
    95 % interval over the samples. An average is None if a task of another length is missing, an interval
    if a task has one sample, or if its results are of version 0.1.0, which kept no scores of samples.

  Raises:
    UserError: the tokenizer belongs to another model; `out` has results of other settings; `strict`
      without fast weights; as `Ruler.sample`, before the model starts.
  """
  reader, out = Reader.of(model), Path(out)
  tokenizer.check_vocabulary(reader.model.vocab_size)
  if config.strict and not reader.ttt.layers:
    raise UserError("strict: the model has no fast weights, so that nothing is left of a document")
  ruler = config.ruler(tokenizer)
  config.check(ruler)
  questions = {task: config.questions_digest(task) for task in config.chosen}
  settings = _settings(reader, config)
  cells = ResultFile(out / CELLS, settings)
  _check_questions(out, cells, questions)
  todo = [pair for pair in config.pairs if (*pair, questions[pair[0]]) not in cells]
  _check_positions(reader, todo)
  (out / ANSWERS).mkdir(parents=True, exist_ok=True)
  with Progress("RULER", len(todo) * config.samples) as progress:
    for done, (task, length) in enumerate(todo):

      def show(samples, done=done, task=task, length=length):
        progress.update(done * config.samples + samples, f"{task} {length}")

      cell, answers = _evaluate_cell(reader, tokenizer, ruler, config, task, length, show)
      write_json(out / ANSWERS / f"{task}_{length}.json", answers)
      cells.add((task, length, questions[task]), cell)
      progress.note(
        f"{task} at {length} tokens: {100 * cell['score']:.1f} % "
        f"({config.samples} samples, {cell['seconds']:.1f} s)"
      )
  report = _report(name, settings, cells)
  write_json(out / RESULTS, report)
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
  """Evaluates a task at a length; returns its result, and every answer with its score.

  The result has the score of every sample, and a digest of the samples: they depend on the tokenizer too.
  """
  task, started, answers = TASKS[name], time.perf_counter(), []
  digest = hashlib.sha256()
  batch: list[Sample] = []
  for sample in ruler.samples(name, length, config.samples):
    batch.append(sample)
    digest.update(f"{sample.prompt}\0".encode())
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
  scores = [answer["score"] for answer in answers]
  return {
    "score": mean(scores),
    "scores": scores,
    "samples": digest.hexdigest()[:16],
    "seconds": time.perf_counter() - started,
  }, answers


def _answer(
  reader: Reader, tokenizer: Tokenizer, samples: Sequence[Sample], task: Task, *, strict: bool
) -> list[str]:
  """Generates the model's answer to each sample."""
  state, prompts = None, [tokenizer.encode(sample.prompt) for sample in samples]
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*max_positions")  # `_check_positions` warned
    if strict:
      state = _learn(reader, tokenizer, [sample.context for sample in samples])
      prompts = [tokenizer.encode(sample.question) for sample in samples]
    stop = stop_tokens(reader.model, tokenizer)
    result = generate(reader, prompts, max_new_tokens=task.new_tokens, stop=stop, state=state)
  return [tokenizer.decode(new.tolist(), skip_special_tokens=True) for new in result.new_tokens]


def _learn(reader: Reader, tokenizer: Tokenizer, documents: Sequence[str]):
  """Returns what the fast weights learn from documents, right-padded with empty lines to whole chunks.

  Without the padding, the tokens after the last whole chunk would not be learned.
  """
  rows = [tokenizer.encode(document) for document in documents]
  empty = tokenizer.encode("\n", add_special_tokens=False)
  for row in rows:
    missing = -len(row) % reader.ttt.chunk_size
    padding = empty or row[-1:]
    row.extend((padding * missing)[:missing])
  return generate(reader, rows, max_new_tokens=0).state.fast_weights_only()


def _settings(reader: Reader, config: RulerConfig) -> dict[str, Any]:
  """Returns what scores depend on, besides task, length and file of questions."""
  return {
    "evaluation": "ruler",
    "model": reader.fingerprint(),
    "seed": config.seed,
    "samples": config.samples,
    "strict": config.strict,
    "haystack": config.haystack_digest(),
  }


def _check_questions(out: Path, cells: ResultFile, questions: dict[str, str | None]) -> None:
  """Raises UserError if `out` has results of a task with another file of questions."""
  for task, _, asked in cells:
    if questions.get(task, asked) != asked:
      raise UserError(
        f"{out} has results of {task} with the questions {asked}, these are {questions[task]}: give the "
        "same file, or another --out"
      )


def _report(name: str, settings: dict[str, Any], cells: ResultFile) -> dict[str, Any]:
  order = {task: i for i, task in enumerate(TASKS)}
  done = sorted(cells, key=lambda key: (key[1], order[key[0]]))
  tasks = len({task for task, _, _ in done})
  ordered, averages, intervals = [], {}, {}
  for task, length, asked in done:
    cell = cells[task, length, asked]
    low, high = _interval([cell], settings)
    found = {"score": cell["score"], "low": low, "high": high, "seconds": cell["seconds"]}
    ordered.append({"task": task, "length": length, "questions": asked, **found})
  for length in sorted({length for _, length, _ in done}):
    of_length = [cells[key] for key in done if key[1] == length]
    whole = len(of_length) == tasks
    averages[str(length)] = mean(cell["score"] for cell in of_length) if whole else None
    intervals[str(length)] = list(_interval(of_length if whole else [], settings))
  return {
    "name": name,
    "settings": settings,
    "device_kind": jax.devices()[0].device_kind,
    "jax_version": jax.__version__,
    "averages": averages,
    "average_intervals": intervals,
    "cells": ordered,
  }


def _interval(
  cells: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> tuple[float | None, float | None]:
  """Returns the 95 % interval of the mean of some tasks, each with samples of its own."""
  if not cells or not all("scores" in cell for cell in cells):  # version 0.1.0 kept no scores
    return None, None
  return bootstrap(*(np.array(cell["scores"], float) for cell in cells), seed=settings["seed"])


def _check_positions(reader: Reader, todo: Sequence[tuple[str, int]]) -> None:
  limit = reader.model.max_positions
  beyond = sorted({length for _, length in todo if limit is not None and length > limit})
  if beyond:
    warnings.warn(
      f"lengths {beyond} are beyond the model's max_positions={limit}: its attention was not trained "
      "there; its fast weights read on",
      stacklevel=3,
    )
