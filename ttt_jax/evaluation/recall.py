"""Associative recall: what was said long before the attention's window, and is asked for once more.

A document is made of two-byte words. Half are pairs, a key (a capital) with its value (a small letter),
which each document draws anew; half are noise, two digits. A key comes again and again, with the same
value: some keys often, some seldom, so that the distances to the last time spread over all scales. After
a key that came before, the value is known to whoever remembers it; nothing else can be foreseen.
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
  """Document `index` of a seed, of so many bytes, an even number."""
  rng = np.random.default_rng([seed, index])
  words = tokens // 2
  rates = 1 / rng.permutation(np.arange(1, len(_KEYS) + 1))  # Zipf: gaps of all lengths
  key = rng.choice(len(_KEYS), size=words, p=rates / rates.sum())
  values = rng.choice(_VALUES, size=len(_KEYS))
  pairs = np.stack([_KEYS[key], values[key]], axis=1)
  noise = rng.choice(_DIGITS, size=(words, 2))
  return np.where(rng.random((words, 1)) < 0.5, pairs, noise).astype(np.uint8).tobytes().decode()


def write_documents(directory: str | Path, *, documents: int, tokens: int, seed: int) -> Path:
  """Writes documents for `data.path`, as `recall.jsonl` in a directory that has none yet.

  Raises:
    UserError: sizes out of range, or the file is there already.
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
  """For every key how many tokens before it came last, 0 for one that is new and for other tokens.

  Raises:
    UserError: no key of the row comes a second time: it is another kind of text.
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
  """Whether the likeliest token after each token but the last is the one that comes."""
  return map_rows(partial(_likeliest, model, update=update), rows, mesh)[:, :-1] == rows[:, 1:]


@partial(jax.jit, static_argnames="update")
def _likeliest(model: Transformer, rows: Int[Array, "B T"], *, update: bool) -> Int[Array, "B T"]:
  return jnp.argmax(model(rows, update=update), axis=-1)


def by_distance(
  right: Bool[np.ndarray, "B S"], rows: Int[np.ndarray, "B T"], window: int, windows: int = 16
) -> list[dict[str, Any]]:
  """How often the value was right, by the distance to the last time in attention windows, doubling.

  Args:
    right: from `recalled`.
    rows: the documents.
    window: tokens that attention sees.
    windows: the last part begins at so many windows.
  """
  distance = np.stack([distances(row) for row in rows])[:, :-1]
  edges = [0, 1, *(2**i for i in range(1, windows.bit_length())), None]
  table = []
  for low, high in pairwise(edges):
    there = (distance > low * window) & (distance > 0)
    if high is not None:
      there &= distance <= high * window
    count = int(there.sum())
    table.append(
      {
        "from": low * window,
        "to": None if high is None else high * window,
        "queries": count,
        "right": float(right[there].mean()) if count else None,
      }
    )
  return table
