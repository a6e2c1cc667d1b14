"""The in-place fast-weight update of a down projection: the public op and the choice of its implementation.

This module does what all implementations (`sequential.py`, `dual.py`, `associative.py`) share: it turns
documents into masks, cuts chunks, reads the tokens after the last full chunk, and makes arrays vary over
the same mesh axes.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.ops import linear
from ttt_jax.ops.documents import ChunkMasks, document_masks, length_masks
from ttt_jax.ops.exchange.collectives import Exchange
from ttt_jax.ops.exchange.prefix import choose_exchange
from ttt_jax.ops.fast_weight import cost
from ttt_jax.ops.fast_weight.associative import associative
from ttt_jax.ops.fast_weight.checks import check_arguments, check_lengths, check_state
from ttt_jax.ops.fast_weight.chunks import Chunks, UpdateRule
from ttt_jax.ops.fast_weight.dual import dual
from ttt_jax.ops.fast_weight.sequential import sequential
from ttt_jax.ops.fast_weight.stats import FastWeightStats as FastWeightStats
from ttt_jax.ops.fast_weight.stats import choose_sample_places, measure
from ttt_jax.ops.hardware import find_device
from ttt_jax.ops.manual import (
  from_last_shard,
  is_checked,
  shard_count,
  vary_over,
  varying_axes,
  varying_zeros,
)
from ttt_jax.ops.numerics import accumulation_dtype, matmul, where
from ttt_jax.ops.update import sum_over

IMPLEMENTATIONS = {"associative": associative, "dual": dual, "sequential": sequential}


@partial(jax.tree_util.register_dataclass, data_fields=["S"], meta_fields=["pending"])
@dataclasses.dataclass(frozen=True)
class FastWeightState:
  """The state of a fast weight `W + S`: what it learned from the chunks it has read.

  Attributes:
    S: `[*B, F, D]` in the state's dtype, after the last full chunk.
    pending: the number of tokens read after that chunk. They are not in S, so a later call must start
      at the chunk boundary before them.
  """

  S: Any
  pending: int = 0


def inplace_ttt(
  z: Float[Array, "*B T F"],
  v: Float[Array, "*B T D"],
  w_down: Float[Array, "F D"],
  *,
  chunk_size: int,
  inner_lr: float | int | Float[Array, ""],
  state: FastWeightState | None = None,
  segment_ids: Int[Array, "*B T"] | None = None,
  lengths: Int[Array, "*B"] | None = None,
  decay: float | int | Float[Array, ""] | None = None,
  clip_norm: float | int | None = None,
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
    inner_lr: step of the update; differentiable when an array.
    state: the state that an earlier call returned, to continue at a chunk boundary. It belongs to the
      first token's document. Under `context_axis` the same on every shard.
    segment_ids: documents of a packed row: neighbouring documents differ, 0 is padding.
    lengths: the number of real tokens per row of a right-padded batch, over all shards; None is all. A
      chunk with padding neither updates nor decays the state. The returned state has `pending` 0, as the
      number differs by row. A decay that is an array has no gradient then.
    decay: the state's factor per chunk, in (0, 1]; differentiable when an array; None is 1.
    clip_norm: a chunk's update of larger Frobenius norm is rescaled to this one; None is no clip.
    context_axis: the mesh axis of the enclosing `jax.shard_map` along which T is split into contiguous
      shards of whole chunks; None when the sequence lies on one device.
    tensor_axis: the mesh axis of the enclosing `jax.shard_map` along which F is split: z, w_down and the
      state are this device's slice, y is summed over the axis in z's dtype.
    implementation: `"sequential"` carries one S through the chunks, forward and backward (memory of one
      state). `"dual"` scores every chunk against the earlier ones (no state, work of T^2; cheaper while
      few earlier tokens are visible). `"associative"` is `jax.lax.associative_scan` over all chunks'
      states (memory of N states). The last two also have forward-mode and higher derivatives, on shards
      as on one device. None chooses by `cost.choose_implementation`.
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
  check_lengths(lengths, z.shape[:-2])
  *lead, t, f = z.shape
  sizes = _Sizes(tuple(lead), math.prod(lead), t, chunk_size, f, v.shape[-1])
  state_dtype = jnp.dtype(state_dtype or accumulation_dtype(z.dtype))
  check_state(state, (*lead, f, sizes.d), state_dtype, context_axis)
  rule = UpdateRule(
    state_dtype=state_dtype,
    clip_norm=None if clip_norm is None else float(clip_norm),
    tensor_axis=tensor_axis,
  )
  exchange = _exchange(sizes, rule, context_axis, collective, wire_dtype)
  implementation, merge = _choose(implementation, merge, sizes, z.dtype, state_dtype, exchange)
  sample_places = choose_sample_places(sizes.n, chunk_size) if return_stats else None

  axes = varying_axes(
    z, v, w_down, *_arrays(inner_lr, decay, segment_ids, lengths, state and state.S)
  )
  for axis in (context_axis, tensor_axis):
    axes |= {axis} if axis is not None and is_checked(axis) else set()
  w = vary_over(jnp.asarray(w_down), axes)
  masks, keep, decay = _masks_and_keep(
    sizes, segment_ids, lengths, decay, state_dtype, context_axis, axes
  )
  chunks, tail = _cut(sizes, z, v, inner_lr, state, masks, keep, decay, state_dtype, axes)
  y, s, samples = _read_chunks(
    chunks,
    rule,
    exchange,
    w,
    implementation=implementation,
    merge=merge,
    sample_places=sample_places,
  )
  if sizes.tail:
    y = jnp.concatenate([y, _read_tail(tail, w, s, masks)], axis=1)
  y = sum_over(y, tensor_axis)
  if s is None:
    s = varying_zeros((sizes.b, f, sizes.d), state_dtype, tail)
  stats = None
  if return_stats:
    stats = measure(chunks, rule, w, s, sample_places=sample_places, fast_part=samples)
  return _finish(sizes, y, s, stats, context_axis, pending=0 if lengths is not None else sizes.tail)


class _Sizes(NamedTuple):
  """The sizes of one call: leading dimensions, their product B, tokens T of a shard, C, F, D."""

  lead: tuple[int, ...]
  b: int
  t: int
  c: int
  f: int
  d: int

  @property
  def n(self) -> int:
    """Returns N, the number of full chunks."""
    return self.t // self.c

  @property
  def tail(self) -> int:
    """Returns the number of tokens after the last full chunk."""
    return self.t % self.c


def _exchange(sizes, rule, context_axis, collective, wire_dtype) -> Exchange | None:
  """Chooses how states travel along `context_axis`; None on one device."""
  if rule.tensor_axis is not None:
    shard_count(rule.tensor_axis, field="tensor_axis")
  if context_axis is None:
    return None
  shape = (sizes.b, sizes.f, sizes.d)
  return choose_exchange(
    context_axis, shape, rule.state_dtype, collective=collective, wire_dtype=wire_dtype
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
    real = length_masks(lengths, sizes.t, sizes.c, context_axis)
    masks = real if masks is None else ChunkMasks(*map(jnp.logical_and, masks, real))
    keep = None if keep is None else jnp.where(real.keeps, keep, 1)
  return masks, keep, None


def _cut(
  sizes, z, v, inner_lr, state, masks, keep, decay, state_dtype, axes
) -> tuple[Chunks, Float[Array, "B tail F"]]:
  """Cuts the arguments into full chunks and the activations after the last full chunk."""
  b, t, c, f, d, n = sizes.b, sizes.t, sizes.c, sizes.f, sizes.d, sizes.n

  def localized(x, dtype):
    return vary_over(jnp.asarray(x, dtype), axes)

  z = localized(z, z.dtype).reshape(b, t, f)
  v = localized(v, z.dtype).reshape(b, t, d)
  writes = None if masks is None else masks.writes
  chunks = Chunks(
    z=z[:, : n * c].reshape(b, n, c, f),
    v=where(writes, v[:, : n * c].reshape(b, n, c, d)),
    lr=localized(inner_lr, accumulation_dtype(z.dtype)),
    s_in=None if state is None else localized(state.S, state_dtype).reshape(b, f, d),
    keep=keep,
    decay=decay,
    reads=None if masks is None else masks.reads,
    writes=writes,
  )
  return chunks, z[:, n * c :]


def _read_chunks(chunks, rule, exchange, w, *, implementation, merge, sample_places):
  """Reads the full chunks.

  Returns:
    y `[B, N C, D]`, the state after the last chunk, and R of the tokens at `sample_places`.
  """
  b, n, c, _ = chunks.z.shape
  dtype, d = chunks.z.dtype, chunks.v.shape[-1]
  if not n:
    return jnp.zeros((b, 0, d), dtype), chunks.s_in, None
  with jax.named_scope("fast_weight"):
    if merge:
      y, s, samples = sequential(chunks, rule, exchange, w, sample_places=sample_places)
      return y.reshape(b, n * c, d), s, samples
    reads, s, *_ = implementation(chunks, rule, exchange)
  with jax.named_scope("slow_weight"):
    slow = _slow_product(chunks.z.reshape(b, n * c, -1), w, masked=chunks.reads is not None)
  samples = None if sample_places is None else reads[:, :, sample_places]
  return (slow + reads.reshape(b, n * c, d)).astype(dtype), s, samples


def _read_tail(tail, w, s, masks):
  """Reads the tokens after the last full chunk with the state `s`; None is 0."""
  y = _slow_product(tail, w, masked=masks is not None)
  if s is not None:
    seen = None if masks is None else masks.tail_reads
    y += where(seen, matmul("btf,bfd->btd", where(seen, tail), s.astype(tail.dtype)))
  return y.astype(tail.dtype)


def _slow_product(z, w, *, masked: bool):
  """Returns `z W`; with masked tokens, `linear.product` keeps NaN of padding out of the gradient of W."""
  w = w.astype(z.dtype)
  return linear.product(z, w) if masked else matmul("btf,fd->btd", z, w)


def _finish(sizes, y, s, stats, context_axis, *, pending: int):
  """Returns the results in the caller's shapes, with the state after the whole sequence."""
  if context_axis is not None:
    s = from_last_shard(s, context_axis)
  state = FastWeightState(S=s.reshape(*sizes.lead, sizes.f, sizes.d), pending=pending)
  y = y.reshape(*sizes.lead, sizes.t, sizes.d)
  if stats is None:
    return y, state
  return y, state, jax.tree.map(lambda x: x.reshape(sizes.lead), stats)


