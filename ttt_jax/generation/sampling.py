"""Which token comes next, given the logits, and which is the last."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.config import ModelConfig
from ttt_jax.errors import UserError


def stop_tokens(model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
  """The tokens that end a text: the model's own, and those that end its tokenizer's texts.

  A model that was trained from scratch has none of its own.
  """
  known = () if tokenizer is None else tokenizer.eos_ids
  ids = dict.fromkeys((*model.eos_ids, *known))
  return tuple(token for token in ids if token < model.vocab_size)


def check_sampling(
  temperature: float, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> None:
  """Raises UserError for a value out of range."""
  if not 0 <= temperature < float("inf"):
    raise UserError(f"temperature={temperature} must be 0 (greedy) or positive")
  if top_k is not None and top_k < 1:
    raise UserError(f"top_k={top_k} must be at least 1; None for all tokens")
  if top_p is not None and not 0 < top_p <= 1:
    raise UserError(f"top_p={top_p} must be in (0, 1]; None for all tokens")
  if min_p is not None and not 0 <= min_p <= 1:
    raise UserError(f"min_p={min_p} must be in [0, 1]; None for all tokens")


def sample(
  logits: Float[Array, "B V"],
  seed: Int[Array, ""],
  position: Int[Array, "B"],
  temperature: Float[Array, ""],
  *,
  top_k: int | None,
  top_p: float | None,
  min_p: float | None = None,
) -> Int[Array, "B"]:
  """A token per row from `softmax(logits / temperature)`, or the likeliest at temperature 0.

  Only the `top_k` likeliest tokens are drawn from, of these the fewest whose probabilities sum to at least
  `top_p`, and of these the ones at least `min_p` times as likely as the likeliest. What a row draws depends
  on the seed, its index and the position of the token alone: not on the rows beside it, nor on where a text
  was interrupted.
  """
  likeliest = jnp.argmax(logits, axis=-1)

  def draw(_):
    k = logits.shape[1] if top_k is None else min(top_k, logits.shape[1])
    scaled, token = jax.lax.top_k(logits / temperature, k)
    if top_p is not None:
      p = jax.nn.softmax(scaled, axis=-1)
      before = jnp.cumsum(p, axis=-1) - p
      scaled = jnp.where(before < top_p, scaled, -jnp.inf)
    if min_p:  # log p - log max p, whatever has been dropped before
      scaled = jnp.where(scaled - scaled[:, :1] >= math.log(min_p), scaled, -jnp.inf)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)

    def of_row(row, position, scaled):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
      return jax.random.categorical(key, scaled)

    place = jax.vmap(of_row)(rows, position, scaled)
    return jnp.take_along_axis(token, place[:, None], axis=1)[:, 0]

  chosen = jax.lax.cond(temperature > 0, draw, lambda _: likeliest.astype(jnp.int32), None)
  return chosen.astype(jnp.int32)
