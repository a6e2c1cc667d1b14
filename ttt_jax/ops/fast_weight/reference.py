"""Computes the same mathematics token by token: the reference of the tests of every implementation.

Memory is `[T, T]`; use it at float64 in tests and nowhere else. It computes

    o_t = z_t (W + inner_lr * sum of z_s^T v_s over s with chunk(s) < chunk(t), document(s) = document(t))

with a decay per chunk in between, a clip factor per chunk, and the incoming state for the first document.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def inplace_ttt_reference(
  z: Float[Array, "B T F"],
  v: Float[Array, "B T D"],
  w_down: Float[Array, "F D"],
  *,
  chunk_size: int,
  inner_lr: float | int | Float[Array, ""],
  state: Float[Array, "B F D"] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  decay: float | int | Float[Array, ""] | None = None,
  clip_norm: float | int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B F D"]]:
  """Computes y and S of `ttt_jax.inplace_ttt`, in the dtype of the inputs."""
  b, t, f = z.shape
  if state is None:
    state = jnp.zeros((b, f, v.shape[-1]), z.dtype)
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  rows = [
    _row(
      z[i],
      v[i],
      w_down,
      state[i],
      segment_ids[i],
      chunk_size,
      inner_lr,
      jnp.ones((), z.dtype) if decay is None else decay,
      clip_norm,
    )
    for i in range(b)
  ]
  return jnp.stack([y for y, _ in rows]), jnp.stack([s for _, s in rows])


def _row(z, v, w_down, state, segment_ids, chunk_size, inner_lr, decay, clip_norm):
  t = z.shape[0]
  token = jnp.arange(t)
  chunk = token // chunk_size
  chunks = t // chunk_size
  starts = jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]])
  document = jnp.cumsum(starts)
  real = segment_ids != 0

  # The tokens of its last document make the update of chunk c, whose norm gives the clip factor.
  factor = jnp.ones(t, z.dtype)
  if clip_norm is not None:
    for c in range(chunks):
      last = document[(c + 1) * chunk_size - 1]
      member = (chunk == c) & (document == last) & real
      u = inner_lr * jnp.einsum("tf,td->fd", jnp.where(member[:, None], z, 0), v)
      norm = jnp.where(jnp.any(u != 0), jnp.sqrt(jnp.sum(jnp.where(jnp.any(u != 0), u, 1) ** 2)), 0)
      factor = jnp.where(
        (chunk == c) & (norm > clip_norm), clip_norm / jnp.maximum(norm, clip_norm), factor
      )

  def update_weights(query_chunk, query_document, query_real):
    """Returns the weight of token s's update in the state that each query reads: `[queries, T]`."""
    steps = query_chunk[:, None] - 1 - chunk[None, :]
    visible = (
      (steps >= 0)
      & (chunk < chunks)[None, :]
      & (query_document[:, None] == document[None, :])
      & query_real[:, None]
      & real[None, :]
    )
    return jnp.where(visible, decay ** jnp.maximum(steps, 0).astype(z.dtype) * factor[None, :], 0)

  def incoming_weights(query_chunk, query_document, query_real):
    """Returns the weight of the incoming state in the state that each query reads: `[queries]`."""
    return jnp.where((query_document == 0) & query_real, decay ** query_chunk.astype(z.dtype), 0)

  weights = update_weights(chunk, document, real)
  fast = inner_lr * (weights * jnp.einsum("tf,sf->ts", z, z)) @ v
  fast += incoming_weights(chunk, document, real)[:, None] * (z @ state)
  y = z @ w_down + fast

  if chunks == 0:
    return y, state
  end = jnp.array([chunks * chunk_size - 1])
  query = (jnp.array([chunks]), document[end], real[end])
  s = (
    inner_lr * jnp.einsum("s,sf,sd->fd", update_weights(*query)[0], z, v)
    + incoming_weights(*query)[0] * state
  )
  return y, s


