"""Measures what a model knows of facts that attention cannot see: answers behind a cut, right or not."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.open import open_model, open_tokenizer
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.errors import UserError
from ttt_jax.evaluation.result_file import CELLS, ResultFile
from ttt_jax.extras.facts.make import FactRow, help_topics, make_rows
from ttt_jax.files import write_json
from ttt_jax.generation.decoder import Reader
from ttt_jax.nn.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class FactsConfig:
  """Configures the evaluation.

  Attributes:
    tokens: of a row of facts alone, both halves. With prose between the facts a row has twice as many.
    facts: facts in a row.
    rows: rows of facts alone, and of facts in prose.
    kinds: names of kinds of facts; empty for all.
    seed: of facts, order and prose.
    batch: rows read at once.
  """

  tokens: int = 512
  facts: int = 14
  rows: int = 16
  kinds: tuple[str, ...] = ()
  seed: int = 1
  batch: int = 4

  def __post_init__(self):
    for name in ("tokens", "facts", "rows", "batch"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be positive")
    if self.tokens % 2:
      raise UserError(f"tokens={self.tokens} must be even: a row has two halves")


def run_facts(
  source: str | Path,
  config: FactsConfig | None = None,
  *,
  text: str | None = None,
  fields: Fields | None = None,
  dtype: str | None = None,
  out: Path | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Asks a model for facts that only its fast weights can know, and prints a table.

  Args:
    source: a Hugging Face directory, a `.gguf` file or a run directory.
    config: the evaluation; None for the defaults.
    text: prose between facts; None for the topics of Python's own help.
    fields: as `open_model`.
    dtype: of weights and computation; None as stored.
    out: a directory, created if missing, for `facts.json`, and for `cells.jsonl` with every answer; what
      is in it already is not read again. None writes nothing.
    console: the output.

  Returns:
    By "updates on" and "updates off", the results of `score_facts` for "alone" and "in prose".

  Raises:
    UserError: half a row is not whole chunks, the facts do not fit, the text is too short, or `out` holds
      results of other settings.
  """
  config = FactsConfig() if config is None else config
  console = Console() if console is None else console
  model, tokenizer = open_model(source, dtype=dtype, fields=fields), open_tokenizer(source)
  half, chunk = config.tokens // 2, model.ttt.chunk_size
  if model.ttt.layers and half % chunk:
    raise UserError(
      f"tokens={config.tokens}: half of it is not whole chunks of ttt.chunk_size={chunk}, and the last "
      "chunk of a half would never be learned"
    )
  encode = partial(tokenizer.encode, add_special_tokens=False)
  prose = encode(help_topics() if text is None else text)
  make = partial(
    make_rows,
    "evaluation",
    encode,
    rows=config.rows,
    facts=config.facts,
    seed=config.seed,
    kinds=config.kinds or None,
  )
  rows = {"alone": make(half=half), "in prose": make(half=2 * half, prose=prose)}
  readings = {"updates on": True, "updates off": False} if model.ttt.layers else {"model": False}
  cells = None if out is None else ResultFile(out / CELLS, _settings(model, rows, config))
  results = {name: {} for name in readings}
  for name, update in readings.items():
    for place, made in rows.items():
      if cells is not None and (name, place) in cells:
        answers = cells[name, place]
      else:
        answers = read_answers(model, made, batch=config.batch, update=update)
        if cells is not None:
          cells.add((name, place), answers)
      results[name][place] = _scores(answers)
  report = {"model": str(source), "config": dataclasses.asdict(config), "results": results}
  _print(report, console)
  if out is not None:
    write_json(out / "facts.json", report)
    console.print(f"written: {out / 'facts.json'}", highlight=False)
  return report


def _settings(
  model: Transformer, rows: dict[str, Sequence[FactRow]], config: FactsConfig
) -> dict[str, Any]:
  """Returns what the answers depend on; `samples` depends on the tokenizer and the prose too."""
  asked = dataclasses.asdict(config)
  del asked["batch"]
  texts = json.dumps([[row.tokens, row.answers] for made in rows.values() for row in made])
  return {
    "evaluation": "facts",
    "model": Reader.of(model).fingerprint(),
    "samples": hashlib.sha256(texts.encode()).hexdigest()[:16],
    **asked,
  }


