"""Measures the gain of fast weights: held-out loss by position in the document, and a text sample.

The loss of a model that learns while it reads should fall along a document. The same model with updates off
is not a fair baseline, since its slow weights were trained with the fast weights and rely on them; a twin
trained without fast weights on the same batches is fair.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Int32, Integer, Shaped

from ttt_jax.checkpoints.runs import abstract_model
from ttt_jax.config import Config
from ttt_jax.data import VOCAB_SIZE, Corpus, heldout_rows
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import model_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import row_shards, to_mesh
from ttt_jax.parallel.trees import delete


@partial(jax.jit, static_argnames="update")
def _losses(model: Transformer, tokens: Int[Array, "B T"], *, update: bool) -> Float[Array, "B T"]:
  labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  return model_losses(model, tokens, labels, update=update)[0]


def losses_by_token(
  model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, *, update: bool = True
) -> Float[np.ndarray, "B S"]:
  """Returns nats per token: entry t of a row is the loss of predicting token t + 1 from tokens 0 to t."""
  return map_rows(partial(_losses, model, update=update), rows, mesh)[:, :-1]


def map_rows(
  function: Callable[[Int[Array, "b T"]], Shaped[Array, "b ..."]],
  rows: Int[np.ndarray, "B T"],
  mesh: Mesh,
) -> Shaped[np.ndarray, "B ..."]:
  """Returns `function` of all rows on every process.

  Each call gets one row per shard of the batch, with the sequence split over `context`.
  """
  at_once = row_shards(mesh)
  results = []
  with jax.set_mesh(mesh):
    for start in range(0, len(rows), at_once):
      batch = rows[start : start + at_once]
      filled = np.concatenate([batch, np.repeat(batch[:1], at_once - len(batch), axis=0)])
      result = function(to_mesh(filled, mesh, "batch", "sequence"))
      results.append(process_allgather(result, tiled=True)[: len(batch)])
  return np.concatenate(results)


def by_position(losses: Float[np.ndarray, "B S"], buckets: int) -> list[tuple[int, int, float]]:
  """Averages the loss over equal parts of the document: (first position, one past the last, loss)."""
  edges = np.linspace(0, losses.shape[1], buckets + 1).round().astype(int)
  return [(int(low), int(high), float(losses[:, low:high].mean())) for low, high in pairwise(edges)]


def heldout_by_position(
  config: Config,
  model: Transformer,
  baseline: Transformer | None,
  rows: Int[np.ndarray, "B T"],
  mesh: Mesh,
  *,
  before: Transformer | None = None,
) -> list[dict[str, Any]]:
  """Computes the table of `summary.json`: the loss by position of a model with updates on and off.

  The table has the same columns for the model before its first step, and one column for the twin, which has
  no updates. A column is None if there is no such model, or if the model has no updates to switch off.
  """
  columns = {}
  for name, other in (("loss", model), ("loss_baseline", baseline), ("loss_before", before)):
    if other is not None:
      columns |= _columns(config, other, rows, mesh, name)
  return _table(config, columns)


# Columns of `heldout_by_position`, in the order of `summary.json`; a twin has no updates to switch off.
_COLUMNS = ("loss", "loss_updates_off", "loss_baseline", "loss_before", "loss_before_updates_off")


def _columns(
  config: Config, model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, name: str
) -> dict[str, list[tuple[int, int, float]]]:
  """Computes the columns of a model; `name` is the column with updates on."""
  updates = {name: True}
  if config.ttt.layers and f"{name}_updates_off" in _COLUMNS:
    updates[f"{name}_updates_off"] = False
  return {
    column: by_position(losses_by_token(model, rows, mesh, update=update), config.eval.buckets)
    for column, update in updates.items()
  }


def _table(
  config: Config, columns: dict[str, list[tuple[int, int, float]]]
) -> list[dict[str, Any]]:
  missing = [(None, None, None)] * config.eval.buckets
  return [
    {"from": low, "to": high, **{name: columns.get(name, missing)[i][2] for name in _COLUMNS}}
    for i, (low, high, _) in enumerate(columns["loss"])
  ]


def mean_of_buckets(table: list[dict[str, Any]], column: str) -> float | None:
  """Returns the mean loss over all positions of a column of `heldout_by_position`."""
  if table[0][column] is None:
    return None
  sizes = [row["to"] - row["from"] for row in table]
  return float(np.average([row[column] for row in table], weights=sizes))


def continue_row(
  model: Transformer | Reader,
  prompt: Integer[np.ndarray, "T"],
  *,
  new_tokens: int,
  temperature: float,
  seed: int,
  stop: Sequence[int] | None = None,
) -> Integer[np.ndarray, "new"]:
  """Generates at most `new_tokens` tokens after `prompt` on the model's devices, greedily at temperature 0.

  The fast weights learn along the prompt and the new tokens. A token of `stop`, or by default one of the
  model's end tokens, ends the text.
  """
  result = generate(
    model,
    [prompt.tolist()],
    max_new_tokens=new_tokens,
    temperature=temperature,
    seed=seed,
    stop=stop,
  )
  return result.new_tokens[0]


def evaluation_rows(config: Config, corpus: Corpus) -> Int32[np.ndarray, "B T"]:
  """Returns the held-out documents that `evaluate` reads.

  Raises:
    UserError: no document has `eval.seq_len` tokens.
  """
  return heldout_rows(
    corpus.sources,
    seq_len=config.eval_seq_len,
    max_documents=config.eval.documents,
    seed=config.seed,
  )


def check_evaluation(config: Config, mesh: Mesh) -> None:
  """Traces the computations of `evaluate` on shapes alone.

  Raises:
    UserError, UnsupportedError: the model cannot read rows of `eval.seq_len` tokens, which may be longer
      than those of `data.seq_len`.
  """
  tokens = jax.ShapeDtypeStruct((row_shards(mesh), config.eval_seq_len), jnp.int32)
  with jax.set_mesh(mesh):
    for update in (True, False) if config.ttt.layers else (True,):
      jax.eval_shape(partial(_losses, update=update), abstract_model(config, mesh), tokens)


def evaluate(
  config: Config,
  model: Transformer | Callable[[], Transformer],
  baseline: Transformer | Callable[[], Transformer] | None,
  before: Transformer | Callable[[], Transformer] | None,
  corpus: Corpus,
  mesh: Mesh,
  *,
  rows: Int32[np.ndarray, "B T"] | None = None,
) -> dict[str, Any]:
  """Computes the evaluation part of `summary.json`.

  Args:
    config: the config of the run.
    model, baseline, before: as in `heldout_by_position`, or functions that return these models. Each
      function is called when its model is needed, and the model is deleted before the next, to hold one at
      a time.
    corpus: the source of the rows and of the sample's prompt.
    mesh: the mesh that reads the rows.
    rows: `evaluation_rows`, if the caller has them.
  """
  rows = evaluation_rows(config, corpus) if rows is None else rows
  owned = not isinstance(model, Transformer)
  model = model() if owned else model
  columns = _columns(config, model, rows, mesh, "loss")
  sample = None
  # `generate` needs every token on the host, and no process of several holds those of all rows.
  if jax.process_count() == 1:
    model = Reader.of(model, donate=owned)
    sample = _sample(config, model, corpus, rows[0])
  if owned:
    delete(model)
  for name, other in (("loss_baseline", baseline), ("loss_before", before)):
    if isinstance(other, Transformer):
      columns |= _columns(config, other, rows, mesh, name)
    elif other is not None:
      owned_model = other()
      columns |= _columns(config, owned_model, rows, mesh, name)
      delete(owned_model)
  table = _table(config, columns)
  return {
    "heldout_documents": len(rows),
    "heldout_seq_len": config.eval_seq_len,
    **{f"heldout_{name}": mean_of_buckets(table, name) for name in table[0] if "loss" in name},
    "heldout_by_position": table,
    "sample": sample,
  }


def _sample(
  config: Config, model: Reader, corpus: Corpus, row: Int32[np.ndarray, "T"]
) -> dict[str, str]:
  """Continues the beginning of a held-out document; returns both as text."""
  prompt = row[: min(config.eval.prompt_tokens, config.eval_seq_len)]
  stop = stop_tokens(config.model, corpus.tokenizer)
  if len(prompt) > 1 and prompt[-1] in stop:
    prompt = prompt[:-1]  # else the model would start another document
  continuation = continue_row(
    model,
    prompt,
    new_tokens=config.eval.sample_tokens,
    temperature=config.eval.temperature,
    seed=config.seed,
    stop=stop,
  )
  return {"prompt": _text(corpus, prompt), "continuation": _text(corpus, continuation)}


def _text(corpus: Corpus, tokens: Integer[np.ndarray, "T"]) -> str:
  """Decodes tokens; U+FFFD stands for a token of the model's padded vocabulary without text."""
  vocab_size = VOCAB_SIZE if corpus.tokenizer is None else corpus.tokenizer.vocab_size
  parts = [
    corpus.decode(list(part), skip_special_tokens=True) if has_text else "\ufffd" * len(list(part))
    for has_text, part in groupby(tokens.tolist(), lambda token: token < vocab_size)
  ]
  return "".join(parts)
