"""Measures the loss on a fixed last block as the text before it grows, and the loss by position.

Documents are read in pieces with a cache of keys, values and fast weights, so that memory is that of one
piece and the cache for any length, split over the mesh as the model is. Each document is read in three
modes: fast weights updating, frozen, and reset to the slow weights at regular intervals.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float, Int

from ttt_jax.errors import UserError
from ttt_jax.evaluation.paired import bootstrap
from ttt_jax.evaluation.result_file import ResultFile
from ttt_jax.generation.decoder import Cache, Reader
from ttt_jax.generation.pieces import piece_length, room_for
from ttt_jax.generation.state import new_state
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import hidden_losses
from ttt_jax.parallel.mesh import row_shards, to_mesh


@dataclass(frozen=True)
class PerplexityConfig:
  """Configures the evaluation."""

  lengths: tuple[int, ...] = (2048, 4096, 8192)  # tokens before the block
  block: int = 1024  # tokens whose loss is compared
  documents: int = 16  # at most
  reset_every: tuple[int, ...] = ()  # further modes: tokens after which fast weights are reset
  buckets: int = 8  # of the loss by position
  batch: int = 1  # documents at once per shard of the mesh's data and fsdp axes
  seed: int = 0  # for the choice of documents and the intervals

  def __post_init__(self):
    for name in ("block", "documents", "buckets", "batch"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be positive")
    if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
      raise UserError(f"lengths={list(self.lengths)} must be different positive numbers of tokens")
    if any(n < 1 for n in self.reset_every):
      raise UserError(f"reset_every={list(self.reset_every)} must be positive numbers of tokens")

  @property
  def tokens(self) -> int:
    """Returns the tokens of a document."""
    return max(self.lengths) + self.block


@dataclass(frozen=True)
class Mode:
  """Defines whether fast weights learn, and after how many tokens they are reset, if ever."""

  name: str
  update: bool
  reset_every: int | None = None


def modes(reader: Reader, config: PerplexityConfig) -> tuple[Mode, ...]:
  """Returns the modes that differ for this model; a model without fast weights has one mode.

  Raises:
    UserError: a reset would fall inside a chunk.
  """
  if not reader.ttt.layers:
    return (Mode("plain", update=False),)
  chunk = reader.ttt.chunk_size
  for n in config.reset_every:
    if n % chunk:
      raise UserError(
        f"reset_every={n} is not a multiple of ttt.chunk_size={chunk}: a chunk is learned whole"
      )
  resets = (Mode(f"reset {n}", update=True, reset_every=n) for n in config.reset_every)
  return (Mode("updating", update=True), Mode("frozen", update=False), *resets)


def read_losses(
  reader: Reader,
  rows: Int[np.ndarray, "B T"],
  *,
  update: bool = True,
  reset_every: int | None = None,
  start: int = 0,
  on_read: Callable[[int], None] = lambda tokens: None,
) -> Float[np.ndarray, "B S"]:
  """Returns nats per token: entry t of a row is the loss of token start + t + 1 given all before it.

  The losses equal those of one pass over the whole row, although it is read in pieces.

  Args:
    reader: the model.
    rows: one document each, of equal lengths.
    update: whether the fast weights learn.
    reset_every: tokens after which fast weights are reset to the slow weights; the KV cache is kept.
    start: the first token that predicts.
    on_read: called with the number of tokens of each piece.
  """
  mesh = reader.mesh()
  shards = row_shards(mesh)
  total = rows.shape[1]
  filled = np.concatenate([rows, np.repeat(rows[:1], -len(rows) % shards, axis=0)])
  labels = np.pad(filled[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  labels[:, :start] = IGNORE
  chunk = reader.ttt.chunk_size if reader.ttt.layers and update else 1
  no_pending = np.zeros(1, int)  # every piece but the last ends at a chunk's end

  def tokens_to_mesh(x, length, fill):
    x = np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=fill).astype(np.int32)
    return x if mesh is None else to_mesh(x, mesh, "batch", "sequence")

  def counts_to_mesh(count):
    counts = np.full(len(filled), count, np.int32)
    return counts if mesh is None else to_mesh(counts, mesh, "batch")

  parts, position = [], 0
  with nullcontext() if mesh is None else jax.set_mesh(mesh):
    cache, _ = new_state(reader, len(filled), room_for(total), update=update)
    while position < total:
      if reset_every and position and position % reset_every == 0:
        cache = _reset_fast_weights(cache)
      remaining = total - position
      if reset_every:
        remaining = min(remaining, reset_every - position % reset_every)
      length = piece_length([remaining], no_pending, chunk)
      count = min(remaining, length)
      piece = slice(position, position + count)
      losses, cache = _read_piece(
        reader,
        tokens_to_mesh(filled[:, piece], length, 0),
        tokens_to_mesh(labels[:, piece], length, IGNORE),
        cache,
        counts_to_mesh(count),
        with_losses=position + count > start,
      )
      if losses is not None:
        parts.append(process_allgather(losses, tiled=True)[: len(rows), :count])
      position += count
      on_read(count * len(rows))
  return np.concatenate(parts, axis=1)[:, -(total - start) : -1]


@partial(jax.jit, static_argnames="with_losses", donate_argnames="cache")
def _read_piece(
  reader: Reader,
  tokens: Int[Array, "B T"],
  labels: Int[Array, "B T"],
  cache: Cache,
  counts: Int[Array, "B"],
  *,
  with_losses: bool,
) -> tuple[Float[Array, "B T"] | None, Cache]:
  x, cache = reader.hidden(tokens, cache, counts, aligned=True)
  if not with_losses:
    return None, cache
  return hidden_losses(x, labels, reader.embed, reader.norm, reader.head)[0], cache


@partial(jax.jit, donate_argnames="cache")
def _reset_fast_weights(cache: Cache) -> Cache:
  """Resets the fast weights in the cache to the slow weights; valid at a chunk's end."""
  layers = tuple(
    layer._replace(fast=jax.tree.map(jnp.zeros_like, layer.fast)) for layer in cache.layers
  )
  return cache._replace(layers=layers)


