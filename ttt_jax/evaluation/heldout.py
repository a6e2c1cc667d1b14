"""What the fast weights buy: held-out loss by position in the document, and a sample of text.

Loss that falls along a document is what reading should do to a model that learns while it reads. The
same model with its updates off is not a fair opponent if its slow weights were trained with the
fast ones and rely on them; a twin trained without fast weights on the same batches is.
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
from ttt_jax.generation.pieces import row_shards
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.nn.loss import IGNORE, model_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import to_mesh
from ttt_jax.parallel.trees import delete


@partial(jax.jit, static_argnames="update")
def _losses(model: Transformer, tokens: Int[Array, "B T"], *, update: bool) -> Float[Array, "B T"]:
  labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  return model_losses(model, tokens, labels, update=update)[0]


def losses_by_token(
  model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, *, update: bool = True
) -> Float[np.ndarray, "B S"]:
  """Nats per token: entry t of a row is the loss of predicting its token t + 1 from those up to t."""
  return map_rows(partial(_losses, model, update=update), rows, mesh)[:, :-1]


def map_rows(
  function: Callable[[Int[Array, "b T"]], Shaped[Array, "b ..."]],
  rows: Int[np.ndarray, "B T"],
  mesh: Mesh,
) -> Shaped[np.ndarray, "B ..."]:
  """`function` of all rows, on every process.

  It is given as many at a time as the mesh has places for, their length split over `context`.
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
  """Mean loss in equal parts of the document: (first position, one past the last, loss)."""
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
  """The table of `summary.json`: loss by position, of a model with updates and with updates off.

  Likewise of the model before its first step, and of the twin, which has none; None where there is no
  such model, and for the updates of a model that has none to switch off.
  """

  columns = {}
  for name, read in (("loss", model), ("loss_baseline", baseline), ("loss_before", before)):
    if read is not None:
      columns |= _columns(config, read, rows, mesh, name)
  return _table(config, columns)


# Of `heldout_by_position`, in the order of `summary.json`; a twin has no updates to switch off.
_COLUMNS = ("loss", "loss_updates_off", "loss_baseline", "loss_before", "loss_before_updates_off")


def _columns(
  config: Config, model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, name: str
) -> dict[str, list[tuple[int, int, float]]]:
  """The columns of a model, of which `name` is that with updates."""
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
  nothing = [(None, None, None)] * config.eval.buckets
  return [
    {"from": low, "to": high, **{name: columns.get(name, nothing)[i][2] for name in _COLUMNS}}
    for i, (low, high, _) in enumerate(columns["loss"])
  ]


def mean_of_buckets(table: list[dict[str, Any]], column: str) -> float | None:
  """The mean loss over all positions of a column of `heldout_by_position`."""
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
  """At most `new_tokens` tokens after `prompt`, greedy at temperature 0, where the model is.

  The fast weights learn along the prompt and what is written; a token that ends a text ends it, one of
  `stop` or, if that is None, of the model's own.
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
  """The held-out documents that `evaluate` reads.

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
  """Traces what `evaluate` will compute, on shapes alone.

  Raises:
    UserError, UnsupportedError: rows of `eval.seq_len` tokens, which may be longer than those of
      `data.seq_len`, cannot be read so.
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
  """The evaluation part of `summary.json`.

  Args:
    model, baseline, before: as in `heldout_by_position`; or functions that hand a model over, so that
      there is one at a time: each is called when its turn comes, and its model deleted before the next.
    rows: `evaluation_rows`, if they are known already.
  """
  rows = evaluation_rows(config, corpus) if rows is None else rows
  owned = not isinstance(model, Transformer)
  model = model() if owned else model
  columns = _columns(config, model, rows, mesh, "loss")
  sample = None
  if (
    jax.process_count() == 1
  ):  # `generate` reads every token it draws, which no process has of all rows
    model = Reader.of(model, donate=owned)
    sample = _sample(config, model, corpus, rows[0])
  if owned:
    delete(model)
  for name, other in (("loss_baseline", baseline), ("loss_before", before)):
    if isinstance(other, Transformer):
      columns |= _columns(config, other, rows, mesh, name)
    elif other is not None:
      read = other()
      columns |= _columns(config, read, rows, mesh, name)
      delete(read)
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
  """The beginning of a held-out document, and what the model makes of it."""
  prompt = row[: min(config.eval.prompt_tokens, config.eval_seq_len)]
  stop = stop_tokens(config.model, corpus.tokenizer)
  if len(prompt) > 1 and prompt[-1] in stop:
    prompt = prompt[:-1]  # a whole document: what is behind its end is another one
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
  """The text of tokens; U+FFFD for one that only the model has, whose vocabulary may be padded."""
  known = VOCAB_SIZE if corpus.tokenizer is None else corpus.tokenizer.vocab_size
  parts = [
    corpus.decode(list(part), skip_special_tokens=True) if is_known else "\ufffd" * len(list(part))
    for is_known, part in groupby(tokens.tolist(), lambda token: token < known)
  ]
  return "".join(parts)
