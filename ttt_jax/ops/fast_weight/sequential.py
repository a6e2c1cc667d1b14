"""`implementation="sequential"`: a loop carries one state through the chunks, forward and backward.

No state is kept per chunk. With the slow weight W a chunk is read in one product, `Z_i (W + S_i)`; without
W, `Z_i S_i` is returned and the caller adds `Z W`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import exchange_updates, incoming_state
from ttt_jax.ops.fast_weight.chunks import (
  Chunks,
  UpdateSettings,
  keep_factors,
  no_cotangent,
  set_chunk,
  take_chunk,
  where_kept,
)
from ttt_jax.ops.linear import reverse_only
from ttt_jax.ops.manual import varying_zeros
from ttt_jax.ops.numerics import accumulation_dtype, matmul, where
from ttt_jax.ops.update import (
  Update,
  clip_factor,
  clip_update,
  prefix_keeps,
  scale,
  sum_over,
  times,
)


class Outputs(NamedTuple):
  """Holds the outputs of `sequential`.

  Attributes:
    y: R; with a W instead `Z (W + S)`, in z's dtype.
    state: the state after this device's last chunk.
    samples: with a W and `sample_places`, R of the tokens at these places.
  """

  y: Float[Array, "B N C D"]
  state: Float[Array, "B F D"]
  samples: Float[Array, "B N samples D"] | None


def sequential(
  chunks: Chunks,
  settings: UpdateSettings,
  exchange: Exchange | None,
  w: Float[Array, "F D"] | None = None,
  *,
  sample_places: slice | None = None,
) -> Outputs:
  """Reads the chunks and updates the state one after another; with a W, reads `W + S` in one product.

  The backward pass keeps the inputs and the incoming state, after the exchange. First derivatives
  in reverse mode only; the gradient itself is differentiable.

  Args:
    chunks, rule: see `chunks.py`.
    exchange: how shards exchange their updates; None when the sequence lies on one device.
    w: the slow weight, or None.
    sample_places: the places in every chunk of the tokens whose R is returned by itself, for statistics.
  """
  if chunks.s_in is None:
    b, _, _, f = chunks.z.shape
    s_in = varying_zeros((b, f, chunks.v.shape[-1]), settings.state_dtype, chunks.z)
    chunks = chunks._replace(s_in=s_in)
  chunks, w = reverse_only(
    (chunks, w),
    "implementation='sequential', which None chose if you did not: pass implementation='dual' or "
    "'associative'",
  )
  return _sequential(chunks, w, settings, exchange, sample_places)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _sequential(chunks, w, settings, exchange, sample_places):
  return _sequential_fwd(chunks, w, settings, exchange, sample_places)[0]


def _next_state(factor, u, s):
  """Returns `factor s + u`, where a factor of 0 drops s; a factor of None is 1."""
  return s + u if factor is None else scale(factor, s) + u


def _update(chunks, i, settings):
  """Returns the update of chunk i, `r U`, in the state's dtype."""
  z_i = where(take_chunk(chunks.writes, i), take_chunk(chunks.z, i))
  u = (chunks.lr * matmul("bcf,bcd->bfd", z_i, take_chunk(chunks.v, i))).astype(
    settings.state_dtype
  )
  return clip_update(u, settings.clip_norm, settings.tensor_axis)


def _times_fast_weight(subscripts: str, x, s, w, reads: Bool[Array, "B C"] | None):
  """Returns `x (W + S)`, or `x (W + S)^T` by the subscripts, for the tokens of a chunk; a W of None is 0.

  With W the sum is rounded to x's dtype. A row whose tokens do not all see the state is multiplied by W,
  and its tokens that see the state, marked by `reads`, by S in a second product; that product is skipped
  when the chunk has no such row.
  """
  if w is None:
    return where(reads, matmul(subscripts, x, s.astype(x.dtype)))
  merged = (w[None].astype(s.dtype) + where(_rows_that_see(reads), s)).astype(x.dtype)
  rest = lambda partly: where(partly, matmul(subscripts, x, s.astype(x.dtype)))  # noqa: E731
  return _with_rest(matmul(subscripts, x, merged), rest, reads)


def _outer(z, d, reads):
  """Returns z^T d over all tokens of a chunk."""
  if reads is not None:  # a token without a cotangent adds nothing, also where it is NaN
    z = where(jnp.any(d != 0, axis=-1), z)
  return matmul("bcf,bcd->bfd", z, d)


def _outer_of_reads(z, d, reads, outer):
  """Returns z^T d over the tokens that see the state; `outer` is that over all tokens, None if unknown."""
  of = lambda mask: matmul("bcf,bcd->bfd", where(mask, z), where(mask, d))  # noqa: E731
  return of(reads) if outer is None else _with_rest(where(_rows_that_see(reads), outer), of, reads)


