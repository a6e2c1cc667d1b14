"""Measures what a model knows of facts that attention cannot see: answers behind a cut, right or not."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttt_jax.data.facts import FactRow
from ttt_jax.nn.transformer import Transformer


@jax.jit
def _answers(
  model: Transformer, tokens: Int[Array, "B T"], attention: Int[Array, "B T"]
) -> tuple[Float[Array, "B S"], Float[Array, "B S"]]:
  """Nats of every token but the first, and whether the model's likeliest token is it."""
  logits = model(tokens, jnp.ones_like(tokens), attention)[:, :-1]
  nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)[..., 0]
  return nats, jnp.argmax(logits, axis=-1) == tokens[:, 1:]


def score_facts(model: Transformer, rows: Sequence[FactRow], *, batch: int = 4) -> dict[str, Any]:
  """Reads rows with attention cut between their halves, fast weights going on over the cut.

  Args:
    model: a model; without fast weights it knows nothing of the first half.
    rows: rows of one length.
    batch: rows read at once.

  Returns:
    `answers` and `firsts`: the share of right tokens, of all answers and of those that begin one; `nats`
    per token of an answer; `tokens`: how many these are; `by_kind`: `answers` of each kind.
  """
  nats, right, firsts, kinds = [], [], [], []
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    tokens = np.asarray([row.tokens for row in part], np.int32)
    attention = np.ones_like(tokens)
    for i, row in enumerate(part):
      attention[i, row.cut :] = 2
    row_nats, row_right = map(np.asarray, _answers(model, tokens, attention))
    for i, row in enumerate(part):
      places = np.asarray(row.answers) - 1
      nats.append(row_nats[i, places])
      right.append(row_right[i, places])
      firsts.append(np.isin(row.answers, row.firsts))
      kinds += row.kinds
  nats, right, firsts = map(np.concatenate, (nats, right, firsts))
  kinds = np.asarray(kinds)
  return {
    "answers": float(right.mean()),
    "firsts": float(right[firsts].mean()),
    "nats": float(nats.mean()),
    "tokens": len(right),
    "by_kind": {kind: float(right[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))},
  }
