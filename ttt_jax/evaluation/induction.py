"""The induction setting of the paper's Theorem 1, made to measure: one pair seen once, its key seen again.

The theorem (Feng et al., arXiv 2604.06169): let the token `k` be followed by `v` once, and come again in a
later chunk. If activations of equal tokens agree, `E <z_n, z_s> = c_align`, those of others do not, and
embeddings are nearly orthogonal with `|e_v|^2 = c_norm^2`, then an update towards the next token raises the
logit of `v` by `inner_lr c_norm^2 c_align` on average and moves no other; one towards the token itself,
the target of reconstruction, does not move `v`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ttt_jax.ops.fast_weight.api import inplace_ttt
from ttt_jax.ops.fast_weight.targets import ntp_targets


class LogitChanges(NamedTuple):
  """What a fast weight that read the text adds to the logits behind the key, by draw of the setting.

  Attributes:
    right: of the token that followed the key.
    key: of the key itself.
    others: of every other token.
    predicted: what the theorem says of `right` under a next-token target.
  """

  right: Float[Array, "draws"]
  key: Float[Array, "draws"]
  others: Float[Array, "draws others"]
  predicted: Float[Array, "draws"]


@partial(
  jax.jit,
  static_argnames=("draws", "vocab", "d_model", "d_ff", "tokens", "chunk_size", "look_ahead"),
)
def induction(
  seed: Key[Array, ""],
  *,
  draws: int = 256,
  vocab: int = 64,
  d_model: int = 256,
  d_ff: int = 512,
  tokens: int = 128,
  chunk_size: int = 32,
  inner_lr: float | Float[Array, ""] = 0.5,
  align: float | Float[Array, ""] = 0.8,
  look_ahead: bool = True,
) -> LogitChanges:
  """Draws embeddings, activations and texts, lets `inplace_ttt` read them, and looks at the logits.

  Embeddings are Gaussian with `E |e|^2 = 1`. A token's activation is `sqrt(align)` of its own random unit
  vector plus a part that is new at every place, so that `c_align = align`. The pair stands in the first
  chunk, the key again at the end; the other tokens are drawn from the rest of the vocabulary.

  Args:
    align: c_align, from 0 to 1.
    look_ahead: the next-token target; False is the target of reconstruction.
  """

  def draw(seed):
    seeds = jax.random.split(seed, 5)
    embeddings = jax.random.normal(seeds[0], (vocab, d_model)) * d_model**-0.5
    own = jax.random.normal(seeds[1], (vocab, d_ff)) * d_ff**-0.5
    text = jax.random.randint(seeds[2], (tokens,), 2, vocab)
    place = jax.random.randint(seeds[3], (), 0, chunk_size - 1)
    text = text.at[place].set(0).at[place + 1].set(1).at[-1].set(0)  # the key 0, the value 1
    new = jax.random.normal(seeds[4], (tokens, d_ff)) * d_ff**-0.5
    z = align**0.5 * own[text] + (1 - align) ** 0.5 * new
    kernel = jnp.zeros((3, d_model)).at[2 if look_ahead else 1].set(1.0)
    v = ntp_targets(embeddings[text], kernel, None, chunk_size=chunk_size)
    slow = jnp.zeros((d_ff, d_model))  # W cancels in the difference
    y, _ = inplace_ttt(z, v, slow, chunk_size=chunk_size, inner_lr=inner_lr)
    change = embeddings @ y[-1]
    predicted = inner_lr * align * jnp.sum(embeddings[1] ** 2)
    return LogitChanges(change[1], change[0], change[2:], predicted)

  return jax.lax.map(draw, jax.random.split(seed, draws))