def _choose(implementation, merge, sizes, dtype, state_dtype, exchange):
  """Returns the implementation's function, and whether it reads `W + S` in one product."""
  if implementation not in (None, *IMPLEMENTATIONS):
    names = ", ".join(map(repr, IMPLEMENTATIONS))
    raise UserError(f"implementation={implementation!r} is not one of {names}")
  if merge and implementation not in (None, "sequential"):
    raise UnsupportedError(
      f"merge=True: implementation={implementation!r} reads no W + S, use 'sequential' or merge=None"
    )
  lossless = accumulation_dtype(dtype) == dtype  # W + S is not rounded
  if implementation is None and merge:
    implementation = "sequential"
  elif implementation is None:
    workload = cost.Workload(
      tokens=sizes.t,
      chunk_size=sizes.c,
      d_ff=sizes.f,
      d_model=sizes.d,
      shards=1 if exchange is None else shard_count(exchange.axis),
      batch=sizes.b,
      item=jnp.dtype(dtype).itemsize,
      state_item=state_dtype.itemsize,
      merge=lossless if merge is None else merge,
    )
    implementation = cost.choose_implementation(workload, find_device())
  if merge is None:
    merge = lossless and implementation == "sequential"
  return IMPLEMENTATIONS[implementation], merge


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