def _rows_that_see(reads) -> Bool[Array, "B"] | None:
  """Marks the rows whose tokens all see the state."""
  return None if reads is None else jnp.all(reads, axis=-1)


def _with_rest(product, rest, reads):
  """Returns `product + rest(mask)`; the mask has the tokens of the other rows that see the state."""
  if reads is None:
    return product
  partly = reads & ~_rows_that_see(reads)[:, None]
  return lax.cond(jnp.any(partly), lambda x: x + rest(partly), lambda x: x, product)


def _total(chunks, factors, settings):
  """Composes this shard's chunks into one update, for the shards after it."""
  z, v, lr = chunks.z, chunks.v, chunks.lr
  n = z.shape[1]
  with jax.named_scope("shard_total"):
    if settings.clip_norm is None:
      # The total is linear in V: one product over all tokens, V scaled by what later chunks keep of it.
      kept = None if factors is None else prefix_keeps(factors.T, reverse=True).T
      if chunks.writes is not None:
        z = where(where_kept(chunks.writes, kept), z)
      delta = (lr * matmul("bncf,bncd->bfd", z, _weighted(v, kept))).astype(settings.state_dtype)
    else:

      def step(i, s):
        return _next_state(take_chunk(factors, i), _update(chunks, i, settings), s)

      delta = lax.fori_loop(0, n, step, jnp.zeros_like(chunks.s_in))
    return Update(_total_factor(factors), delta)


def _total_factor(factors):
  """Returns the factor by which all chunks together keep a state; None is 1."""
  return None if factors is None else jnp.prod(factors, axis=1)


def _weighted(x, weights):
  """Returns `weights x`, rounded to x's dtype; weights of None are 1."""
  if weights is None:
    return x
  wide = accumulation_dtype(x.dtype)
  return scale(weights.astype(wide), x.astype(wide)).astype(x.dtype)


def _sequential_fwd(chunks, w, settings, exchange, sample_places):
  z, v, s = chunks.z, chunks.v, chunks.s_in
  b, n, c, _ = z.shape
  wide = accumulation_dtype(z.dtype)
  factors = keep_factors(chunks, settings)
  total = None
  if exchange is not None:
    # Local result: what this device's chunks add to the state. Missing term: what the chunks of earlier
    # shards wrote. So each shard sends its total, (keep, delta), once, and starts from the exclusive
    # prefix of these, applied to the state before the whole sequence.
    total = _total(chunks, factors, settings)
    s = incoming_state(total, s, exchange)
  s_in = s
  places = None if w is None else sample_places

  def read(i, s, y, samples):
    z_i = take_chunk(z, i)
    y_i = _times_fast_weight("bcf,bfd->bcd", z_i, s, w, take_chunk(chunks.reads, i))
    y = set_chunk(y, y_i, i)
    if places is not None:
      sample = matmul("bcf,bfd->bcd", z_i[:, places].astype(s.dtype), s)
      samples = set_chunk(samples, sample, i)
    return y, samples

  def update(i, s):
    return _next_state(take_chunk(factors, i), _update(chunks, i, settings), s)

  def body(i, carry):
    s, y, samples = carry
    s = update(i - 1, s)
    return s, *read(i, s, y, samples)

  # The loop ends with a read. The last chunk's update, which no chunk here reads, follows after the loop:
  # if the outgoing state is not used, it costs nothing. On shards the total already contains it.
  y = varying_zeros(v.shape, wide if w is None else z.dtype, z)
  samples = None
  if places is not None:
    samples = varying_zeros((b, n, len(range(c)[places]), v.shape[-1]), wide, z)
  with jax.named_scope("chunks"):
    s, y, samples = lax.fori_loop(1, n, body, (s, *read(0, s, y, samples)))
  s_end = update(n - 1, s) if total is None else _next_state(total.keep, total.delta, s_in)
  if samples is not None and chunks.reads is not None:
    samples = where(chunks.reads[:, :, places], samples)
  return Outputs(y, s_end, samples), (chunks._replace(s_in=s_in), w)


