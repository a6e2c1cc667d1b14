"""`implementation="sequential"`: one state carried through the chunks, forward and backward.

Nothing is kept per chunk. With the slow weight W a chunk is read in one product, `Z_i (W + S_i)`; without,
`Z_i S_i` is returned and the caller adds `Z W`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ttt_jax.ops.exchange.prefix import exchange, incoming_state
from ttt_jax.ops.fast_weight.chunks import Chunks, Options, factors_of, tokens_of
from ttt_jax.ops.linear import reverse_only
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
from ttt_jax.ops.varying import vary_over, varying_axes


class Outputs(NamedTuple):
  """R (`Z (W + S)` in z's dtype, with W) and the state after this device's last chunk.

  With W, `samples` are R of the tokens at `options.samples`, for statistics.
  """

  reads: Float[Array, "B N C D"]
  state: Float[Array, "B F D"]
  samples: Float[Array, "B N samples D"] | None


def sequential(chunks: Chunks, options: Options, w: Float[Array, "F D"] | None = None) -> Outputs:
  """R and the state, reading with `W + S` in one product if there is a W.

  Saved for the backward pass: the inputs and the state that came in, after the exchange. First
  derivatives in reverse mode, and derivatives of these.
  """
  if chunks.s_in is None:
    b, _, _, f = chunks.z.shape
    s_in = _zeros((b, f, chunks.v.shape[-1]), options.state_dtype, chunks.z)
    chunks = chunks._replace(s_in=s_in)
  chunks, w = reverse_only(
    (chunks, w),
    "implementation='sequential', which None chose if you did not: pass implementation='dual' or "
    "'associative'",
  )
  return _sequential(chunks, w, options)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sequential(chunks, w, options):
  return _sequential_fwd(chunks, w, options)[0]


def _at(x, i):
  """Chunk i of `[B, N, ...]`; of None, None."""
  return None if x is None else lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)


def _put(x, chunk, i):
  return lax.dynamic_update_index_in_dim(x, chunk.astype(x.dtype), i, axis=1)


def _zeros(shape, dtype, like):
  """Zeros that vary over the mesh axes over which `like` varies: what a loop's carry must do."""
  return vary_over(jnp.zeros(shape, dtype), varying_axes(like))


def _follow(factor, u, s):
  """`factor s + u`, of which a factor of 0 drops s; None is 1."""
  return s + u if factor is None else scale(factor, s) + u


def _update(chunks, i, options):
  """`r U` of chunk i, in the state's dtype."""
  z_i = where(_at(chunks.writes, i), _at(chunks.z, i))
  u = (chunks.lr * matmul("bcf,bcd->bfd", z_i, _at(chunks.v, i))).astype(options.state_dtype)
  return clip_update(u, options.clip_norm, options.tensor_axis)


class _Reader(NamedTuple):
  """How the tokens of one chunk see the state: a product with `W + S`, or with S alone.

  With W, a row whose tokens do not all belong to the incoming document reads W, and S in a second product
  for those that do; that product is skipped when no row of the chunk has such a border.
  """

  w: Float[Array, "F D"] | None
  reads: Bool[Array, "B C"] | None  # the tokens that see the state

  def through(self, subscripts: str, x, s):
    """`x (W + S)`, or with the subscripts of the transpose `x (W + S)^T`; rounded to x's dtype with W."""
    if self.w is None:
      return where(self.reads, matmul(subscripts, x, s.astype(x.dtype)))
    seen = where(self._whole(), s)
    product = matmul(subscripts, x, (self.w[None].astype(s.dtype) + seen).astype(x.dtype))
    rest = lambda partly: where(partly, matmul(subscripts, x, s.astype(x.dtype)))  # noqa: E731
    return self._with_rest(product, rest)

  def outer(self, z, d):
    """`(z^T d of the tokens that see the state, z^T d of all)`; the second only with W."""
    if self.w is None:
      return matmul("bcf,bcd->bfd", where(self.reads, z), where(self.reads, d)), None
    if self.reads is None:
      product = matmul("bcf,bcd->bfd", z, d)
      return product, product
    # A token without a cotangent adds nothing, whatever it holds.
    product = matmul("bcf,bcd->bfd", where(jnp.any(d != 0, axis=-1), z), d)
    own = where(self._whole(), product)
    rest = lambda partly: matmul("bcf,bcd->bfd", where(partly, z), where(partly, d))  # noqa: E731
    return self._with_rest(own, rest), product

  def _whole(self) -> Bool[Array, "B"] | None:
    """The rows all of whose tokens see the state."""
    return None if self.reads is None else jnp.all(self.reads, axis=-1)

  def _with_rest(self, product, rest):
    """`product + rest(the tokens of the other rows that see the state)`."""
    if self.reads is None:
      return product
    partly = self.reads & ~self._whole()[:, None]
    return lax.cond(jnp.any(partly), lambda x: x + rest(partly), lambda x: x, product)


def _reader(chunks, w, i):
  return _Reader(w, _at(chunks.reads, i))


def _total(chunks, factors, options):
  """This shard's chunks composed to one update: what the shards after it need to know."""
  z, v, lr = chunks.z, chunks.v, chunks.lr
  n = z.shape[1]
  with jax.named_scope("shard_total"):
    if options.clip_norm is None:
      # Linear: one product over all tokens, each scaled by what is left of it at the end.
      left = None if factors is None else prefix_keeps(factors.T, reverse=True).T
      if chunks.writes is not None:
        z = where(tokens_of(chunks.writes, left), z)
      delta = (lr * matmul("bncf,bncd->bfd", z, _weighted(v, left))).astype(options.state_dtype)
    else:

      def step(i, s):
        return _follow(_at(factors, i), _update(chunks, i, options), s)

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


def _sequential_fwd(chunks, w, options):
  z, v, s = chunks.z, chunks.v, chunks.s_in
  b, n, c, _ = z.shape
  wide = accumulation_dtype(z.dtype)
  factors = factors_of(chunks, options)
  total = None
  if options.exchange is not None:
    total = _total(chunks, factors, options)
    s = incoming_state(total, s, options.exchange)
  s_in = s
  places = None if w is None else options.samples

  def read(i, s, y, samples):
    z_i = _at(z, i)
    y = _put(y, _reader(chunks, w, i).through("bcf,bfd->bcd", z_i, s), i)
    if places is not None:
      sample = matmul("bcf,bfd->bcd", z_i[:, places].astype(s.dtype), s)
      samples = _put(samples, sample, i)
    return y, samples

  def learn(i, s):
    return _follow(_at(factors, i), _update(chunks, i, options), s)

  def body(i, carry):
    s, y, samples = carry
    s = learn(i - 1, s)
    return s, *read(i, s, y, samples)

  # The loop ends with a read: its y is the output. What no chunk here reads is learned outside, which costs
  # nothing when the outgoing state is not used; the shard's total, where there is one, has it already.
  y = _zeros(v.shape, wide if w is None else z.dtype, z)
  samples = None
  if places is not None:
    samples = _zeros((b, n, len(range(c)[places]), v.shape[-1]), wide, z)
  with jax.named_scope("chunks"):
    s, y, samples = lax.fori_loop(1, n, body, (s, *read(0, s, y, samples)))
  s_end = learn(n - 1, s) if total is None else _follow(total.keep, total.delta, s_in)
  if samples is not None and chunks.reads is not None:
    samples = where(chunks.reads[:, :, places], samples)
  return Outputs(y, s_end, samples), (chunks._replace(s_in=s_in), w)


def _sequential_bwd(options, saved, cotangents):
  """Two passes over the chunks, each with one state.

  Backwards, with G_i the cotangent of S_i (G_N that of the outgoing state):

      G_i   = f_i G_{i+1} + Z_i^T dR_i
      dU_i  = r_i (G_{i+1} - <U_i, G_{i+1}> / |U_i|^2 U_i  where clipped)
      dV_i  = lr Z_i dU_i        dZ_i += lr V_i dU_i^T        dlr = sum_i <V_i, Z_i dU_i>

  Forwards, with S_i recomputed: dZ_i = dR_i (W + S_i)^T, and dW = sum_i Z_i^T dR_i. The decay's gradient
  needs S_i and G_{i+1} at once; its tangent T_i = dS_i/d(decay) is carried forwards instead:

      T_{i+1} = f_i T_i + keep_i S_i        d(decay) = sum_i <Z_i T_i, dR_i> + <T_N, G_N>

  Tokens that do not read or write count as 0 in what enters a sum and get 0 of what comes out of one.

  Across shards, G_N is the cotangent of this shard's own outgoing state plus what the shards after it
  send back: an exclusive suffix of the same operator, of (prod_i f_i, this shard's G_0). The forwards
  pass does not need it: that exchange may go on meanwhile.
  """
  chunks, w = saved
  z, v, lr, s_in, keep, decay, reads, writes = chunks
  d_y, g_out, _ = cotangents
  n = z.shape[1]
  wide = accumulation_dtype(z.dtype)
  factors = factors_of(chunks, options)
  d_y = d_y.astype(z.dtype)
  # With every token reading and nothing forgotten, dW is what G gathers: G_0 - G_N.
  dw_is_g = factors is None and reads is None

  if options.exchange is not None:
    with jax.named_scope("shard_cotangent"):
      reach = None if factors is None else prefix_keeps(factors.T).T
      seen = None if reads is None else tokens_of(reads, reach)
      own = matmul("bncf,bncd->bfd", where(seen, z), _weighted(where(seen, d_y), reach))
      own = own.astype(g_out.dtype)
    through = _product(factors)
    suffix = exchange(Update(through, _follow(through, own, g_out)), options.exchange, True)
    g_out = g_out + suffix.delta

  def advance(i, s, tangent):
    """From S_i and its tangent to those of i + 1."""
    f = _at(factors, i)
    if decay is not None:
      tangent = _follow(f, s if keep is None else scale(_at(keep, i), s), tangent)
    return _follow(f, _update(chunks, i, options), s), tangent

  def through_read(i, s, tangent, dz, d_decay):
    d_i = _at(d_y, i)
    dz = _put(dz, _reader(chunks, w, i).through("bcd,bfd->bcf", d_i, s), i)
    if decay is not None:
      along = matmul("bcf,bfd->bcd", _at(z, i), tangent.astype(z.dtype))
      d_decay += jnp.sum(where(_at(reads, i), along * d_i.astype(wide)))
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
    own, all_tokens = _reader(chunks, w, i).outer(_at(z, i), _at(d_y, i))
    g = _follow(_at(factors, i), own.astype(g.dtype), g)
    return g, dw if dw is None else dw + jnp.sum(all_tokens, axis=0)

  def through_update(i, g, dw, dz, dv, d_lr):
    writes_i, v_i = _at(writes, i), _at(v, i)
    z_i = where(writes_i, _at(z, i))
    du = _through_clip(g, z_i, v_i, lr, options).astype(z.dtype)
    z_du = where(writes_i, matmul("bcf,bfd->bcd", z_i, du))
    d_lr += jnp.sum(z_du * v_i.astype(wide))
    through_v = where(writes_i, matmul("bcd,bfd->bcf", v_i, du))
    dz_i = _at(dz, i).astype(wide) + lr * through_v
    return g, dw, _put(dz, dz_i, i), _put(dv, lr * z_du, i), d_lr

  def backwards(j, carry):
    i = n - 1 - j
    g, dw, dz, dv, d_lr = carry
    return through_update(i, *retreat(i + 1, g, dw), dz, dv, d_lr)

  dw = None if w is None or dw_is_g else _zeros(w.shape, wide, z)
  with jax.named_scope("chunks_backwards"):
    carry = through_update(n - 1, g_out, dw, dz, jnp.zeros_like(v), jnp.zeros_like(lr))
    g, dw, dz, dv, d_lr = lax.fori_loop(1, n, backwards, carry)
    g_in, dw = retreat(0, g, dw)
  if w is not None and dw_is_g:
    dw = jnp.sum(g_in - g_out if options.exchange is None else own, axis=0)
  if options.exchange is not None:
    # The state before the whole sequence enters on the first shard only.
    first = lax.axis_index(options.exchange.axis) == 0
    g_in = jnp.where(first, g_in, jnp.zeros_like(g_in))
  d_chunks = Chunks(
    z=dz,
    v=dv,
    lr=d_lr,
    s_in=g_in,
    keep=None if keep is None else jnp.zeros_like(keep),  # document borders, a constant decay
    decay=None if decay is None else d_decay,
    reads=_no_cotangent(reads),
    writes=_no_cotangent(writes),
  )
  return d_chunks, None if w is None else dw.astype(w.dtype)


def _no_cotangent(mask):
  return None if mask is None else jnp.zeros(mask.shape, jax.dtypes.float0)


def _through_clip(g, z_i, v_i, lr, options):
  """The cotangent of U from that of `r U`: the update is recomputed, where there is a clip."""
  if options.clip_norm is None:
    return g
  u = (lr * matmul("bcf,bcd->bfd", z_i, v_i)).astype(g.dtype)
  r, norm = clip_factor(sum_over(jnp.sum(u * u, (-2, -1)), options.tensor_axis), options.clip_norm)
  clipped = norm > options.clip_norm
  along = sum_over(jnp.sum(u * g, (-2, -1)), options.tensor_axis)
  along = jnp.where(clipped, along / jnp.where(clipped, norm, 1) ** 2, 0)
  return times(r, g - times(along, u))


_sequential.defvjp(_sequential_fwd, _sequential_bwd)