def least_squares_reference(
  z: Float[Array, "B T F"],
  v: Float[Array, "B T D"],
  w_down: Float[Array, "F D"],
  *,
  chunk_size: int,
  ridge: float | Float[Array, ""],
  read_scale: float | Float[Array, ""] = 1.0,
  read_gate: tuple | None = None,
  key_projection: Float[Array, "F R"] | None = None,
  state: tuple[Float[Array, "B R R"], Float[Array, "B R D"]] | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  decay: float | int | Float[Array, ""] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B R R"], Float[Array, "B R D"]]:
  """Returns what `ttt_jax.inplace_ttt` computes with `rule="least_squares"`: y, A and D.

  Every token solves for itself, with the sums over the tokens that it sees:

      A_t = sum of w_ts k_s^T k_s        D_t = sum of w_ts k_s^T v_s        k = z P / |z P|
      o_t = z_t W + read_scale g_t k_t (A_t + ridge tr(A_t) / F I)^-1 D_t
  """
  b, t, _ = z.shape
  q = z if key_projection is None else z @ key_projection
  r = q.shape[-1]
  if state is None:
    state = jnp.zeros((b, r, r), z.dtype), jnp.zeros((b, r, v.shape[-1]), z.dtype)
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  decay = jnp.ones((), z.dtype) if decay is None else decay
  rows = [
    _least_squares_row(
      z[i],
      q[i],
      v[i],
      w_down,
      (state[0][i], state[1][i]),
      segment_ids[i],
      chunk_size,
      ridge,
      read_scale,
      read_gate,
      decay,
    )
    for i in range(b)
  ]
  return tuple(map(jnp.stack, zip(*rows)))


def _least_squares_row(
  z, q, v, w_down, state, segment_ids, chunk_size, ridge, read_scale, read_gate, decay
):
  t, r = q.shape
  chunk = jnp.arange(t) // chunk_size
  chunks = t // chunk_size
  document = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), segment_ids[1:] != segment_ids[:-1]]))
  is_zero = jnp.all(q == 0, axis=-1, keepdims=True)
  k = jnp.where(is_zero, 0, q / jnp.sqrt(jnp.sum(jnp.where(is_zero, 1, q) ** 2, -1, keepdims=True)))

  def sums(at_chunk, at_document, at_real):
    """Returns A and D as one token sees them."""
    steps = at_chunk - 1 - chunk
    visible = (steps >= 0) & (chunk < chunks) & (document == at_document) & (segment_ids != 0)
    weights = jnp.where(visible & at_real, decay ** jnp.maximum(steps, 0).astype(z.dtype), 0)
    left = jnp.where((at_document == 0) & at_real, decay ** at_chunk.astype(z.dtype), 0)
    return (
      jnp.einsum("s,sf,sg->fg", weights, k, k) + left * state[0],
      jnp.einsum("s,sf,sd->fd", weights, k, v) + left * state[1],
    )

  def read(z_t, k_t, *at):
    a, d = sums(*at)
    trace = jnp.trace(a)
    m = jnp.where(
      trace == 0, jnp.eye(r, dtype=z.dtype), a + ridge * trace / r * jnp.eye(r, dtype=z.dtype)
    )
    fast = read_scale * k_t @ jnp.linalg.solve(m, d)
    if read_gate is not None:
      threshold, sharpness, *direction = read_gate
      leverage = k_t @ jnp.linalg.solve(m, a @ k_t)
      logit = sharpness * (leverage - threshold) + sum(k_t @ x for x in direction)
      fast *= 1 / (1 + jnp.exp(-logit))
    return z_t @ w_down + fast

  y = jax.vmap(read)(z, k, chunk, document, segment_ids != 0)
  if chunks == 0:
    return y, *state
  end = chunks * chunk_size - 1
  return y, *sums(jnp.array(chunks), document[end], segment_ids[end] != 0)


def ntp_targets_reference(
  x: Float[Array, "B T D"],
  conv: Float[Array, "width D"],
  projection: Float[Array, "D D"] | None,
  *,
  chunk_size: int,
  segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
  """Computes `ttt_jax.ntp_targets` with one `[T, T]` mask per tap."""
  b, t, _ = x.shape
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  token = jnp.arange(t)
  chunk = token // chunk_size
  starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  document = jnp.cumsum(starts, axis=1)
  allowed = (
    (chunk[:, None] == chunk[None, :])[None]
    & (document[:, :, None] == document[:, None, :])
    & (segment_ids != 0)[:, :, None]
  )
  v = jnp.zeros_like(x)
  for k in range(conv.shape[0]):
    tap = allowed & (token[None, :] == token[:, None] + k - conv.shape[0] // 2)[None]
    v += jnp.einsum("bts,bsd,d->btd", tap.astype(x.dtype), x, conv[k])
  return v if projection is None else jnp.einsum("btd,de->bte", v, projection)
