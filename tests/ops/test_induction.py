"""The induction setting of the paper's Theorem 1 (Feng et al., arXiv 2604.06169), measured.

Let the token `k` be followed by `v` once, and come again in a later chunk. If activations of equal tokens
agree, `E <z_n, z_s> = c_align`, those of others do not, and embeddings are nearly orthogonal with
`|e_v|^2 = c_norm^2`, then an update towards the next token raises the logit of `v` by
`inner_lr c_norm^2 c_align` on average and changes no other; an update towards the token itself, the target
of reconstruction, does not change the logit of `v`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, Key

import ttt_jax

DRAWS, VOCAB, D, F, T, C = 256, 64, 256, 512, 128, 32
INNER_LR = 0.7


class LogitChanges(NamedTuple):
  """The logit changes behind the key's second occurrence, and what the theorem predicts; one per draw.

  Attributes:
    right: the change for the token that followed the key.
    key: the change for the key itself.
    others: the changes for all other tokens.
    predicted: the theorem's value of `right` under a next-token target.
  """

  right: Float[Array, "draws"]
  key: Float[Array, "draws"]
  others: Float[Array, "draws others"]
  predicted: Float[Array, "draws"]


@partial(jax.jit, static_argnames="look_ahead")
def _induction(seed: Key[Array, ""], align: float, *, look_ahead: bool = True) -> LogitChanges:
  """Draws embeddings, activations and texts, lets `inplace_ttt` read them, and returns the logit changes.

  Embeddings are Gaussian with `E |e|^2 = 1`. A token's activation is `sqrt(align)` of its own random unit
  vector plus a part that is new at every position, so that `c_align = align`. The pair stands in the first
  chunk, the key again at the end; the other tokens are drawn from the rest of the vocabulary.
  """

  def draw(seed):
    seeds = jax.random.split(seed, 5)
    embeddings = jax.random.normal(seeds[0], (VOCAB, D)) * D**-0.5
    of_token = jax.random.normal(seeds[1], (VOCAB, F)) * F**-0.5
    text = jax.random.randint(seeds[2], (T,), 2, VOCAB)
    first = jax.random.randint(seeds[3], (), 0, C - 1)
    text = text.at[first].set(0).at[first + 1].set(1).at[-1].set(0)  # the key 0, the value 1
    of_position = jax.random.normal(seeds[4], (T, F)) * F**-0.5
    z = align**0.5 * of_token[text] + (1 - align) ** 0.5 * of_position
    kernel = jnp.zeros((3, D)).at[2 if look_ahead else 1].set(1.0)
    v = ttt_jax.ntp_targets(embeddings[text], kernel, None, chunk_size=C)
    slow = jnp.zeros((F, D))  # W cancels in the difference
    y, _ = ttt_jax.inplace_ttt(z, v, slow, chunk_size=C, inner_lr=INNER_LR)
    change = embeddings @ y[-1]
    predicted = INNER_LR * align * jnp.sum(embeddings[1] ** 2)
    return LogitChanges(change[1], change[0], change[2:], predicted)

  return jax.lax.map(draw, jax.random.split(seed, DRAWS))


def _mean_and_error(x):
  x = np.asarray(x, np.float64)
  return x.mean(axis=0), x.std(axis=0, ddof=1) / len(x) ** 0.5


@pytest.mark.parametrize("align", [0.3, 0.9])
def test_the_right_tokens_logit_rises_as_predicted_and_no_other(align):
  changes = _induction(jax.random.key(0), align)
  surplus, error = _mean_and_error(changes.right - changes.predicted)
  assert np.asarray(changes.predicted).mean() == pytest.approx(INNER_LR * align, rel=0.02)
  assert abs(surplus) < 4 * error  # in the mean; a draw has the cross-talk of the other tokens
  assert error < 0.05 * INNER_LR
  others, error = _mean_and_error(changes.others)
  assert np.all(np.abs(others) < 5 * error)
  assert np.max(np.abs(others)) < 0.25 * INNER_LR * align
  key, error = _mean_and_error(changes.key)
  assert abs(key) < 4 * error


def test_reconstruction_raises_the_key_and_not_what_followed_it():
  changes = _induction(jax.random.key(1), 0.9, look_ahead=False)
  right, error = _mean_and_error(changes.right)
  assert abs(right) < 4 * error
  assert error < 0.05
  key, _ = _mean_and_error(changes.key)
  assert key == pytest.approx(INNER_LR * 0.9, rel=0.1)
