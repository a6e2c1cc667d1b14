"""Implements the small parts of a decoder: normalisation, embedding, rotary positions, initialisers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.config import RopeScaling
from ttt_jax.errors import UserError
from ttt_jax.nn.rope import scaled_frequencies
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import Axes, over_shards

# The name of the outputs of a layer's projections in `jax.checkpoint` policies.
PROJECTED = "projected"


def normal_init(
  key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike, *, fan_in: int, gain: float = 1.0
) -> nnx.Param:
  """Draws a parameter from a normal distribution of variance `gain^2 / fan_in`."""
  return nnx.Param(jax.random.normal(key, shape, dtype) * (gain * fan_in**-0.5))


def rms_normalize(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
  """Returns `x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32 or wider."""
  wide = x.astype(accumulation_dtype(x.dtype))
  mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean_square + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Returns `rms_normalize(x) * scale`."""

  def __init__(self, size: int, *, eps: float, param_dtype: DTypeLike):
    self.scale = nnx.Param(jnp.ones((size,), param_dtype))
    self.eps = eps

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    return _in_float32(jnp.multiply, rms_normalize(x, self.eps), self.scale)


class Embed(nnx.Module):
  """Looks up token embeddings in a table, which is also usable as the output head.

  A token outside the vocabulary, also a negative one, has an embedding of NaN on every mesh, as an index
  out of bounds has in `jnp.take`. NaN shows in every result; zeros or another token's row would not.
  """

  def __init__(
    self,
    vocab_size: int,
    d_model: int,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.table = normal_init(rngs.params(), (vocab_size, d_model), param_dtype, fan_in=d_model)
    self.dtype = dtype

  def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    rows = ("batch", "sequence" if tokens.shape[1] > 1 else None)
    return over_shards(
      self._look_up,
      self.table[...],
      tokens,
      dims=(("vocab", "embed"), rows),
      out_dims=(*rows, None),
    )

  def _look_up(self, table, tokens, *, axes: Axes):
    """Returns `table[tokens]`; a device holds some columns of the table for all rows of its fsdp group.

    Tokens are gathered to the columns, and the columns found go back to the tokens' rows. That is less than
    the table if a device has fewer tokens than the vocabulary. A device without a token's row of the table
    adds zero.
    """
    valid = in_vocabulary(tokens, table.shape[0], axes.tensor)
    index = jnp.where(valid, tokens.astype(jnp.int32), 0)
    if axes.fsdp is not None:
      index = jax.lax.all_gather(index, axes.fsdp, axis=0, tiled=True)
    if axes.tensor is None:
      x = table[index].astype(self.dtype)
    else:
      index -= table.shape[0] * jax.lax.axis_index(axes.tensor)
      local = (index >= 0) & (index < table.shape[0])
      x = table[jnp.where(local, index, 0)].astype(self.dtype)
      x = jnp.where(local[..., None], x, jnp.zeros_like(x))
    if axes.fsdp is not None:
      x = jax.lax.all_to_all(x, axes.fsdp, split_axis=0, concat_axis=2, tiled=True)
    if axes.tensor is not None:
      x = jax.lax.psum(x, axes.tensor)
    return jnp.where(valid[..., None], x, jnp.full_like(x, jnp.nan))


def in_vocabulary(
  ids: Int[Array, "B T"], entries: int, tensor_axis: str | None
) -> Bool[Array, "B T"]:
  """Tells which ids are in the vocabulary, of which each device of `tensor_axis` holds `entries`."""
  if ids.dtype.itemsize < 4:
    ids = ids.astype(jnp.int32)  # a narrow type may not hold the size of the vocabulary
  size = entries * (1 if tensor_axis is None else jax.lax.axis_size(tensor_axis))
  return (ids >= 0) & (ids < size)


def check_ids(
  name: str,
  ids: Array | np.ndarray,
  vocab_size: int,
  segment_ids: Array | np.ndarray | None = None,
  *,
  ignore: int | None = None,
) -> None:
  """Raises UserError at the first id outside the vocabulary; skips arrays whose values are unknown.

  Values are unknown in a traced array, and in an array on other processes' devices.

  Args:
    name: the name of the ids in the error.
    ids: token ids `[B, T]`.
    vocab_size: V; valid ids are 0 to V - 1.
    segment_ids: 0 for padding tokens, which may have any id.
    ignore: an id that is allowed in addition.
  """
  if not _has_values(ids) or not (segment_ids is None or _has_values(segment_ids)):
    return
  ids = np.asarray(ids)
  invalid = (ids < 0) | (ids >= vocab_size)
  if ignore is not None:
    invalid &= ids != ignore
  if segment_ids is not None:
    invalid &= np.asarray(segment_ids) != 0
  if invalid.any():
    index = tuple(int(i) for i in np.argwhere(invalid)[0])
    also = "" if ignore is None else f", and {ignore} for a token without one"
    remedy = "" if ignore is not None else "; padding may have any id where its segment_ids are 0"
    raise UserError(
      f"{name}[{', '.join(map(str, index))}]={ids[index]} is not in the vocabulary of {vocab_size}: "
      f"ids are 0 to {vocab_size - 1}{also}{remedy}"
    )


def _has_values(x: Array | np.ndarray) -> bool:
  if isinstance(x, jax.core.Tracer):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_addressable


def project(subscripts: str, x: Array, kernel: nnx.Param | Array, out_dtype: DTypeLike) -> Array:
  """Multiplies x by a parameter in x's dtype, accumulated in float32 or wider.

  The parameter's gradient is accumulated likewise, and not rounded to x's dtype before it is summed over
  devices.
  """
  return _product(subscripts, x, kernel[...], jnp.dtype(out_dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(subscripts: str, x: Array, kernel: Array, out_dtype: jnp.dtype) -> Array:
  accumulate = accumulation_dtype(x.dtype)
  y = jnp.einsum(subscripts, x, kernel.astype(x.dtype), preferred_element_type=accumulate)
  return y.astype(out_dtype)


def _product_fwd(subscripts, x, kernel, out_dtype):
  return _product(subscripts, x, kernel, out_dtype), (x, kernel)


def _product_bwd(subscripts, out_dtype, saved, cotangent):
  x, kernel = saved
  of_x, of_kernel, of_y = subscripts.replace("->", ",").split(",")
  wide = accumulation_dtype(x.dtype)

  def einsum(subscripts, *operands):
    operands = (a.astype(x.dtype).astype(out_dtype) for a in operands)
    return jnp.einsum(subscripts, cotangent, *operands, preferred_element_type=wide)

  dx = einsum(f"{of_y},{of_kernel}->{of_x}", kernel).astype(x.dtype)
  return dx, einsum(f"{of_y},{of_x}->{of_kernel}", x).astype(kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def add_bias(x: Array, bias: nnx.Param | None) -> Array:
  """Returns `x + bias` over the last axes of x, or x without a bias."""
  return x if bias is None else _in_float32(jnp.add, x, bias)


def _in_float32(function, x: Array, parameter: nnx.Param) -> Array:
  """Returns `function(x, parameter)` over the last axes of x, in float32 or wider, rounded to x's dtype.

  The parameter's gradient, a sum over all tokens on all devices, is then formed in float32 or wider too.
  """
  wide = accumulation_dtype(x.dtype)
  value = parameter[...].astype(wide)
  value = value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
  return function(x.astype(wide), value).astype(x.dtype)


def rotary_angles(
  positions: Int[Array, "T"],
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
  """Returns cos and sin of `position * theta^(-2 i / head_dim)`, in float32 as in published models.

  With `scaling` the frequencies are those of `ttt_jax.nn.rope`, whose factor multiplies cos and sin.
  """
  positions = positions.astype(jnp.float32)[:, None]
  if scaling is None:
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions / (theta**exponents)[None, :]
    return jnp.cos(angles), jnp.sin(angles)
  frequencies, factor = scaled_frequencies(head_dim, theta, scaling)
  angles = positions * frequencies[None, :]
  return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
  x: Float[Array, "B T H K"], cos: Float[Array, "*B T half"], sin: Float[Array, "*B T half"]
) -> Float[Array, "B T H K"]:
  """Rotates channel pairs (i, i + K/2), the layout of Llama and Qwen checkpoints, by their angles.

  cos and sin are shared by all rows, or given per row.
  """
  wide = accumulation_dtype(x.dtype)
  first, second = jnp.split(x.astype(wide), 2, axis=-1)
  cos, sin = (a.astype(wide).reshape(-1, a.shape[-2], 1, a.shape[-1]) for a in (cos, sin))
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
