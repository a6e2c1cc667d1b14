"""Next-token cross-entropy."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE = -1  # the label of a token that has no successor in its document


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


def mean_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
  """The mean over all tokens with a label; 0 where there is none."""
  losses, valid = token_losses(logits, labels)
  return jnp.sum(losses) / jnp.maximum(jnp.sum(valid), 1)
