"""`implementation="sequential"`: one state carried through the chunks, forward and backward.

Nothing is kept per chunk. With `Base(w, reads)` a chunk is read in one product, `Z_i (W + S_i)`; without,
`Z_i S_i` is returned and the caller adds `Z W`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ttt_jax.ops.chunks import Chunks, Options, factors_of
from ttt_jax.ops.collectives import exchange
from ttt_jax.ops.context import incoming_state, vary_over, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype, matmul
from ttt_jax.ops.update import (
  Update,
  clip_factor,
  clip_update,
  prefix_keeps,
  scale,
  sum_over,
)


class Base(NamedTuple):
  """The weight below the state, and which tokens see the state on top of it (None: all)."""

  w: Float[Array, "F D"]
  reads: Bool[Array, "B N C"] | None


def sequential(
  chunks: Chunks, options: Options, base: Base | None = None
) -> tuple[Float[Array, "B N C D"], Float[Array, "B F D"]]:
  """R (`Z (W + S)` in z's dtype, with `base`) and the state after this device's last chunk.

  Saved for the backward pass: the inputs and the state that came in, after the exchange.
  """
  if chunks.s_in is None:
    b, _, _, f = chunks.z.shape
    s_in = _zeros((b, f, chunks.v.shape[-1]), options.state_dtype, chunks.z)
    chunks = chunks._replace(s_in=s_in)
  return _sequential(chunks, base, options)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sequential(chunks, base, options):
  return _sequential_fwd(chunks, base, options)[0]


def _at(x, i):
  """Chunk i of `[B, N, ...]`; of None, None."""
  return None if x is None else lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _put(x, chunk, i):
  return lax.dynamic_update_index_in_dim(x, chunk.astype(x.dtype), i, axis=1)


def _zeros(shape, dtype, like):
  """Zeros that vary over the mesh axes over which `like` varies: what a loop's carry must do."""
  return vary_over(jnp.zeros(shape, dtype), varying_axes(like))


def _follow(factor, u, s):
  """`factor s + u`; None is 1."""
  return s + u if factor is None else scale(factor, s) + u


def _update(z_i, v_i, lr, options):
  """`r U` of one chunk, in the state's dtype."""
  u = (lr * matmul("bcf,bcd->bfd", z_i, v_i)).astype(options.state_dtype)
  return clip_update(u, options.clip_norm, options.tensor_axis)


class _Reader(NamedTuple):
  """How the tokens of one chunk see the state: a product with `W + S`, or with S alone.

  A row whose tokens do not all belong to the incoming document reads W, and S in a second product for
  those that do; that product is skipped when no row of the chunk has such a border.
  """

  w: Float[Array, "F D"] | None
  whole: Bool[Array, "B"] | None  # rows all of whose tokens see the state
  partly: Bool[Array, "B C"] | None  # the tokens of the other rows that do

  def through(self, subscripts: str, x, s):
    """`x (W + S)`, or with the subscripts of the transpose `x (W + S)^T`; rounded to x's dtype."""
    if self.w is None:
      return matmul(subscripts, x, s.astype(x.dtype))
    seen = s if self.whole is None else scale(self.whole.astype(s.dtype), s)
    product = matmul(subscripts, x, (self.w[None].astype(s.dtype) + seen).astype(x.dtype))
    return self._with_rest(product, lambda: self._masked(matmul(subscripts, x, s.astype(x.dtype))))

  def outer(self, z, d):
    """`(z^T d of the tokens that see the state, z^T d of all)`."""
    product = matmul("bcf,bcd->bfd", z, d)
    if self.whole is None:
      return product, product
    own = scale(self.whole.astype(product.dtype), product)
    return self._with_rest(own, lambda: matmul("bcf,bcd->bfd", z, self._masked(d))), product

  def _masked(self, x):
    return jnp.where(self.partly[..., None], x, jnp.zeros_like(x))

  def _with_rest(self, product, rest):
    if self.partly is None:
      return product
    return lax.cond(jnp.any(self.partly), lambda x: x + rest(), lambda x: x, product)


def _reader(base, i):
  if base is None or base.reads is None:
    return _Reader(None if base is None else base.w, None, None)
  reads = _at(base.reads, i)
  whole = jnp.all(reads, axis=-1)
  return _Reader(base.w, whole, reads & ~whole[:, None])


def _total(chunks, factors, options):
  """This shard's chunks composed to one update: what the shards after it need to know."""
  z, v, lr = chunks.z, chunks.v, chunks.lr
  n = z.shape[1]
  with jax.named_scope("shard_total"):
    if options.clip_norm is None:
      # Linear: one product over all tokens, each scaled by what is left of it at the end.
      left = None if factors is None else prefix_keeps(factors.T, reverse=True).T
      delta = (lr * matmul("bncf,bncd->bfd", z, _weighted(v, left))).astype(options.state_dtype)
    else:

      def step(i, s):
        return _follow(_at(factors, i), _update(_at(z, i), _at(v, i), lr, options), s)

      delta = lax.fori_loop(0, n, step, jnp.zeros_like(chunks.s_in))
    return Update(_product(factors), delta)


def _product(factors):
  """What is left of a state behind all chunks; None is all of it."""
  return None if factors is None else jnp.prod(factors, axis=1)


def _weighted(x, weights):
  """`weights x`, rounded to x's dtype; None is 1."""
  if weights is None:
    return x
  wide = accumulation_dtype(x.dtype)
  return scale(weights.astype(wide), x.astype(wide)).astype(x.dtype)


def _sequential_fwd(chunks, base, options):
  z, v, lr, s = chunks.z, chunks.v, chunks.lr, chunks.s_in
  n = z.shape[1]
  factors = factors_of(chunks, options)
  total = None
  if options.exchange is not None:
    total = _total(chunks, factors, options)
    s = incoming_state(total, s, options.exchange)
  s_in = s

  def read(i, s, y):
    return _put(y, _reader(base, i).through("bcf,bfd->bcd", _at(z, i), s), i)

  def learn(i, s):
    return _follow(_at(factors, i), _update(_at(z, i), _at(v, i), lr, options), s)

  def body(i, carry):
    s, y = carry
    s = learn(i - 1, s)
    return s, read(i, s, y)

  # The loop ends with a read: its y is the output. What no chunk here reads is learned outside, which costs
  # nothing when the outgoing state is not used; the shard's total, where there is one, has it already.
  y = _zeros(v.shape, accumulation_dtype(z.dtype) if base is None else z.dtype, z)
  with jax.named_scope("chunks"):
    s, y = lax.fori_loop(1, n, body, (s, read(0, s, y)))
  s_end = learn(n - 1, s) if total is None else _follow(total.keep, total.delta, s_in)
  return (y, s_end), (chunks._replace(s_in=s_in), base)


def _sequential_bwd(options, saved, cotangents):
  """Two passes over the chunks, each with one state.

  Backwards, with G_i the cotangent of S_i (G_N that of the outgoing state):

      G_i   = f_i G_{i+1} + Z_i^T dR_i
      dU_i  = r_i (G_{i+1} - <U_i, G_{i+1}> / |U_i|^2 U_i  where clipped)
      dV_i  = lr Z_i dU_i        dZ_i += lr V_i dU_i^T        dlr = sum_i <V_i, Z_i dU_i>

  Forwards, with S_i recomputed: dZ_i = dR_i (W + S_i)^T, and dW = sum_i Z_i^T dR_i. The decay's gradient
  needs S_i and G_{i+1} at once; its tangent T_i = dS_i/d(decay) is carried forwards instead:

      T_{i+1} = f_i T_i + keep_i S_i        d(decay) = sum_i <Z_i T_i, dR_i> + <T_N, G_N>

  Across shards, G_N is the cotangent of this shard's own outgoing state plus what the shards after it
  send back: an exclusive suffix of the same operator, of (prod_i f_i, this shard's G_0). The forwards
  pass does not need it: that exchange may go on meanwhile.
  """
  chunks, base = saved
  z, v, lr, s_in, keep, decay = chunks
  d_y, g_out = cotangents
  n = z.shape[1]
  wide = accumulation_dtype(z.dtype)
  factors = factors_of(chunks, options)
  d_y = d_y.astype(z.dtype)
  reads = None if base is None else base.reads
  # With every token reading and nothing forgotten, dW is what G gathers: G_0 - G_N.
  dw_is_g = factors is None and reads is None

  if options.exchange is not None:
    with jax.named_scope("shard_cotangent"):
      d_reads = d_y if reads is None else jnp.where(reads[..., None], d_y, jnp.zeros_like(d_y))
      reach = None if factors is None else prefix_keeps(factors.T).T
      own = matmul("bncf,bncd->bfd", z, _weighted(d_reads, reach)).astype(g_out.dtype)
    through = _product(factors)
    suffix = exchange(Update(through, _follow(through, own, g_out)), options.exchange, True)
    g_out = g_out + suffix.delta

  def advance(i, s, tangent):
    """From S_i and its tangent to those of i + 1."""
    f = _at(factors, i)
    if decay is not None:
      tangent = _follow(f, s if keep is None else scale(_at(keep, i), s), tangent)
    return _follow(f, _update(_at(z, i), _at(v, i), lr, options), s), tangent

  def through_read(i, s, tangent, dz, d_decay):
    d_i = _at(d_y, i)
    dz = _put(dz, _reader(base, i).through("bcd,bfd->bcf", d_i, s), i)
    if decay is not None:
      d_i = d_i if reads is None else jnp.where(_at(reads, i)[..., None], d_i, jnp.zeros_like(d_i))
      along = matmul("bcf,bfd->bcd", _at(z, i), tangent.astype(z.dtype))
      d_decay += jnp.sum(along * d_i.astype(wide))
    return s, tangent, dz, d_decay

  def forwards(i, carry):
    s, tangent, dz, d_decay = carry
    return through_read(i, *advance(i - 1, s, tangent), dz, d_decay)

  tangent = None if decay is None else jnp.zeros_like(s_in)
  with jax.named_scope("chunks_forwards"):
    carry = through_read(0, s_in, tangent, jnp.zeros_like(z), jnp.zeros_like(lr))
    s, tangent, dz, d_decay = lax.fori_loop(1, n, forwards, carry)
  if decay is not None:
    tangent = advance(n - 1, s, tangent)[1]
    d_decay = (d_decay.astype(decay.dtype) + jnp.sum(tangent * g_out)).astype(decay.dtype)

  def retreat(i, g, dw):
    """From G_{i+1} to G_i, and what chunk i adds to dW."""
    own, all_tokens = _reader(base, i).outer(_at(z, i), _at(d_y, i))
    g = _follow(_at(factors, i), own.astype(g.dtype), g)
    return g, dw if dw is None else dw + jnp.sum(all_tokens, axis=0)

  def through_update(i, g, dw, dz, dv, d_lr):
    z_i, v_i = _at(z, i), _at(v, i)
    du = _through_clip(g, z_i, v_i, lr, options).astype(z.dtype)
    z_du = matmul("bcf,bfd->bcd", z_i, du)
    d_lr += jnp.sum(z_du * v_i.astype(wide))
    dz_i = _at(dz, i).astype(wide) + lr * matmul("bcd,bfd->bcf", v_i, du)
    return g, dw, _put(dz, dz_i, i), _put(dv, lr * z_du, i), d_lr

  def backwards(j, carry):
    i = n - 1 - j
    g, dw, dz, dv, d_lr = carry
    return through_update(i, *retreat(i + 1, g, dw), dz, dv, d_lr)

  dw = None if base is None or dw_is_g else _zeros(base.w.shape, wide, z)
  with jax.named_scope("chunks_backwards"):
    carry = through_update(n - 1, g_out, dw, dz, jnp.zeros_like(v), jnp.zeros_like(lr))
    g, dw, dz, dv, d_lr = lax.fori_loop(1, n, backwards, carry)
    g_in, dw = retreat(0, g, dw)
  if base is not None and dw_is_g:
    dw = jnp.sum(g_in - g_out if options.exchange is None else own, axis=0)
  if options.exchange is not None:
    # The state before the whole sequence enters on the first shard only.
    first = lax.axis_index(options.exchange.axis) == 0
    g_in = jnp.where(first, g_in, jnp.zeros_like(g_in))
  d_keep = None if keep is None else jnp.zeros_like(keep)  # document borders, a constant decay
  d_decay = None if decay is None else d_decay
  d_chunks = Chunks(z=dz, v=dv, lr=d_lr, s_in=g_in, keep=d_keep, decay=d_decay)
  return d_chunks, _base_cotangent(base, dw)


def _base_cotangent(base, dw):
  if base is None:
    return None
  zero = None if base.reads is None else jnp.zeros(base.reads.shape, jax.dtypes.float0)
  return Base(dw.astype(base.w.dtype), zero)


def _through_clip(g, z_i, v_i, lr, options):
  """The cotangent of U from that of `r U`: the update is recomputed, where there is a clip."""
  if options.clip_norm is None:
    return g
  u = (lr * matmul("bcf,bcd->bfd", z_i, v_i)).astype(g.dtype)
  r, norm = clip_factor(sum_over(jnp.sum(u * u, (-2, -1)), options.tensor_axis), options.clip_norm)
  clipped = norm > options.clip_norm
  along = sum_over(jnp.sum(u * g, (-2, -1)), options.tensor_axis)
  along = jnp.where(clipped, along / jnp.where(clipped, norm, 1) ** 2, 0)
  return scale(r, g - scale(along, u))


_sequential.defvjp(_sequential_fwd, _sequential_bwd)
