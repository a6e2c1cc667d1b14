"""Updates a down projection in place as a fast weight: the public op.

This module does what both rules and all implementations share: it checks the arguments, turns documents
into masks, cuts chunks, and makes arrays vary over the same mesh axes. `rules.py` chooses the
implementation.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.errors import UnsupportedError
from ttt_jax.ops.documents import ChunkMasks, document_masks, length_masks
from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import choose_exchange
from ttt_jax.ops.fast_weight.checks import (
  RIDGE,
  check_arguments,
  check_keys,
  check_lengths,
  check_rule,
  check_state,
)
from ttt_jax.ops.fast_weight.chunks import Chunks, Sizes, UpdateSettings
from ttt_jax.ops.fast_weight.least_squares.api import Gate, LeastSquares
from ttt_jax.ops.fast_weight.least_squares.sums import Sums, packed_shape
from ttt_jax.ops.fast_weight.rules import read_least_squares, read_sum
from ttt_jax.ops.fast_weight.stats import FastWeightStats as FastWeightStats
from ttt_jax.ops.fast_weight.stats import choose_sample_places
from ttt_jax.ops.manual import (
  from_last_shard,
  is_checked,
  shard_count,
  vary_over,
  varying_axes,
)
from ttt_jax.ops.numerics import accumulation_dtype, where
from ttt_jax.ops.update import sum_over


@partial(jax.tree_util.register_dataclass, data_fields=["S", "A", "D"], meta_fields=["pending"])
@dataclasses.dataclass(frozen=True)
class FastWeightState:
  """Holds the state of a fast weight: what it learned from the chunks it has read.

  Attributes:
    S: of the sum, which reads as `W + S`: `[*B, F, D]` in the state's dtype, after the last full chunk.
    pending: the number of tokens read after that chunk. They are not in the state, so a later call must
      start at the chunk boundary before them.
    A: of least squares, the sum of `K^T K`, `[*B, R, R]`; S is None then. R is F, or the dimensions of
      projected keys.
    D: of least squares, the sum of `K^T V`, `[*B, R, D]`.
  """

  S: Any = None
  pending: int = 0
  A: Any = None
  D: Any = None


def inplace_ttt(
  z: Float[Array, "*B T F"],
  v: Float[Array, "*B T D"],
  w_down: Float[Array, "F D"],
  *,
  chunk_size: int,
  inner_lr: float | int | Float[Array, ""] | None = None,
  state: FastWeightState | None = None,
  segment_ids: Int[Array, "*B T"] | None = None,
  lengths: Int[Array, "*B"] | None = None,
  decay: float | int | Float[Array, ""] | None = None,
  clip_norm: float | int | None = None,
  rule: str = "sum",
  ridge: float | int | Float[Array, ""] = RIDGE,
  read_scale: float | int | Float[Array, ""] = 1.0,
  read_gate: tuple | None = None,
  key_projection: Float[Array, "F R"] | None = None,
  context_axis: str | None = None,
  tensor_axis: str | None = None,
  implementation: str | None = None,
  merge: bool | None = None,
  collective: str | None = None,
  wire_dtype: Any = None,
  state_dtype: Any = None,
  return_stats: bool = False,
):
  """Reads every chunk with the fast weight that the chunks before it made.

      apply    O_i     = Z_i (W + S_i)                                   S_0 = state, or 0
      update   S_{i+1} = decay S_i + clip(inner_lr Z_i^T V_i)

  Chunk i holds the tokens `i chunk_size` to `(i + 1) chunk_size - 1`. `apply` comes first: an output
  never sees its own chunk's update, strictly causal. A last chunk that is not full is read but never
  updates. With `segment_ids` the fast weight restarts at W in every document, wherever in a chunk the
  document begins; padding reads W and updates nothing.

  With `segment_ids` or `lengths`, NaN and infinities too reach only the tokens that see them: in y, in the
  state, and in the gradients of z, v and the state. The gradients of w_down, inner_lr and decay are sums
  over all documents, so that a NaN in one document makes them NaN; padding adds nothing to them, and in
  w_down nor does a token whose cotangent is 0.

  That is the paper's rule, the sum. With `rule="least_squares"` a chunk reads a ridge regression on the
  chunks before it, which tells keys apart that are alike; documents, decay, shards are as for the sum:

      k = z / |z|        A_{i+1} = decay A_i + K_i^T K_i        D_{i+1} = decay D_i + inner_lr K_i^T V_i
      O_i = Z_i W + read_scale g(l) K_i (A_i + ridge tr(A_i)/F I)^-1 D_i         Z_i W while A_i = 0

  | here         | paper (Feng et al., arXiv 2604.06169) |
  |--------------|---------------------------------------|
  | z            | Z, the gated activations              |
  | v            | V, the NTP-aligned target             |
  | w_down       | W_down^(0), transposed                |
  | w_down + S_i | W_down^(i), transposed                |
  | inner_lr     | eta                                   |
  | clip_norm    | tau                                   |

  Args:
    z: gated MLP activations `act(h W_gate) * (h W_up)`.
    v: update targets, see `ntp_targets`; cast to z's dtype.
    w_down: the slow down projection in Flax kernel orientation; cast to z's dtype.
    chunk_size: C, tokens per chunk.
    inner_lr: step of the update; differentiable when an array. The sum needs it; least squares, which needs
      no step, takes it as a factor of V, None for 1.
    state: the state that an earlier call returned, to continue at a chunk boundary. It belongs to the
      first token's document. Under `context_axis` the same on every shard.
    segment_ids: documents of a packed row: neighbouring documents differ, 0 is padding.
    lengths: the number of real tokens per row of a right-padded batch, over all shards; None is all. A
      chunk with padding neither updates nor decays the state. The returned state has `pending` 0, as the
      number differs by row. A decay that is an array has no gradient then.
    decay: the state's factor per chunk, in (0, 1]; differentiable when an array; None is 1.
    clip_norm: a chunk's update of larger Frobenius norm is rescaled to this one; None is no clip.
    rule: `"sum"`, or `"least_squares"` with the three arguments below, which are differentiable.
    ridge: of the regression, in units of A's mean eigenvalue; what the state's dtype does not resolve is
      raised to what it does (about `1e-6 F` in float32).
    read_scale: the factor of what the regression gives.
    read_gate: `(threshold, sharpness)` of `g = sigmoid(sharpness (l - threshold))`, in the leverage
      `l = k (A + ridge tr(A)/F I)^-1 A k^T` of a token, 0 where nothing like k was seen, at most 1; with a
      third element, a direction of k, the sigmoid is of `sharpness (l - threshold) + k direction`. None
      is g = 1.
    key_projection: P, for keys `k = z P / |z P|` of R dimensions in place of F; the state is then
      `[R, R + D]`, and solves cost R^3 / 3. None takes all of z. Under `tensor_axis` this device's rows of
      P, with R a multiple of the devices.
    context_axis: the mesh axis of the enclosing `jax.shard_map` along which T is split into contiguous
      shards of whole chunks; None when the sequence lies on one device.
    tensor_axis: the mesh axis of the enclosing `jax.shard_map` along which F is split: z, w_down and the
      state are this device's slice, y is summed over the axis in z's dtype.
    implementation: `"sequential"` carries one S through the chunks, forward and backward (memory of one
      state). `"dual"` scores every chunk against the earlier ones (no state, work of T^2; cheaper while
      few earlier tokens are visible). `"associative"` is `jax.lax.associative_scan` over all chunks'
      states (memory of N states). The last two also have forward-mode and higher derivatives, on shards
      as on one device. None chooses by `cost.choose_implementation`. With least squares `"sequential"`
      factors A once per chunk, and `"dual"` solves among the tokens themselves: without a state and on one
      device only.
    merge: read a chunk in one product, `Z (W + S)`, instead of two, `Z W + Z S`: 8/6 of the FLOPs of a
      gated MLP instead of 10/6. `W + S` is rounded to z's dtype: bfloat16 loses the part of S below 1/256
      of W. None merges where nothing is lost, in float32 and float64.
    collective: how shards exchange their updates, see `exclusive_prefix`; None chooses.
    wire_dtype: a narrower dtype for sending in that exchange, not for sums.
    state_dtype: dtype of S and of all sums of updates, `promote_types(z.dtype, float32)` by default.
    return_stats: also return the `FastWeightStats` of this device's tokens.

  Returns:
    `(y, state)`, with y `[*B, T, D]` in z's dtype and the state after the last full chunk of the
    whole sequence, on every shard; `(y, state, stats)` if asked.
    Products accumulate in `promote_types(dtype, float32)`.

  Raises:
    UserError: shapes or dtypes that disagree, values out of range, an unbound axis, shards that do not
      hold whole chunks, a state from the middle of a chunk, unknown names.
    UnsupportedError: `merge=True` with an implementation that has no `W + S` to read; the gradient of
      a decay where there are `lengths`; forward mode through `"sequential"`.
  """
  check_arguments(z, v, w_down, chunk_size, inner_lr, segment_ids, decay, clip_norm, context_axis)
  tensor_shards = 1 if tensor_axis is None else shard_count(tensor_axis, field="tensor_axis")
  check_rule(rule, inner_lr, clip_norm, merge, ridge, read_scale)
  rank = check_keys(rule, read_gate, key_projection, z.shape[-1], tensor_shards)
  check_lengths(lengths, z.shape[:-2])
  *lead, t, f = z.shape
  sizes = Sizes(tuple(lead), math.prod(lead), t, chunk_size, f, v.shape[-1])
  state_dtype = jnp.dtype(state_dtype or accumulation_dtype(z.dtype))
  is_sum = rule == "sum"
  check_state(state, rule, (*lead, rank // tensor_shards, sizes.d), rank, state_dtype, context_axis)
  update_settings = UpdateSettings(
    state_dtype=state_dtype,
    clip_norm=None if clip_norm is None else float(clip_norm),
    tensor_axis=tensor_axis,
  )
  wire_shape = (f, sizes.d) if is_sum else packed_shape(rank, sizes.d)
  exchange = _exchange(sizes, wire_shape, state_dtype, context_axis, collective, wire_dtype)
  sample_places = choose_sample_places(sizes.n, chunk_size) if return_stats else None

  axes = varying_axes(
    z,
    v,
    w_down,
    *_arrays(inner_lr, decay, segment_ids, lengths, ridge, read_scale, key_projection),
    *_arrays(*jax.tree.leaves(read_gate)),
    *jax.tree.leaves(state),
  )
  for axis in (context_axis, tensor_axis):
    axes |= {axis} if axis is not None and is_checked(axis) else set()
  w = vary_over(jnp.asarray(w_down), axes)
  masks, keep, decay = _masks_and_keep(
    sizes, segment_ids, lengths, decay, state_dtype, context_axis, axes
  )
  chunks, tail = _cut(sizes, z, v, inner_lr, state, masks, keep, decay, state_dtype, axes)
  arguments = (
    sizes,
    chunks,
    tail,
    masks,
    w,
    update_settings,
    exchange,
    sample_places,
    implementation,
  )
  if is_sum:
    y, s, stats = read_sum(*arguments, merge=merge)
  else:
    to_array = lambda x: vary_over(jnp.asarray(x, state_dtype), axes)  # noqa: E731
    ridge, read_scale, read_gate = jax.tree.map(to_array, (ridge, read_scale, read_gate))
    gate = None if read_gate is None else Gate(*read_gate)
    if key_projection is not None:
      key_projection = vary_over(jnp.asarray(key_projection), axes)
    settings = LeastSquares(ridge, read_scale, gate, key_projection)
    y, s, stats = read_least_squares(*arguments, settings=settings, rank=rank)
  y = sum_over(y, tensor_axis)
  return _finish(sizes, y, s, stats, context_axis, pending=0 if lengths is not None else sizes.tail)


def _exchange(sizes, shape, dtype, context_axis, collective, wire_dtype) -> Exchange | None:
  """Chooses how states of a shape `[rows, columns]` travel along `context_axis`; None on one device."""
  if context_axis is None:
    return None
  return choose_exchange(
    context_axis, (sizes.b, *shape), dtype, collective=collective, wire_dtype=wire_dtype
  )


def _masks_and_keep(
  sizes, segment_ids, lengths, decay, state_dtype, context_axis, axes
) -> tuple[ChunkMasks | None, Float[Array, "B N"] | None, Float[Array, ""] | None]:
  """Computes which tokens read and write, and how much of the state each chunk keeps.

  A chunk multiplies the state by `keep * decay`: by 0 where a document starts, by 1 if `lengths` end before
  the chunk does, else by the decay.

  Returns:
    masks: which tokens read the state and which write to it; None where all do.
    keep: the factor `[B, N]`, decay included where decay has no gradient; None is 1 everywhere.
    decay: the array that multiplies `keep` and has a gradient; None is 1.
  """
  masks = keep = None
  if segment_ids is not None:
    masks = document_masks(segment_ids.reshape(sizes.b, sizes.t), sizes.c, context_axis)
    masks = ChunkMasks(*(vary_over(x, axes) for x in masks))
    keep = masks.keeps.astype(state_dtype)
  learned = isinstance(decay, jax.Array)
  if learned and lengths is None:
    return masks, keep, vary_over(jnp.asarray(decay, state_dtype), axes)
  if learned or decay not in (None, 1):
    factor = _undifferentiated(decay) if learned else float(decay)
    factor = vary_over(jnp.full((sizes.b, sizes.n), factor, state_dtype), axes)
    keep = factor if keep is None else keep * factor
  if lengths is not None:
    lengths = vary_over(jnp.asarray(lengths, jnp.int32), axes).reshape(sizes.b)
    real, full = length_masks(lengths, sizes.t, sizes.c, context_axis)
    masks = real if masks is None else ChunkMasks(*map(jnp.logical_and, masks, real))
    keep = None if keep is None else jnp.where(full, keep, 1)
  return masks, keep, None


def _cut(
  sizes, z, v, inner_lr, state, masks, keep, decay, state_dtype, axes
) -> tuple[Chunks, Float[Array, "B tail F"]]:
  """Cuts the arguments into full chunks and the activations after the last full chunk."""
  b, t, c, f, d, n = sizes.b, sizes.t, sizes.c, sizes.f, sizes.d, sizes.n

  def localized(x, dtype):
    return vary_over(jnp.asarray(x, dtype), axes)

  s_in = None
  if state is not None:
    sums = [localized(x, state_dtype) for x in (state.S, state.A, state.D) if x is not None]
    sums = [x.reshape(b, *x.shape[-2:]) for x in sums]
    s_in = Sums(*sums) if state.S is None else sums[0]
  z = localized(z, z.dtype).reshape(b, t, f)
  v = localized(v, z.dtype).reshape(b, t, d)
  writes = None if masks is None else masks.writes
  chunks = Chunks(
    z=z[:, : n * c].reshape(b, n, c, f),
    v=where(writes, v[:, : n * c].reshape(b, n, c, d)),
    lr=localized(1 if inner_lr is None else inner_lr, accumulation_dtype(z.dtype)),
    s_in=s_in,
    keep=keep,
    decay=decay,
    reads=None if masks is None else masks.reads,
    writes=writes,
  )
  return chunks, z[:, n * c :]


def _finish(sizes, y, s, stats, context_axis, *, pending: int):
  """Returns the results in the caller's shapes, with the state after the whole sequence."""
  if context_axis is not None:
    s = jax.tree.map(partial(from_last_shard, axis=context_axis), s)
  s = jax.tree.map(lambda x: x.reshape(*sizes.lead, *x.shape[1:]), s)
  if isinstance(s, Sums):
    state = FastWeightState(A=s.a, D=s.d, pending=pending)
  else:
    state = FastWeightState(S=s, pending=pending)
  y = y.reshape(*sizes.lead, sizes.t, sizes.d)
  if stats is None:
    return y, state
  return y, state, jax.tree.map(lambda x: x.reshape(sizes.lead), stats)


def _arrays(*values) -> list[jax.Array]:
  return [x for x in values if isinstance(x, jax.Array)]


@jax.custom_jvp
def _undifferentiated(decay: Float[Array, ""]) -> Float[Array, ""]:
  """Returns `decay`, and refuses its gradient, which does not know that rows end at different chunks."""
  return decay


@_undifferentiated.defjvp
def _undifferentiated_jvp(primals, tangents):
  raise UnsupportedError(
    "the gradient of decay with lengths: train on rows of one length, with segment_ids for padding, or "
    "pass decay as a Python float"
  )
