"""What the fast weights buy: held-out loss by position in the document, and a sample of text.

Loss that falls along a document is what reading should do to a model that learns while it reads. The
same model with its updates off is not a fair opponent, its slow weights rely on the fast ones; a
twin trained without fast weights on the same batches is.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ttt_jax.config import Config
from ttt_jax.data import decode, heldout_rows
from ttt_jax.loss import IGNORE, token_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.sharding import sharding


@partial(jax.jit, static_argnames="update")
def _losses(model: Transformer, tokens: Int[Array, "B T"], *, update: bool) -> Float[Array, "B T"]:
  labels = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  return token_losses(model(tokens, update=update), labels)[0]


def losses_by_token(
  model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, *, update: bool = True
) -> Float[np.ndarray, "B S"]:
  """Nats per token: entry t of a row is the loss of predicting its token t + 1 from those up to t.

  Rows are read as many at a time as the mesh has places for, their length split over `context`.
  """
  at_once = mesh.shape["data"] * mesh.shape["fsdp"]
  where = sharding(mesh, "batch", "sequence")
  results = []
  with jax.set_mesh(mesh):
    for start in range(0, len(rows), at_once):
      batch = rows[start : start + at_once]
      filled = np.concatenate([batch, np.repeat(batch[:1], at_once - len(batch), axis=0)])
      losses = _losses(model, jax.device_put(filled, where), update=update)
      results.append(np.asarray(losses)[: len(batch), :-1])
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
) -> list[dict[str, Any]]:
  """The table of `summary.json`: loss with updates, with updates off, and of the twin, by position."""

  def table(model, update):
    return by_position(losses_by_token(model, rows, mesh, update=update), config.eval.buckets)

  on = table(model, True)
  off = table(model, False)
  twin = [None] * len(on) if baseline is None else [x[2] for x in table(baseline, False)]
  return [
    {
      "from": low,
      "to": high,
      "loss": loss,
      "loss_updates_off": loss_off,
      "loss_baseline": loss_twin,
    }
    for (low, high, loss), (_, _, loss_off), loss_twin in zip(on, off, twin)
  ]


def mean_of_buckets(table: list[dict[str, Any]], column: str) -> float | None:
  """The mean loss over all positions of a column of `heldout_by_position`."""
  if table[0][column] is None:
    return None
  sizes = [row["to"] - row["from"] for row in table]
  return float(np.average([row[column] for row in table], weights=sizes))


@jax.jit
def _next_token(
  model: Transformer,
  row: Int[Array, "T"],
  position: Int[Array, ""],
  temperature: Float[Array, ""],
  key: jax.Array,
) -> Int[Array, "T"]:
  """`row` with a token drawn for `position`; what stands there and later cannot influence it."""
  logits = model(row[None])[0, position - 1]
  drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
  token = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
  return row.at[position].set(token.astype(row.dtype))


def continue_row(
  model: Transformer,
  prompt: Int[np.ndarray, "T"],
  *,
  new_tokens: int,
  temperature: float,
  seed: int,
) -> Int[np.ndarray, "new"]:
  """`new_tokens` tokens after `prompt`, greedy at temperature 0, on one device.

  Every token reads the whole row again, with the fast weights learning along it: simple and exact, for
  a short sample.
  """
  model = jax.device_put(model, jax.devices()[0])
  row = jnp.asarray(np.pad(prompt, (0, new_tokens)), jnp.int32)
  keys = jax.random.split(jax.random.key(seed), new_tokens)
  for i in range(new_tokens):
    row = _next_token(model, row, jnp.int32(len(prompt) + i), jnp.float32(temperature), keys[i])
  return np.asarray(row)[len(prompt) :]


def evaluate(
  config: Config,
  model: Transformer,
  baseline: Transformer | None,
  documents: Any,
  mesh: Mesh,
) -> dict[str, Any]:
  """The evaluation part of `summary.json`."""
  rows = heldout_rows(
    documents,
    seq_len=config.eval_seq_len,
    max_documents=config.eval.documents,
    seed=config.seed,
  )
  table = heldout_by_position(config, model, baseline, rows, mesh)
  prompt = rows[0][: min(config.eval.prompt_tokens, config.eval_seq_len)]
  sample = continue_row(
    model,
    prompt,
    new_tokens=config.eval.sample_tokens,
    temperature=config.eval.temperature,
    seed=config.seed,
  )
  return {
    "heldout_documents": len(rows),
    "heldout_seq_len": config.eval_seq_len,
    "heldout_loss": mean_of_buckets(table, "loss"),
    "heldout_loss_updates_off": mean_of_buckets(table, "loss_updates_off"),
    "heldout_loss_baseline": mean_of_buckets(table, "loss_baseline"),
    "heldout_by_position": table,
    "sample": {"prompt": decode(prompt), "continuation": decode(sample)},
  }
