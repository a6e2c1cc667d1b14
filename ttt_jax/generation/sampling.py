"""Draws the next token from logits, and names the tokens that end a text."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.config import ModelConfig
from ttt_jax.errors import UserError


def stop_tokens(model: ModelConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
  """Returns the ids that end a text, of the model's config and of its tokenizer.

  The config of a model that was trained from scratch has none.
  """
  tokenizer_ids = () if tokenizer is None else tokenizer.eos_ids
  ids = dict.fromkeys((*model.eos_ids, *tokenizer_ids))
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
  """Draws a token per row from `softmax(logits / temperature)`, or takes the likeliest at temperature 0.

  Candidates are the `top_k` likeliest tokens, of these the fewest whose probabilities sum to at least
  `top_p`, and of these the tokens at least `min_p` times as likely as the likeliest. A row's draw depends
  only on the seed, the row's index and the token's position: neither on other rows, nor on where generation
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
    if min_p:  # log p - log max p does not depend on the tokens dropped before
      scaled = jnp.where(scaled - scaled[:, :1] >= math.log(min_p), scaled, -jnp.inf)
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)

    def of_row(row, position, scaled):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)
      return jax.random.categorical(key, scaled)

    index = jax.vmap(of_row)(rows, position, scaled)
    return jnp.take_along_axis(token, index[:, None], axis=1)[:, 0]

  chosen = jax.lax.cond(temperature > 0, draw, lambda _: likeliest.astype(jnp.int32), None)
  return chosen.astype(jnp.int32)
