"""Ways to read a fast weight along its chunks: one meaning, two uses of memory.

    R_i     = Z_i S_i
    S_{i+1} = keep_i decay S_i + r_i U_i        U_i = lr Z_i^T V_i,  r_i = min(1, tau / |U_i|_F)

Both functions take z `[B, N, C, F]` and v `[B, N, C, D]` of the N > 0 full chunks, the incoming state
`[B, F, D]`, keep `[B, N]` (0 where a document ends, else 1), and return R, the state after this
device's last chunk, and the norms of `r_i U_i`. With `context_axis` the incoming state is that of the
whole sequence, and each device first receives what the shards before it add to it. Which tokens read
and write is the caller's business: masks on V and on R.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ttt_jax.ops.context import exchange, exclusive_prefix, vary_over, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.ops.update import Update, apply_update, combine, scale

# The name under which `jax.checkpoint` policies can save the state that came in from other shards,
# so that rematerialisation recomputes the chunks but exchanges nothing again.
INCOMING_STATE = "ttt_incoming_state"


def read(z: Float[Array, "B C F"], s: Float[Array, "B F D"]) -> Float[Array, "B C D"]:
  """`z S` for one chunk; S is rounded to z's dtype for the product only."""
  return _matmul("bcf,bfd->bcd", z, s.astype(z.dtype))


def _matmul(subscripts: str, x: Array, y: Array) -> Array:
  """A product of operands of one dtype, accumulated and returned in at least float32."""
  return jnp.einsum(subscripts, x, y, preferred_element_type=accumulation_dtype(x.dtype))


def _clip(u: Float[Array, "*B F D"], clip_norm: float | None):
  """Returns `r u`, the factor r and the norm of u, with `r = min(1, clip_norm / |u|_F)`."""
  square = jnp.sum(u * u, axis=(-2, -1))
  # sqrt has no gradient at 0, where the clip is inactive anyway.
  norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  if clip_norm is None:
    return u, jnp.ones_like(norm), norm
  r = jnp.where(norm > clip_norm, clip_norm / jnp.where(norm > clip_norm, norm, 1), 1)
  return scale(r, u), r, norm