def _print(report: dict[str, Any], console: Console) -> None:
  config = report["config"]
  table = Table()
  kinds = sorted(next(iter(report["results"].values()))["alone"]["by_kind"])
  for name in ("fast weights", "facts", "right", "first token right", "nats", *kinds):
    table.add_column(name, justify="right")
  for name, result in report["results"].items():
    for place, scores in result.items():
      shares = (scores["answers"], scores["firsts"], *(scores["by_kind"][kind] for kind in kinds))
      answers, firsts, *by_kind = (f"{share:.1%}" for share in shares)
      table.add_row(name, place, answers, firsts, f"{scores['nats']:.3f}", *by_kind)
  console.print(
    f"{config['facts']} facts a row, behind a cut of attention: alone in {config['tokens']} tokens, or in "
    f"{2 * config['tokens']} tokens of prose; {config['rows']} rows each",
    highlight=False,
  )
  console.print(table)


@partial(jax.jit, static_argnames="update")
def _answers(
  model: Transformer, tokens: Int[Array, "B T"], attention: Int[Array, "B T"], *, update: bool
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
  """Returns the nats of every token but the first, and whether the model's likeliest token is it."""
  logits = model(tokens, jnp.ones_like(tokens), attention, update=update)[:, :-1]
  nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
  return nats, jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def read_answers(
  model: Transformer, rows: Sequence[FactRow], *, batch: int = 4, update: bool = True
) -> list[list[dict[str, Any]]]:
  """Reads rows with attention cut between their halves, fast weights going on over the cut.

  The facts of a row share its text and its fast weights: rows are independent samples, facts are not.

  Args:
    model: a model; without fast weights it knows nothing of the first half.
    rows: rows of one length.
    batch: rows read at once.
    update: whether fast weights learn.

  Returns:
    For each row and each fact of its second half, in their order: `kind`, and per token of the answer
    `right`, whether it is the model's likeliest, and `nats`.
  """
  answers = []
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    tokens = np.asarray([row.tokens for row in part], np.int32)
    attention = np.ones_like(tokens)
    for i, row in enumerate(part):
      attention[i, row.cut :] = 2
    nats, right = map(
      np.asarray, _answers(model, jnp.asarray(tokens), jnp.asarray(attention), update=update)
    )
    answers += [_by_fact(row, *of_row) for row, *of_row in zip(part, nats, right)]
  return answers


def _by_fact(
  row: FactRow, nats: Float[np.ndarray, "S"], right: Bool[np.ndarray, "S"]
) -> list[dict[str, Any]]:
  begins = np.flatnonzero(np.isin(row.answers, row.firsts))
  facts = np.split(np.asarray(row.answers) - 1, begins[1:])
  return [
    {"kind": row.kinds[begin], "right": right[fact].tolist(), "nats": nats[fact].tolist()}
    for begin, fact in zip(begins, facts, strict=True)
  ]


def score_facts(
  model: Transformer, rows: Sequence[FactRow], *, batch: int = 4, update: bool = True
) -> dict[str, Any]:
  """Scores the answers of `read_answers`, whose arguments it takes.

  Returns:
    `answers` and `firsts`: the share of right tokens, of all answers and of those that begin one; `nats`
    per token of an answer; `tokens`: how many these are; `by_kind`: `answers` of each kind.
  """
  return _scores(read_answers(model, rows, batch=batch, update=update))


def _scores(answers: list[list[dict[str, Any]]]) -> dict[str, Any]:
  facts = [fact for of_row in answers for fact in of_row]

  def share(kind: str | None = None) -> float:
    return float(np.mean([x for f in facts if kind in (None, f["kind"]) for x in f["right"]]))

  nats = np.array([x for fact in facts for x in fact["nats"]], float)  # a file's null is NaN
  return {
    "answers": share(),
    "firsts": float(np.mean([fact["right"][0] for fact in facts])),
    "nats": float(nats.mean()),
    "tokens": len(nats),
    "by_kind": {kind: share(kind) for kind in sorted({fact["kind"] for fact in facts})},
  }