def evaluate_perplexity(
  reader: Reader,
  rows: Int[np.ndarray, "documents T"],
  config: PerplexityConfig,
  results: ResultFile,
  *,
  on_read: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Any]:
  """Reads every document in every mode and context that `results` does not hold yet; returns the report.

  The block is the last `config.block` tokens of a row. With c tokens of context, reading starts c tokens
  before the block. Losses by position are those of the longest context.
  """
  at_once = config.batch * row_shards(reader.mesh())
  all_modes = modes(reader, config)
  for first in range(0, len(rows), at_once):
    documents = range(first, min(first + at_once, len(rows)))
    for mode in all_modes:
      for context in sorted(config.lengths):
        if all((mode.name, context, d) in results for d in documents):
          on_read((context + config.block) * len(documents))
          continue
        longest = context == max(config.lengths)
        losses = read_losses(
          reader,
          rows[first : documents.stop, config.tokens - config.block - context :],
          update=mode.update,
          reset_every=mode.reset_every,
          start=0 if longest else context - 1,
          on_read=on_read,
        )
        for document, of_row in zip(documents, losses):
          if (mode.name, context, document) not in results:
            result = {"block": of_row[-config.block :].mean()}
            if longest:
              result["positions"] = [of_row[a:b].mean() for a, b in _edges(config)]
            results.add((mode.name, context, document), result)
  return _report(all_modes, len(rows), config, results)


def tokens_to_read(reader: Reader, documents: int, config: PerplexityConfig) -> int:
  """Returns the sum of the numbers of tokens that `on_read` will get."""
  each = sum(context + config.block for context in config.lengths)
  return documents * len(modes(reader, config)) * each


def settings(
  reader: Reader, rows: Int[np.ndarray, "documents T"], config: PerplexityConfig
) -> dict[str, Any]:
  """Returns the settings of the result file; contexts and modes are not part, so that more can be added."""
  return {
    "evaluation": "perplexity",
    "model": reader.fingerprint(),
    "documents": hashlib.sha256(np.ascontiguousarray(rows, "<i4").tobytes()).hexdigest()[:16],
    "block": config.block,
    "buckets": config.buckets,
    "longest": max(config.lengths),
  }


def _edges(config: PerplexityConfig) -> Sequence[tuple[int, int]]:
  edges = np.linspace(0, config.tokens - 1, config.buckets + 1).round().astype(int)
  return list(pairwise(edges.tolist()))


def _report(
  all_modes, documents: int, config: PerplexityConfig, results: ResultFile
) -> dict[str, Any]:
  def losses(mode, context):
    return np.array([results[mode.name, context, d]["block"] for d in range(documents)])

  def positions(mode):
    longest = max(config.lengths)
    return np.array([results[mode.name, longest, d]["positions"] for d in range(documents)])

  def summary(values):
    low, high = bootstrap(values, seed=config.seed)
    return {"loss": float(values.mean()), "low": low, "high": high}

  contexts = []
  for context in sorted(config.lengths):
    for mode in all_modes:
      loss = summary(losses(mode, context))
      row = {
        "context": context,
        "mode": mode.name,
        **loss,
        "perplexity": float(np.exp(loss["loss"])),
      }
      frozen = [other for other in all_modes if other.name == "frozen" and mode.update]
      if frozen:  # paired differences: losses vary more between documents than between modes
        gain = summary(losses(frozen[0], context) - losses(mode, context))
        row |= {"gain": gain["loss"], "gain_low": gain["low"], "gain_high": gain["high"]}
      contexts.append(row)
  by_position = [
    {"from": a, "to": b, **{mode.name: summary(positions(mode)[:, i]) for mode in all_modes}}
    for i, (a, b) in enumerate(_edges(config))
  ]
  return {
    "asked": dataclasses.asdict(config),
    "documents": documents,
    "block": config.block,
    "modes": [mode.name for mode in all_modes],
    "by_context": contexts,
    "by_position": by_position,
  }