def associative(
  z: Float[Array, "B N C F"],
  v: Float[Array, "B N C D"],
  s_in: Float[Array, "B F D"],
  keep: Float[Array, "B N"],
  lr: Float[Array, ""],
  decay: float | int | Float[Array, ""] | None,
  *,
  clip_norm: float | None,
  context_axis: str | None,
  collective: str | None,
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"], Float[Array, "B N"]]:
  """`jax.lax.associative_scan` over the chunks; every chunk's state is in memory at once."""
  u = lr * _matmul("bncf,bncd->bnfd", z, v)
  u, r, norm = _clip(u.astype(s_in.dtype), clip_norm)
  keep = keep if decay is None else keep * decay
  upto = lax.associative_scan(combine, Update(keep, u), axis=1)
  total = Update(upto.keep[:, -1], upto.delta[:, -1])
  if context_axis is not None:
    s_in = apply_update(exclusive_prefix(total, context_axis, collective=collective), s_in)
    s_in = checkpoint_name(s_in, INCOMING_STATE)
  s_end = apply_update(total, s_in)
  # Exclusive: chunk i reads the state made by chunks 0 to i-1, the incoming one for i = 0.
  after = scale(upto.keep, jnp.broadcast_to(s_in[:, None], u.shape)) + upto.delta
  before = jnp.concatenate([s_in[:, None], after[:, :-1]], axis=1)
  reads = _matmul("bncf,bnfd->bncd", z, before.astype(z.dtype))
  return reads, s_end, r * norm


def sequential(
  z: Float[Array, "B N C F"],
  v: Float[Array, "B N C D"],
  s_in: Float[Array, "B F D"],
  keep: Float[Array, "B N"],
  lr: Float[Array, ""],
  decay: float | int | Float[Array, ""] | None,
  *,
  clip_norm: float | None,
  context_axis: str | None,
  collective: str | None,
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"], Float[Array, "B N"]]:
  """One state carried through the chunks, forward and backward; nothing is kept per chunk.

  Saved for the backward pass: the inputs and the state that came in, after the exchange.
  """
  learn_decay = isinstance(decay, jax.Array)
  if not learn_decay:
    # A constant decay joins the keeps; only a traced one needs the tangent pass of the backward.
    keep = keep if decay is None else keep * decay
    decay = jnp.ones_like(lr, s_in.dtype)
  return _sequential(
    z, v, s_in, keep, lr, decay, (learn_decay, clip_norm, context_axis, collective)
  )


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _sequential(z, v, s_in, keep, lr, decay, static):
  return _sequential_fwd(z, v, s_in, keep, lr, decay, static)[0]


def _chunk(x: Array, i: Array) -> Array:
  return lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _put(x: Array, value: Array, i: Array) -> Array:
  return lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, axis=1)


def _zeros(shape: tuple[int, ...], dtype, like: Array) -> Array:
  """Zeros that vary over the mesh axes over which `like` varies: what a loop's carry must do."""
  return vary_over(jnp.zeros(shape, dtype), varying_axes(like))


def _update(z_i, v_i, lr, clip_norm, dtype):
  """`r U`, r and |U| of one chunk, in the state's dtype."""
  return _clip((lr * _matmul("bcf,bcd->bfd", z_i, v_i)).astype(dtype), clip_norm)


def _sequential_fwd(z, v, s_in, keep, lr, decay, static):
  _, clip_norm, context_axis, collective = static
  n = z.shape[1]
  factors = keep * decay

  def step(i, s):
    u, r, norm = _update(_chunk(z, i), _chunk(v, i), lr, clip_norm, s.dtype)
    return apply_update(Update(_chunk(factors, i), u), s), r * norm

  if context_axis is not None:
    with jax.named_scope("shard_total"):
      total = Update(
        keep=jnp.prod(factors, axis=1),
        delta=lax.fori_loop(0, n, lambda i, s: step(i, s)[0], jnp.zeros_like(s_in)),
      )
    s_in = apply_update(exchange(total, context_axis, collective, False), s_in)
    s_in = checkpoint_name(s_in, INCOMING_STATE)

  def body(i, carry):
    s, reads, norms = carry
    reads = _put(reads, read(_chunk(z, i), s), i)  # before the update: strictly causal
    s, norm = step(i, s)
    return s, reads, _put(norms, norm, i)

  reads = _zeros(v.shape, accumulation_dtype(z.dtype), z)
  with jax.named_scope("chunks"):
    s_end, reads, norms = lax.fori_loop(0, n, body, (s_in, reads, jnp.zeros_like(keep)))
  return (reads, s_end, norms), (z, v, s_in, keep, lr, decay)


def _sequential_bwd(static, saved, cotangents):
  """Two passes over the chunks, each with one state.

  Backwards, with G_i the cotangent of S_i (G_N that of the outgoing state):

      G_i   = keep_i decay G_{i+1} + Z_i^T dR_i
      dU_i  = r_i (G_{i+1} - <U_i, G_{i+1}> / |U_i|^2 U_i  where clipped)
      dV_i  = lr Z_i dU_i        dZ_i += lr V_i dU_i^T        dlr = sum_i <V_i, Z_i dU_i>

  Forwards, with S_i recomputed: dZ_i += dR_i S_i^T. The decay's gradient needs S_i and G_{i+1} at
  once; its tangent T_i = dS_i/d(decay) is carried forwards instead:

      T_{i+1} = keep_i (decay T_i + S_i)        d(decay) = sum_i <Z_i T_i, dR_i> + <T_N, G_N>

  Across shards, G_N is the cotangent of this shard's own outgoing state plus what the shards after it
  send back: an exclusive suffix of the same operator, of (prod_i keep_i decay, this shard's G_0).
  """
  learn_decay, clip_norm, context_axis, collective = static
  z, v, s_in, keep, lr, decay = saved
  d_reads, g_out, _ = cotangents
  n = z.shape[1]
  factors = keep * decay
  d_reads = d_reads.astype(z.dtype)

  def pull_back(i, g):
    """G_i from G_{i+1}."""
    own = _matmul("bcf,bcd->bfd", _chunk(z, i), _chunk(d_reads, i)).astype(g.dtype)
    return apply_update(Update(_chunk(factors, i), own), g)

  if context_axis is not None:
    with jax.named_scope("shard_cotangent"):
      own = lax.fori_loop(0, n, lambda j, g: pull_back(n - 1 - j, g), g_out)
    suffix = exchange(Update(jnp.prod(factors, axis=1), own), context_axis, collective, True)
    g_out = g_out + suffix.delta

  def forwards(i, carry):
    s, tangent, dz, d_decay = carry
    z_i, dr_i = _chunk(z, i), _chunk(d_reads, i)
    dz = _put(dz, _matmul("bcd,bfd->bcf", dr_i, s.astype(z.dtype)), i)
    u, _, _ = _update(z_i, _chunk(v, i), lr, clip_norm, s.dtype)
    if learn_decay:
      d_decay += jnp.sum(read(z_i, tangent) * dr_i.astype(accumulation_dtype(z.dtype)))
      tangent = scale(_chunk(keep, i), decay * tangent + s)
    s = apply_update(Update(_chunk(factors, i), u), s)
    return s, tangent, dz, d_decay

  tangent = jnp.zeros_like(s_in) if learn_decay else None
  d_decay = jnp.zeros_like(lr)
  with jax.named_scope("chunks_forwards"):
    _, tangent, dz, d_decay = lax.fori_loop(
      0, n, forwards, (s_in, tangent, jnp.zeros_like(z), d_decay)
    )
  if learn_decay:
    d_decay = d_decay.astype(decay.dtype) + jnp.sum(tangent * g_out)

  def backwards(j, carry):
    i = n - 1 - j
    g, dz, dv, d_lr = carry
    z_i, v_i = _chunk(z, i), _chunk(v, i)
    du = g
    if clip_norm is not None:
      clipped, r, norm = _update(z_i, v_i, lr, clip_norm, g.dtype)
      along = jnp.sum(clipped * g, axis=(-2, -1)) / (r * jnp.where(norm > clip_norm, norm, 1) ** 2)
      along = jnp.where(norm > clip_norm, along, 0)
      du = scale(r, g - scale(along / r, clipped))
    du = du.astype(z.dtype)
    z_du = _matmul("bcf,bfd->bcd", z_i, du)
    d_lr += jnp.sum(z_du * v_i.astype(z_du.dtype))
    dv = _put(dv, lr * z_du, i)
    dz_i = _chunk(dz, i).astype(z_du.dtype) + lr * _matmul("bcd,bfd->bcf", v_i, du)
    return pull_back(i, g), _put(dz, dz_i, i), dv, d_lr

  with jax.named_scope("chunks_backwards"):
    g_in, dz, dv, d_lr = lax.fori_loop(
      0, n, backwards, (g_out, dz, jnp.zeros_like(v), jnp.zeros_like(lr))
    )
  if context_axis is not None:
    # The state before the whole sequence enters on the first shard only.
    g_in = jnp.where(lax.axis_index(context_axis) == 0, g_in, jnp.zeros_like(g_in))
  # keep holds the document borders (and a constant decay): no gradient.
  return dz, dv, g_in, jnp.zeros_like(keep), d_lr, d_decay.astype(decay.dtype)


_sequential.defvjp(_sequential_fwd, _sequential_bwd)
