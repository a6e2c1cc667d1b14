"""What the fast weights buy: held-out loss by position in the document, and a sample of text.

Loss that falls along a document is what reading should do to a model that learns while it reads. The
same model with its updates off is not a fair opponent if its slow weights were trained with the
fast ones and rely on them; a twin trained without fast weights on the same batches is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, Shaped

from ttt_jax.config import Config
from ttt_jax.data import Corpus, heldout_rows
from ttt_jax.generation.generate import generate
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.generation.segments import row_shards
from ttt_jax.loss import IGNORE, model_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.sharding import put


@partial(jax.jit, static_argnames="update")
def _losses(model: Transformer, tokens: Int[Array, "B T"], *, update: bool) -> Float[Array, "B T"]:
  labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  return model_losses(model, tokens, labels, update=update)[0]


def losses_by_token(
  model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, *, update: bool = True
) -> Float[np.ndarray, "B S"]:
  """Nats per token: entry t of a row is the loss of predicting its token t + 1 from those up to t."""
  return over_rows(partial(_losses, model, update=update), rows, mesh)[:, :-1]


def over_rows(
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
      result = function(put(filled, mesh, "batch", "sequence"))
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

  def column(model, update):
    if model is None or not (update or config.ttt.layers):
      return [(None, None, None)] * config.eval.buckets
    return by_position(losses_by_token(model, rows, mesh, update=update), config.eval.buckets)

  columns = {
    "loss": column(model, True),
    "loss_updates_off": column(model, False),
    "loss_baseline": column(baseline, True),
    "loss_before": column(before, True),
    "loss_before_updates_off": column(before, False),
  }
  return [
    {"from": low, "to": high, **{name: parts[i][2] for name, parts in columns.items()}}
    for i, (low, high, _) in enumerate(columns["loss"])
  ]


def mean_of_buckets(table: list[dict[str, Any]], column: str) -> float | None:
  """The mean loss over all positions of a column of `heldout_by_position`."""
  if table[0][column] is None:
    return None
  sizes = [row["to"] - row["from"] for row in table]
  return float(np.average([row[column] for row in table], weights=sizes))


def continue_row(
  model: Transformer,
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


def evaluate(
  config: Config,
  model: Transformer,
  baseline: Transformer | None,
  before: Transformer | None,
  corpus: Corpus,
  mesh: Mesh,
) -> dict[str, Any]:
  """The evaluation part of `summary.json`."""
  rows = heldout_rows(
    corpus.sources,
    seq_len=config.eval_seq_len,
    max_documents=config.eval.documents,
    seed=config.seed,
  )
  table = heldout_by_position(config, model, baseline, rows, mesh, before=before)
  sample = None
  if (
    jax.process_count() == 1
  ):  # `generate` reads every token it draws, which no process has of all rows
    prompt = rows[0][: min(config.eval.prompt_tokens, config.eval_seq_len)]
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
    texts = (corpus.decode(x, skip_special_tokens=True) for x in (prompt, continuation))
    sample = dict(zip(("prompt", "continuation"), texts))
  return {
    "heldout_documents": len(rows),
    "heldout_seq_len": config.eval_seq_len,
    **{f"heldout_{name}": mean_of_buckets(table, name) for name in table[0] if "loss" in name},
    "heldout_by_position": table,
    "sample": sample,
  }
