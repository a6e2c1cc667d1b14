"""Next-token cross-entropy, of logits or of a model whose logits are too many to keep."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttt_jax.nn.transformer import Transformer, next_token_logits
from ttt_jax.sharding import over_shards, token_shards

IGNORE = -1  # the label of a token that has no successor in its document

LOGITS_AT_ONCE = 2**25  # of a device: 128 MB in float32


def token_losses(
  logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """`-log softmax(logits)[label]` in nats, 0 where the label is IGNORE, and 1 where it is not.

  Computed in the logits' dtype, float32 or wider.
  """
  valid = labels != IGNORE
  picked = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
  losses = jax.nn.logsumexp(logits, axis=-1) - picked
  return jnp.where(valid, losses, jnp.zeros_like(losses)), valid.astype(losses.dtype)


def mean_loss(losses: Float[Array, "B T"], valid: Float[Array, "B T"]) -> Float[Array, ""]:
  """The mean over all tokens with a label; 0 where there is none."""
  return jnp.sum(losses) / jnp.maximum(jnp.sum(valid), 1)


def model_losses(
  model: Transformer,
  tokens: Int[Array | np.ndarray, "B T"],
  labels: Int[Array | np.ndarray, "B T"],
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
  *,
  update: bool = True,
  at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Any]:
  """`token_losses(model(tokens), labels)` and the `MlpStats`, with few logits in memory at a time.

  Beyond `at_once` logits a device reads the head in pieces of its tokens, forward and, computed once
  more, backward. Nothing is exchanged for it but the gradient of the head's own parameters, once.
  """
  labels = jnp.asarray(labels)
  x, stats = model.hidden(tokens, segment_ids, update=update)
  head = (model.embed, model.norm, model.head)
  tokens_at_once = max(1, at_once // model.model.vocab_size)
  if tokens.size <= tokens_at_once * token_shards():
    losses, valid = token_losses(next_token_logits(x, *head), labels)
    return losses, valid, stats

  def in_pieces(x, labels, *head, context_axis):
    return _losses_in_pieces(x, labels, *head, size=tokens_at_once)

  rows = ("batch", "sequence")
  losses, valid = over_shards(
    in_pieces,
    x,
    labels,
    *head,
    dims=((*rows, None), rows, None, None, None),
    out_dims=(rows, rows),
    # Else the head's gradient would be summed over the shards in every piece.
    check_vma=False,
  )
  return losses, valid, stats


def _losses_in_pieces(x, labels, *head, size: int):
  """Losses and weights of the tokens of a device, `size` tokens at a time, the last piece filled up."""
  shape, count = labels.shape, labels.size
  filling = -count % size

  def cut(a, fill):
    a = a.reshape(count, *a.shape[2:])
    a = jnp.pad(a, [(0, filling)] + [(0, 0)] * (a.ndim - 1), constant_values=fill)
    return a.reshape(-1, 1, size, *a.shape[1:])

  def losses_of(piece):
    x, labels = piece
    return token_losses(next_token_logits(x, *head), labels)

  once_more = jax.checkpoint(losses_of, prevent_cse=False)  # in a scan nothing can be shared anyway
  results = jax.lax.map(once_more, (cut(x, 0), cut(labels, IGNORE)))
  return tuple(a.reshape(-1)[:count].reshape(shape) for a in results)
