"""Makes update targets: values that a fast weight learns to predict, from nearby and coming tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.errors import UserError
from ttt_jax.ops.documents import check_segment_ids, same_document, shift
from ttt_jax.ops.manual import vary_over, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype, where


def ntp_targets(
  x: Float[Array, "*B T D"],
  conv: Float[Array, "width D"],
  projection: Float[Array, "D D"] | None,
  *,
  chunk_size: int,
  segment_ids: Int[Array, "*B T"] | None = None,
) -> Float[Array, "*B T D"]:
  """Returns the next-token-prediction aligned targets, `V = depthwise_conv(x) @ projection`.

      conv(x)[t] = sum_k conv[k] * x[t + k - (width - 1) / 2]        V = conv(x) @ projection

  A cross-correlation, centred and not flipped. A tap counts as zero where token t + k lies in another
  chunk or another document, also where its x is NaN, so no target depends on a later chunk; padding has
  target 0. Chunks are counted from the first token; the last chunk may have fewer than `chunk_size`
  tokens.
  Pointwise in T beyond its chunk: shards of whole chunks need no exchange.

  Args:
    x: the source, token embeddings or the MLP's input.
    conv: one kernel per channel; width is odd (5 in the published code).
    projection: used as stored, `V[e] = sum_d conv(x)[d] projection[d, e]`; None for no projection.
    chunk_size: tokens per chunk.
    segment_ids: documents of a packed row, 0 for padding.

  Returns:
    V in x's dtype; sums are accumulated in `promote_types(x.dtype, float32)`.

  Raises:
    UserError: shapes that disagree, an even width, chunk_size < 1, ids that are not integers.

  Source: Feng et al., In-Place Test-Time Training (arXiv 2604.06169), the NTP-aligned objective.
  """
  _check(x, conv, projection, chunk_size)
  if segment_ids is not None:
    check_segment_ids(segment_ids, x.shape[:-1])
  t, d = x.shape[-2:]
  width = conv.shape[0]
  accumulate = accumulation_dtype(x.dtype)
  # Sums the gradients of conv and projection over the devices once, before they are rounded to x's dtype.
  axes = varying_axes(x)
  conv, projection = jax.tree.map(lambda a: vary_over(a, axes), (conv, projection))
  with jax.named_scope("ntp_targets"):
    chunk = jnp.arange(t) // chunk_size
    mixed = jnp.zeros(x.shape, accumulate)
    for k in range(width):
      offset = k - width // 2
      visible = jnp.broadcast_to(chunk == shift(chunk, offset, axis=0, fill=-1), x.shape[:-1])
      if segment_ids is not None:
        visible &= same_document(segment_ids, offset)
      kernel = conv[k].astype(accumulate).reshape((1,) * (x.ndim - 1) + (d,))
      tap = kernel * where(visible, shift(x, offset, axis=-2, fill=0)).astype(accumulate)
      # Without this select the compiler fuses product and sum in some programs, which rounds differently.
      mixed += where(visible, tap)
    mixed = mixed.astype(x.dtype)
    if projection is None:
      return mixed
    projected = jnp.einsum(
      "...td,de->...te",
      mixed,
      projection.astype(x.dtype),
      preferred_element_type=accumulate,
    )
    return projected.astype(x.dtype)


def _check(x, conv, projection, chunk_size):
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise UserError(f"x has shape {x.shape} and dtype {x.dtype}, expected floating [..., T, D]")
  d = x.shape[-1]
  if conv.ndim != 2 or conv.shape[1] != d or conv.shape[0] % 2 == 0:
    raise UserError(
      f"conv has shape {conv.shape}, expected [width, D] with an odd width and D = {d} as in x"
    )
  if projection is not None and projection.shape != (d, d):
    raise UserError(f"projection has shape {projection.shape}, expected [D, D] with D = {d}")
  if chunk_size < 1:
    raise UserError(f"chunk_size={chunk_size} must be at least 1 token")