def _sequential_bwd(settings, exchange, sample_places, saved, cotangents):
  """Passes over the chunks twice, each time with one state.

  Backwards, with G_i the cotangent of S_i (G_N that of the outgoing state):

      G_i   = f_i G_{i+1} + Z_i^T dR_i
      dU_i  = r_i (G_{i+1} - <U_i, G_{i+1}> / |U_i|^2 U_i  where clipped)
      dV_i  = lr Z_i dU_i        dZ_i += lr V_i dU_i^T        dlr = sum_i <V_i, Z_i dU_i>

  Forwards, with S_i recomputed: dZ_i = dR_i (W + S_i)^T, and dW = sum_i Z_i^T dR_i. The decay's gradient
  needs S_i and G_{i+1} at once; its tangent T_i = dS_i/d(decay) is carried forwards instead:

      T_{i+1} = f_i T_i + keep_i S_i        d(decay) = sum_i <Z_i T_i, dR_i> + <T_N, G_N>

  Tokens that do not read or write are 0 in the operands of these sums, and get cotangents of 0.

  Across shards, G_N is the cotangent of this shard's outgoing state plus the cotangents that the shards
  after it send back (`_cotangent_of_later_shards`). The forwards pass does not need G_N, so that it can
  overlap with the exchange.
  """
  chunks, w = saved
  keep, decay = chunks.keep, chunks.decay
  d_y, g_out, _ = cotangents
  d_y = d_y.astype(chunks.z.dtype)
  factors = keep_factors(chunks, settings)
  local_g = None
  if exchange is not None:
    later, local_g = _cotangent_of_later_shards(chunks, exchange, factors, d_y, g_out)
    g_out = g_out + later
  forwards = _forwards_pass(chunks, w, settings, factors, d_y)
  d_decay = None
  if decay is not None:
    d_decay = forwards.d_decay.astype(decay.dtype) + jnp.sum(forwards.tangent * g_out)
    d_decay = d_decay.astype(decay.dtype)
  # If every token reads and every chunk keeps the whole state, dW = G_0 - G_N.
  dw_from_g = factors is None and chunks.reads is None
  backwards = _backwards_pass(
    chunks, w, settings, factors, d_y, g_out, forwards.dz, with_dw=w is not None and not dw_from_g
  )
  g_in, dw = backwards.g, backwards.dw
  if w is not None and dw_from_g:
    dw = jnp.sum(g_in - g_out if local_g is None else local_g, axis=0)
  if exchange is not None:
    # Only the first shard starts from the state before the whole sequence.
    first = lax.axis_index(exchange.axis) == 0
    g_in = jnp.where(first, g_in, jnp.zeros_like(g_in))
  d_chunks = Chunks(
    z=backwards.dz,
    v=backwards.dv,
    lr=backwards.d_lr,
    s_in=g_in,
    keep=None if keep is None else jnp.zeros_like(keep),  # document borders, a constant decay
    decay=d_decay,
    reads=no_cotangent(chunks.reads),
    writes=no_cotangent(chunks.writes),
  )
  return d_chunks, None if w is None else dw.astype(w.dtype)


def _cotangent_of_later_shards(chunks, exchange, factors, d_y, g_out):
  """Returns the term that later shards add to G_N, and this shard's own term of G_0.

  A shard computes its own term, the decayed `local_g = sum_i Z_i^T dR_i`, from its own reads of the
  incoming state. It lacks the term of later shards, which read the outgoing state. So every shard sends the
  update `(f, f G_N + local_g)` with `f = prod_i f_i`; the missing term is the exclusive suffix of these.
  """
  with jax.named_scope("shard_cotangent"):
    kept = None if factors is None else prefix_keeps(factors.T).T
    seen = None if chunks.reads is None else where_kept(chunks.reads, kept)
    local_g = matmul("bncf,bncd->bfd", where(seen, chunks.z), _weighted(where(seen, d_y), kept))
    local_g = local_g.astype(g_out.dtype)
  keep = _total_factor(factors)
  suffix = exchange_updates(Update(keep, _next_state(keep, local_g, g_out)), exchange, reverse=True)
  return suffix.delta, local_g


class _Forwards(NamedTuple):
  """Holds the carry of the pass in the chunks' order; `tangent` and `d_decay` are used with a decay."""

  s: Float[Array, "B F D"]
  tangent: Float[Array, "B F D"] | None
  dz: Float[Array, "B N C F"]
  d_decay: Float[Array, ""]


