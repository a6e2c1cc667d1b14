"""Computes next-token cross-entropy from logits, or from a model without keeping all its logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from ttt_jax.names import IGNORE
from ttt_jax.nn.layers import Embed, RMSNorm, check_ids, in_vocabulary, project
from ttt_jax.nn.transformer import HEAD_EINSUM, Transformer
from ttt_jax.ops.numerics import accumulation_dtype, where
from ttt_jax.parallel.mesh import Axes, over_shards
from ttt_jax.parallel.parameters import gather_in_dtype

LOGITS_AT_ONCE = 2**25  # per device: 128 MB in float32


def token_losses(
  logits: Float[Array, "B T V"], labels: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Returns losses `-log softmax(logits)[label]` in nats and weights 1, both 0 where the label is IGNORE.

  Computed in the logits' dtype, float32 or wider. A label that is neither IGNORE nor in the vocabulary is
  an error if its value is known; in a traced array its loss is NaN. An ignored token may have any logits,
  also
  NaN: their gradient is 0.

  Raises:
    UserError: a label is outside the vocabulary.
  """
  check_ids("labels", labels, logits.shape[-1], ignore=IGNORE)
  return _losses(where(labels != IGNORE, logits), labels, None, 0.0)


def mean_loss(losses: Float[Array, "B T"], valid: Float[Array, "..."]) -> Float[Array, ""]:
  """Divides the sum of the losses by the number of tokens with a label, those of `valid`."""
  return jnp.sum(losses) / jnp.maximum(jnp.sum(valid), 1)


def model_losses(
  model: Transformer,
  tokens: Int[Array | np.ndarray, "B T"],
  labels: Int[Array | np.ndarray, "B T"],
  segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
  attention_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
  *,
  update: bool = True,
  z_loss: float = 0.0,
  at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Any]:
  """Returns `token_losses(model(tokens), labels)` and the `MlpStats`, with few logits in memory at a time.

  Args:
    model: the model.
    tokens, labels, segment_ids: the packed rows.
    attention_segment_ids: as for `Transformer`.
    update: whether the fast weights learn.
    z_loss, at_once: as for `hidden_losses`.

  Raises:
    UserError: tokens or labels with known values are outside the vocabulary.
  """
  x, stats = model.hidden(tokens, segment_ids, attention_segment_ids, update=update)
  losses, valid = hidden_losses(
    x, labels, model.embed, model.norm, model.head, z_loss=z_loss, at_once=at_once
  )
  return losses, valid, stats


def hidden_losses(
  x: Float[Array, "B T D"],
  labels: Int[Array | np.ndarray, "B T"],
  embed: Embed,
  norm: RMSNorm,
  head: nnx.Param | None,
  *,
  z_loss: float = 0.0,
  at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """Computes `token_losses(next_token_logits(x, embed, norm, head), labels)` with few logits in memory.

  A device computes its part of the vocabulary, `at_once` logits at a time, in the forward pass and again in
  the backward pass. Over `fsdp` the head is gathered once, and its gradient reduced once; over `tensor`
  three numbers per token are exchanged.

  Args:
    x: the last block's output.
    labels: the next tokens, or IGNORE.
    embed, norm, head: the model's parts after its blocks.
    z_loss: weight of `logsumexp(logits)^2`, added to the loss of every token with a label.
    at_once: logits per device in memory.

  Raises:
    UserError: a label with a known value is outside the vocabulary; an unknown one has a loss of NaN.
  """
  rows = ("batch", "sequence")
  tied = head is None
  check_ids("labels", labels, embed.table.shape[0], ignore=IGNORE)
  return over_shards(
    partial(_device_losses, tied=tied, z_loss=z_loss, at_once=at_once),
    x,
    jnp.asarray(labels),
    norm,
    embed.table[...] if tied else head[...],
    dims=((*rows, None), rows, None, ("vocab", "embed") if tied else ("embed", "vocab")),
    out_dims=(rows, rows),
    # With the check, every piece would sum the head's gradient over the shards.
    check_vma=False,
  )


def _device_losses(x, labels, norm, kernel, *, tied, z_loss, at_once, axes: Axes):
  """Returns losses and weights of a device's tokens; an ignored token may have any x, also NaN."""
  x = where(labels != IGNORE, x)
  if axes.fsdp is not None:
    width = 1 if tied else 0
    kernel = gather_in_dtype(
      kernel,
      x.dtype,
      lambda a: jax.lax.all_gather(a, axes.fsdp, axis=width, tiled=True),
      lambda a: jax.lax.psum_scatter(a, axes.fsdp, scatter_dimension=width, tiled=True),
    )

  def losses_of(piece):
    x, labels = piece
    with jax.named_scope("head"):
      logits = project(HEAD_EINSUM[tied], norm(x), kernel, accumulation_dtype(x.dtype))
      return _losses(logits, labels, axes.tensor, z_loss)

  return in_pieces(losses_of, x, labels, max(1, at_once // kernel.shape[0 if tied else 1]))


def in_pieces(
  function: Callable, x: Float[Array, "B T D"], labels: Int[Array, "B T"], size: int
) -> tuple[Shaped[Array, "B T"], ...]:
  """Computes `function((x, labels))`, which treats tokens independently, on `size` tokens at a time.

  The last piece is filled up with tokens whose label is IGNORE. The backward pass recomputes every piece.
  """
  shape, count = labels.shape, labels.size
  if count <= size:
    return function((x, labels))
  filling = -count % size

  def cut(a, fill):
    a = a.reshape(count, *a.shape[2:])
    a = jnp.pad(a, [(0, filling)] + [(0, 0)] * (a.ndim - 1), constant_values=fill)
    return a.reshape(-1, 1, size, *a.shape[1:])

  remat = jax.checkpoint(function, prevent_cse=False)  # inside a scan XLA cannot merge them anyway
  results = jax.lax.map(remat, (cut(x, 0), cut(labels, IGNORE)))
  return tuple(a.reshape(-1)[:count].reshape(shape) for a in results)


def _losses(logits, labels, tensor_axis: str | None, z_loss: float):
  """Computes `token_losses` of logits that are split over the devices of `tensor_axis`, if any."""
  valid = labels != IGNORE
  size = logits.shape[-1]
  in_range = in_vocabulary(labels, size, tensor_axis)
  index = jnp.where(in_range, labels.astype(jnp.int32), 0)
  if tensor_axis is None:
    picked = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
  else:
    index -= size * jax.lax.axis_index(tensor_axis)
    local = (index >= 0) & (index < size)
    picked = jnp.take_along_axis(logits, jnp.where(local, index, 0)[..., None], axis=-1)[..., 0]
    picked = jax.lax.psum(jnp.where(local, picked, jnp.zeros_like(picked)), tensor_axis)
    largest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits, axis=-1)), tensor_axis)
    rest = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
    total = largest + jnp.log(jax.lax.psum(rest, tensor_axis))
  losses = total - picked + z_loss * total**2
  losses = jnp.where(in_range, losses, jnp.full_like(losses, jnp.nan))
  return jnp.where(valid, losses, jnp.zeros_like(losses)), valid.astype(losses.dtype)
