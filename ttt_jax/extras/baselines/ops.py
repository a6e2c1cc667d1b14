"""Computes gated linear attention and the delta rule, whose memory is a matrix per head, in chunks.

These are baselines for the fast weights, simple rather than fast: a `lax.scan` carries one state through
the chunks, and a chunk computes masked products. The backward pass keeps the inputs and the state before
every chunk. K is the width of a key, M that of a value; the whole sequence lies on one device.

A product with masked scores would spread a NaN of one document to others. Therefore the products use finite
inputs, non-finite ones replaced, and NaN is added afterwards to the tokens and states that depend on them.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.errors import UserError
from ttt_jax.ops.documents import check_segment_ids, number_documents
from ttt_jax.ops.linear import finite_cotangent
from ttt_jax.ops.manual import vary_over, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype, finite, matmul, poison, where

# The largest number of tokens among which `_decayed_scores` forms the decay of every pair separately.
_SUB_CHUNK = 16


def gated_linear_attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H M"],
  log_decay: Float[Array, "B T H K"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  state: Float[Array, "B H K M"] | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, "B T H M"], Float[Array, "B H K M"]]:
  """Computes `S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t` and `o_t = q_t S_t`.

  With `b_t` the sum of log_decay over the chunk's tokens up to t (of t's document), and S the state before
  the chunk,

      o_i = (q_i exp(b_i)) S + sum_{j <= i} A_ij v_j        A_ij = sum_k q_ik k_jk exp(b_ik - b_jk)
      S'  = diag(exp(b_C)) S + sum_j (k_j exp(b_C - b_j))^T v_j

  No exponent is positive, so that nothing overflows however fast a channel decays. `exp(-b_j)` alone would
  make A a single product, but may overflow. `_decayed_scores` forms the differences instead, pair by pair
  in sub-chunks of at most 16 tokens, and between sub-chunks through the first token of the later one (the
  paper's secondary chunking).

  Args:
    q, k, v: of any length T; q is used without scaling.
    log_decay: logarithms of decays in (0, 1], finite.
    segment_ids: documents of packed rows. The state restarts at each document, anywhere in a chunk.
      Padding, 0, has output 0 and leaves the state as it is.
    state: the state of the first token's document; None is zero.
    chunk_size: tokens per step of the scan; it changes the work, not the result.

  Returns:
    o in q's dtype, and the state after the last token in `promote_types(dtype, float32)`, the dtype of
    all computation.

  Raises:
    UserError: shapes disagree, chunk_size < 1, or ids are no integers.

  Source: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training
    (arXiv 2312.06635), section 4.
  """
  _check(q, k, v, {"log_decay": (log_decay, k.shape)}, segment_ids, state, chunk_size)
  with jax.named_scope("gated_linear_attention"):
    return _over_chunks(_gated_chunk, (q, k, v, log_decay), segment_ids, state, chunk_size)


def delta_rule(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T H K"],
  v: Float[Array, "B T H M"],
  beta: Float[Array, "B T H"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  state: Float[Array, "B H K M"] | None = None,
  chunk_size: int = 64,
) -> tuple[Float[Array, "B T H M"], Float[Array, "B H K M"]]:
  """Computes `S_t = S_{t-1} - beta_t k_t^T (k_t S_{t-1} - v_t)` and `o_t = q_t S_t`.

  Token i adds `k_i^T u_i` with `u_i = beta_i (v_i - k_i S_{i-1})`. In a chunk that starts from the state S,
  `S_{i-1} = S + sum_{j < i} k_j^T u_j`, so that all u solve one triangular system:

      (I + diag(beta) strict_lower(k k^T)) u = diag(beta) (v - k S)
      o = q S + lower(q k^T) u        S' = S + k^T u

  Args:
    q, k, v: of any length T; keys of norm at most 1 and beta in [0, 1] keep the state bounded.
    beta: the part of a key's stored value that is replaced.
    segment_ids, state, chunk_size: as in `gated_linear_attention`.

  Returns:
    o in q's dtype, and the state after the last token in `promote_types(dtype, float32)`, in which all of
    it is computed.

  Raises:
    UserError: shapes disagree, chunk_size < 1, or ids are no integers.

  Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length
    (arXiv 2406.06484). The system is that of its UT transform, here with the state on the right-hand side.
  """
  _check(q, k, v, {"beta": (beta, k.shape[:-1])}, segment_ids, state, chunk_size)
  with jax.named_scope("delta_rule"):
    return _over_chunks(_delta_chunk, (q, k, v, beta[..., None]), segment_ids, state, chunk_size)


def short_convolution(
  x: Float[Array, "B T H K"],
  kernel: Float[Array, "width H K"],
  *,
  segment_ids: Int[Array, "B T"] | None = None,
  before: Float[Array, "B before H K"] | None = None,
) -> Float[Array, "B T H K"]:
  """Computes `y_t = sum_i kernel[i] x_{t - (width - 1) + i}` per channel, over a token and earlier ones.

  Tokens of another document or before the row count as zero; padding has y = 0. The result has x's dtype;
  sums are formed in float32 or wider.

  Args:
    segment_ids: documents of packed rows, 0 for padding.
    before: the width - 1 tokens before the row, of the first token's document; None means zeros.
  """
  wide = accumulation_dtype(x.dtype)
  width, t = kernel.shape[0], x.shape[1]
  if before is None:
    before = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
  whole = jnp.concatenate([before, x], axis=1)
  documents = None
  if segment_ids is not None:
    first = jnp.repeat(segment_ids[:, :1], width - 1, axis=1)
    documents = number_documents(jnp.concatenate([first, segment_ids], axis=1))
  y = jnp.zeros(x.shape, wide)
  for i in range(width):
    seen = None
    if documents is not None:
      seen = (documents[:, i : i + t] == documents[:, width - 1 :]) & (segment_ids != 0)
    y += where(
      seen, where(seen, whole[:, i : i + t]).astype(wide) * kernel[i].astype(wide)[None, None]
    )
  return y.astype(x.dtype)


class _Masks(NamedTuple):
  """Holds a chunk's document masks, with axes of size 1 for heads and channels.

  Attributes:
    sees: token i sees token j: `j <= i`, in the same document.
    reads: the token belongs to the document of the incoming state.
    writes: the token belongs to the chunk's last document.
    keeps: these two documents are the same.
  """

  sees: Bool[Array, "B 1 C C"]
  reads: Bool[Array, "B 1 C 1"]
  writes: Bool[Array, "B 1 C 1"]
  keeps: Bool[Array, "B 1 1 1"]


def _document_masks(starts: Bool[Array, "B C"]) -> _Masks:
  """Makes the masks from the first tokens of documents; padding belongs to the document before it."""
  number = jnp.cumsum(starts.astype(jnp.int32), axis=1)
  size = starts.shape[1]
  causal = jnp.tril(jnp.ones((1, size, size), bool))
  return _Masks(
    sees=(causal & (number[:, :, None] == number[:, None, :]))[:, None],
    reads=(number == 0)[:, None, :, None],
    writes=(number == number[:, -1:])[:, None, :, None],
    keeps=(number[:, -1:] == 0)[:, None, :, None],
  )


def _where(mask, x):
  return jnp.where(mask, x, jnp.zeros_like(x))


def _over_chunks(
  step: Callable,
  inputs: tuple[Float[Array, "B T H _"], ...],
  segment_ids: Int[Array, "B T"] | None,
  state: Float[Array, "B H K M"] | None,
  chunk_size: int,
) -> tuple[Float[Array, "B T H M"], Float[Array, "B H K M"]]:
  """Scans `step(S, chunk, masks) -> (S', o)` over the chunks, in float32 or wider.

  Padding, also that of the last chunk, has zeros for all inputs: it does not change the state, and its
  output is 0.
  """
  q, _, v = inputs[:3]
  b, t, h, width = q.shape
  wide = accumulation_dtype(q.dtype)
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  real = segment_ids != 0
  before = jnp.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
  starts = (segment_ids != before) & (segment_ids != 0)
  inputs = tuple(where(real, x) for x in inputs)
  bad, bad_state = _depends_on_non_finite(inputs, starts, state)

  size = min(chunk_size, t)
  chunks = -(-t // size)

  def cut(x):
    """Cuts `[B, T, ...]` into `[N, B, C, ...]`, right-padded with zeros."""
    padded = jnp.pad(x, [(0, 0), (0, chunks * size - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(b, chunks, size, *x.shape[2:]), 1, 0)

  cuts = tuple(jnp.swapaxes(cut(finite(x).astype(wide)), 2, 3) for x in inputs)
  if state is None:
    state = jnp.zeros((b, h, width, v.shape[-1]), wide)
  state = finite(state)

  @jax.checkpoint
  def body(state, chunk):
    arrays, starts = chunk
    return step(state, arrays, _document_masks(starts))

  state = vary_over(state.astype(wide), varying_axes(*inputs))
  state, o = lax.scan(body, state, (cuts, cut(starts)))
  o = jnp.moveaxis(o, (0, 2), (1, 3)).reshape(b, chunks * size, h, -1)[:, :t]
  o = (
    finite_cotangent(o, finite(inputs[0]).astype(wide)) + poison(bad & real, wide)[..., None, None]
  )
  state += poison(bad_state, wide)[:, None, None, None]
  return o.astype(q.dtype), state


def _depends_on_non_finite(
  inputs: tuple[Float[Array, "B T H _"], ...],
  starts: Bool[Array, "B T"],
  state: Float[Array, "B H K M"] | None,
) -> tuple[Bool[Array, "B T"], Bool[Array, "B"]]:
  """Returns the tokens, and the rows' last states, that depend on a non-finite number."""
  finite_tokens = (jnp.all(jnp.isfinite(x), axis=(2, 3)) for x in inputs)
  count = jnp.cumsum(~functools.reduce(jnp.logical_and, finite_tokens), axis=1, dtype=jnp.int32)
  if state is not None:
    count += jnp.any(~jnp.isfinite(state), axis=(1, 2, 3)).astype(jnp.int32)[:, None]
  # The count before the first token of each document.
  before = jnp.pad(count[:, :-1], ((0, 0), (1, 0)))
  before = lax.cummax(jnp.where(starts, before, 0), axis=1)
  bad = count > before
  return bad, bad[:, -1]


def _gated_chunk(state, chunk, masks: _Masks):
  q, k, v, log_decay = chunk  # [B H C K]
  # Sums start at each document, so that no rounding of another document's decays enters a difference.
  same = masks.sees.astype(log_decay.dtype)[:, 0]
  b = jnp.einsum("bij,bhjk->bhik", same, log_decay, precision=lax.Precision.HIGHEST)
  total = b[:, :, -1:]
  o = matmul("bhij,bhjm->bhim", _decayed_scores(q, k, b, masks.sees), v)
  o += matmul("bhik,bhkm->bhim", q * _decay(masks.reads, b), state)
  kept = jnp.swapaxes(_decay(masks.keeps, total), 2, 3)
  written = k * _decay(masks.writes, total - b)
  return kept * state + matmul("bhjk,bhjm->bhkm", written, v), o


def _decay(mask, exponent):
  """Returns exp(exponent), and 0 where the mask is off; only there the exponent may be positive."""
  return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def _decayed_scores(
  q: Float[Array, "B H C K"],
  k: Float[Array, "B H C K"],
  b: Float[Array, "B H C K"],
  sees: Bool[Array, "B 1 C C"],
) -> Float[Array, "B H C C"]:
  """Computes `A_ij = sum_k q_ik k_jk exp(b_ik - b_jk)` where i sees j, else 0; b falls along a document.

  Within a sub-chunk the differences are formed for every pair. If j is in an earlier sub-chunk than i, and
  f is the first token of i's sub-chunk, then `exp(b_i - b_j) = exp(b_i - b_f) exp(b_f - b_j)`: a product.
  """
  rows, _, size, width = q.shape
  sub = math.gcd(size, _SUB_CHUNK)
  parts = size // sub

  def split(x):
    return x.reshape(*x.shape[:2], parts, sub, width)

  first = split(b)[:, :, :, :1]
  by_part = sees.reshape(rows, 1, parts, sub, parts, sub)
  same_part = jnp.moveaxis(jnp.diagonal(by_part, axis1=2, axis2=4), -1, 2)  # [B 1 parts i j]
  before = jnp.arange(size)[None, :] < sub * jnp.arange(parts)[:, None]
  earlier = sees[:, :, ::sub] & before[None, None]
  to_first = split(q) * _decay(same_part[..., :1], split(b) - first)
  from_first = k[:, :, None] * _decay(earlier[..., None], first - b[:, :, None])
  across = matmul("bhpik,bhpjk->bhpij", to_first, from_first)
  pairs = _decay(same_part[..., None], split(b)[:, :, :, :, None] - split(b)[:, :, :, None])
  within = jnp.sum(split(q)[:, :, :, :, None] * split(k)[:, :, :, None] * pairs, axis=-1)
  placed = jnp.einsum("bhpij,pr->bhpirj", within, jnp.eye(parts, dtype=within.dtype))
  return across.reshape(*q.shape[:3], size) + placed.reshape(*q.shape[:3], size)


def _delta_chunk(state, chunk, masks: _Masks):
  q, k, v, beta = chunk  # [B H C K], beta [B H C 1]
  read = partial(matmul, "bhik,bhkm->bhim")
  pairs = partial(matmul, "bhik,bhjk->bhij")
  size = k.shape[2]
  sees_earlier = masks.sees & ~jnp.eye(size, dtype=bool)[None, None]
  system = jnp.eye(size, dtype=k.dtype)[None, None] + beta * _where(sees_earlier, pairs(k, k))
  right_side = beta * (v - read(_where(masks.reads, k), state))
  u = solve_triangular(system, right_side, lower=True, unit_diagonal=True)
  o = read(_where(masks.reads, q), state)
  o += matmul("bhij,bhjm->bhim", _where(masks.sees, pairs(q, k)), u)
  return _where(masks.keeps, state) + matmul("bhjk,bhjm->bhkm", _where(masks.writes, k), u), o


def _check(q, k, v, gates, segment_ids, state, chunk_size):
  if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise UserError(f"q has shape {q.shape} and dtype {q.dtype}, expected floating [B, T, H, K]")
  if v.ndim != 4:
    raise UserError(f"v has shape {v.shape}, expected [B, T, H, M]")
  b, t, h, width = q.shape
  expected = {"k": (k, q.shape), "v": (v, (b, t, h, v.shape[-1])), **gates}
  if state is not None:
    expected["state"] = (state, (b, h, width, v.shape[-1]))
  for name, (x, shape) in expected.items():
    if x.shape != shape:
      raise UserError(f"{name} has shape {x.shape}, expected {shape} for q of {q.shape}")
  if segment_ids is not None:
    check_segment_ids(segment_ids, (b, t))
  if chunk_size < 1:
    raise UserError(f"chunk_size={chunk_size} must be at least 1 token")