def _forwards_pass(chunks, w, settings, factors, d_y) -> _Forwards:
  """Returns the part of dZ that comes from reads, T_N, and d(decay) without its term `<T_N, G_N>`."""
  z, decay, keep = chunks.z, chunks.decay, chunks.keep
  n, wide = z.shape[1], accumulation_dtype(z.dtype)

  def update(i, carry):
    """Replaces S_i and T_i by S_{i+1} and T_{i+1}."""
    factor, tangent = take_chunk(factors, i), carry.tangent
    if decay is not None:
      kept = carry.s if keep is None else scale(take_chunk(keep, i), carry.s)
      tangent = _next_state(factor, kept, tangent)
    s = _next_state(factor, _update(chunks, i, settings), carry.s)
    return carry._replace(s=s, tangent=tangent)

  def read(i, carry):
    d_i, reads_i, d_decay = take_chunk(d_y, i), take_chunk(chunks.reads, i), carry.d_decay
    dz_i = _times_fast_weight("bcd,bfd->bcf", d_i, carry.s, w, reads_i)
    if decay is not None:
      moved = matmul("bcf,bfd->bcd", take_chunk(z, i), carry.tangent.astype(z.dtype))
      d_decay += jnp.sum(where(reads_i, moved * d_i.astype(wide)))
    return carry._replace(dz=set_chunk(carry.dz, dz_i, i), d_decay=d_decay)

  start = _Forwards(
    s=chunks.s_in,
    tangent=None if decay is None else jnp.zeros_like(chunks.s_in),
    dz=jnp.zeros_like(z),
    d_decay=jnp.zeros_like(chunks.lr),
  )
  with jax.named_scope("chunks_forwards"):
    carry = lax.fori_loop(1, n, lambda i, carry: read(i, update(i - 1, carry)), read(0, start))
  return carry if decay is None else update(n - 1, carry)


class _Backwards(NamedTuple):
  """Holds the carry of the pass against the chunks' order; `dw` is None where dW follows from G."""

  g: Float[Array, "B F D"]
  dw: Float[Array, "F D"] | None
  dz: Float[Array, "B N C F"]
  dv: Float[Array, "B N C D"]
  d_lr: Float[Array, ""]


def _backwards_pass(chunks, w, settings, factors, d_y, g_out, dz, *, with_dw: bool) -> _Backwards:
  """Returns G_0, dW, dV, dlr, and dZ: the given part `dz` plus the part that comes from updates."""
  z, v, lr = chunks.z, chunks.v, chunks.lr
  n, wide = z.shape[1], accumulation_dtype(z.dtype)

  def transpose_read(i, carry):
    """Replaces G_{i+1} by G_i, and adds chunk i's term to dW."""
    z_i, d_i, reads_i = take_chunk(z, i), take_chunk(d_y, i), take_chunk(chunks.reads, i)
    outer = None if w is None else _outer(z_i, d_i, reads_i)
    seen = _outer_of_reads(z_i, d_i, reads_i, outer)
    g = _next_state(take_chunk(factors, i), seen.astype(carry.g.dtype), carry.g)
    dw = None if carry.dw is None else carry.dw + jnp.sum(outer, axis=0)
    return carry._replace(g=g, dw=dw)

  def transpose_update(i, carry):
    """Adds the cotangents that the update of chunk i gets from G_{i+1}."""
    writes_i, v_i = take_chunk(chunks.writes, i), take_chunk(v, i)
    z_i = where(writes_i, take_chunk(z, i))
    du = _transpose_clip(carry.g, z_i, v_i, lr, settings).astype(z.dtype)
    z_du = where(writes_i, matmul("bcf,bfd->bcd", z_i, du))
    v_du = where(writes_i, matmul("bcd,bfd->bcf", v_i, du))
    dz_i = take_chunk(carry.dz, i).astype(wide) + lr * v_du
    return carry._replace(
      dz=set_chunk(carry.dz, dz_i, i),
      dv=set_chunk(carry.dv, lr * z_du, i),
      d_lr=carry.d_lr + jnp.sum(z_du * v_i.astype(wide)),
    )

  start = _Backwards(
    g=g_out,
    dw=varying_zeros(w.shape, wide, z) if with_dw else None,
    dz=dz,
    dv=jnp.zeros_like(v),
    d_lr=jnp.zeros_like(lr),
  )

  def body(j, carry):
    i = n - 1 - j
    return transpose_update(i, transpose_read(i + 1, carry))

  with jax.named_scope("chunks_backwards"):
    return transpose_read(0, lax.fori_loop(1, n, body, transpose_update(n - 1, start)))


def _transpose_clip(g, z_i, v_i, lr, settings):
  """Returns the cotangent of U, given the cotangent g of `r U`; with a clip, U is recomputed."""
  if settings.clip_norm is None:
    return g
  u = (lr * matmul("bcf,bcd->bfd", z_i, v_i)).astype(g.dtype)
  r, norm = clip_factor(
    sum_over(jnp.sum(u * u, (-2, -1)), settings.tensor_axis), settings.clip_norm
  )
  clipped = norm > settings.clip_norm
  u_dot_g = sum_over(jnp.sum(u * g, (-2, -1)), settings.tensor_axis)
  coefficient = jnp.where(clipped, u_dot_g / jnp.where(clipped, norm, 1) ** 2, 0)
  return times(r, g - times(coefficient, u))


_sequential.defvjp(_sequential_fwd, _sequential_bwd)
