"""Measures associative recall: whether a model predicts a value that it read before the attention window.

A document is made of two-byte words. Half are pairs of a key (a capital) and its value (a small letter),
drawn for each document; half are noise, two digits. A key always has the same value. Some keys are frequent
and some rare, so that the distances between their occurrences spread over all scales. Only the value of a
key that occurred before is predictable.
"""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from ttt_jax.errors import UserError
from ttt_jax.evaluation.heldout import map_rows
from ttt_jax.files import write_text
from ttt_jax.nn.transformer import Transformer

_KEYS = np.arange(ord("A"), ord("Z") + 1, dtype=np.uint8)
_VALUES = np.arange(ord("a"), ord("z") + 1, dtype=np.uint8)
_DIGITS = np.arange(ord("0"), ord("9") + 1, dtype=np.uint8)

CHANCE = 1 / len(_VALUES)
_FILE = "recall.jsonl"


def make_document(tokens: int, seed: int, index: int) -> str:
  """Generates document `index` of a seed, of `tokens` bytes, an even number."""
  rng = np.random.default_rng([seed, index])
  words = tokens // 2
  rates = 1 / rng.permutation(np.arange(1, len(_KEYS) + 1))  # Zipf: gaps of all lengths
  key = rng.choice(len(_KEYS), size=words, p=rates / rates.sum())
  values = rng.choice(_VALUES, size=len(_KEYS))
  pairs = np.stack([_KEYS[key], values[key]], axis=1)
  noise = rng.choice(_DIGITS, size=(words, 2))
  return np.where(rng.random((words, 1)) < 0.5, pairs, noise).astype(np.uint8).tobytes().decode()


def write_documents(directory: str | Path, *, documents: int, tokens: int, seed: int) -> Path:
  """Writes documents for `data.path` to `recall.jsonl` in a directory, which must not have one.

  Raises:
    UserError: a size is out of range, or the file exists.
  """
  if documents < 2 or tokens < 4 or tokens % 2:
    raise UserError(
      f"documents={documents} must be at least 2 and tokens={tokens} an even number from 4 on"
    )
  path = Path(directory) / _FILE
  if path.exists():
    raise UserError(f"{path} is there already: delete it, or name another directory")
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps({"text": make_document(tokens, seed, i)}) + "\n" for i in range(documents))
  write_text(path, "".join(lines))
  return path


def distances(row: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
  """Returns for every key the tokens since its last occurrence, 0 for a new key and for other tokens.

  Raises:
    UserError: no key of the row occurs twice: it is another kind of text.
  """
  result = np.zeros(len(row), np.int64)
  last = {}
  for t in np.flatnonzero(np.isin(row[:-1], _KEYS) & np.isin(row[1:], _VALUES)):
    key = int(row[t])
    result[t] = t - last[key] if key in last else 0
    last[key] = t
  if not result.any():
    raise UserError(
      "the documents hold no pair twice, such as Kx ... Kx: write some with ttt-jax data recall, and "
      "name their directory as data.path"
    )
  return result


def recalled(
  model: Transformer, rows: Int[np.ndarray, "B T"], mesh: Mesh, *, update: bool = True
) -> Bool[np.ndarray, "B S"]:
  """Tells for each token but the last whether the likeliest next token is the actual one."""
  return map_rows(partial(_likeliest, model, update=update), rows, mesh)[:, :-1] == rows[:, 1:]


@partial(jax.jit, static_argnames="update")
def _likeliest(model: Transformer, rows: Int[Array, "B T"], *, update: bool) -> Int[Array, "B T"]:
  return jnp.argmax(model(rows, update=update), axis=-1)


def by_distance(
  right: Bool[np.ndarray, "B S"], rows: Int[np.ndarray, "B T"], window: int, windows: int = 16
) -> list[dict[str, Any]]:
  """Returns the recall accuracy by the distance to the key's last occurrence, in bins that double.

  Args:
    right: the result of `recalled`.
    rows: the documents.
    window: tokens that attention sees, the unit of distances.
    windows: the distance in windows at which the last bin begins.
  """
  distance = np.stack([distances(row) for row in rows])[:, :-1]
  edges = [0, 1, *(2**i for i in range(1, windows.bit_length())), None]
  table = []
  for low, high in pairwise(edges):
    in_bin = (distance > low * window) & (distance > 0)
    if high is not None:
      in_bin &= distance <= high * window
    count = int(in_bin.sum())
    table.append(
      {
        "from": low * window,
        "to": None if high is None else high * window,
        "queries": count,
        "right": float(right[in_bin].mean()) if count else None,
      }
    )
  return table


def shares(table: list[dict[str, Any]]) -> list[float]:
  """Returns the recall accuracy by distance; NaN, which is not drawn, where there were no queries."""
  return [float("nan") if row["right"] is None else row["right"] for row in table]
