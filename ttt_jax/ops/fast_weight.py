"""The in-place fast-weight update of a down projection: the public op, its checks and its dispatch.

The slow part `z W` is an ordinary product over all tokens. What is added here is the fast part, read
from a state S that is carried from chunk to chunk; `scan.py` holds the ways to compute it.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ttt_jax.ops import scan
from ttt_jax.ops.context import (
  check_collective,
  last_shard,
  shard_count,
  vary_over,
  varying_axes,
)
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.ops.segments import check_segment_ids, chunk_facts

_IMPLEMENTATIONS = {"associative": scan.associative, "sequential": scan.sequential}
_PLANNED = ("dual",)


@partial(jax.tree_util.register_dataclass, data_fields=["S"], meta_fields=["pending"])
@dataclasses.dataclass(frozen=True)
class FastWeightState:
  """What a fast weight has learned: it reads as `W + S`.

  Attributes:
    S: `[*B, F, D]` in the state's dtype, after the last full chunk.
    pending: how many tokens were read after that chunk. They are not in S, so reading goes on from
      the chunk boundary before them.
  """

  S: Any
  pending: int = 0


class FastWeightStats(NamedTuple):
  """How large the fast weight's parts are, as Frobenius norms; without gradient.

  RMSNorm hides a blow-up behind a finite loss: compare `update` and `state` with `|W|`, and `fast`
  with `slow`.

  Attributes:
    update: of every chunk's update, after clipping.
    state: of S after this device's last chunk.
    fast: of the part of y that S contributes.
    slow: of the part of y that W contributes.
  """

  update: Float[Array, "*B N"]
  state: Float[Array, "*B"]
  fast: Float[Array, "*B"]
  slow: Float[Array, "*B"]


def inplace_ttt(
  z: Float[Array, "*B T F"],
  v: Float[Array, "*B T D"],
  w_down: Float[Array, "F D"],
  *,
  chunk_size: int,
  inner_lr: float | int | Float[Array, ""],
  state: FastWeightState | None = None,
  segment_ids: Int[Array, "*B T"] | None = None,
  decay: float | int | Float[Array, ""] | None = None,
  clip_norm: float | int | None = None,
  context_axis: str | None = None,
  implementation: str | None = None,
  collective: str | None = None,
  state_dtype: Any = None,
  return_stats: bool = False,
):
  """Reads every chunk with the fast weight made by the chunks before it.

      apply    O_i     = Z_i (W + S_i)                                   S_0 = state, or 0
      update   S_{i+1} = decay S_i + clip(inner_lr Z_i^T V_i)

  Chunk i holds the tokens `i chunk_size` to `(i + 1) chunk_size - 1`. `apply` comes first: an output
  never sees its own chunk's update, strictly causal. A last chunk that is not full is read but never
  updates. With `segment_ids` the fast weight restarts at W in every document, wherever in a chunk it
  begins; padding reads W and updates nothing.

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
    v: update targets, see `ntp_targets`. Computed with in z's dtype.
    w_down: the slow down projection in Flax kernel orientation. Computed with in z's dtype.
    chunk_size: C, tokens per chunk.
    inner_lr: step of the update; differentiable when an array.
    state: what an earlier call returned, to read on at a chunk boundary. It belongs to the first
      token's document. Under `context_axis` the same on every shard.
    segment_ids: documents of a packed row: neighbouring documents differ, 0 is padding.
    decay: the state's factor per chunk, in (0, 1]; differentiable when an array; None is 1.
    clip_norm: a chunk's update of larger Frobenius norm is rescaled to this one; None is no clip.
    context_axis: the mesh axis of the enclosing `jax.shard_map` along which T is cut into contiguous
      shards of whole chunks; None when the sequence lies on one device.
    implementation: `"sequential"` carries one S through the chunks, forward and backward (memory of
      one state); `"associative"` is `jax.lax.associative_scan` over all chunks' states (memory N
      states, also forward-mode and higher derivatives). None chooses `"sequential"`.
    collective: how shards exchange their updates, see `exclusive_prefix`; None chooses.
    state_dtype: dtype of S and of all sums of updates, `promote_types(z.dtype, float32)` by default.
    return_stats: also return `FastWeightStats`, of this device's tokens.

  Returns:
    `(y, state)`, with y `[*B, T, D]` in z's dtype and the state after the last full chunk of the
    whole sequence, on every shard; `(y, state, stats)` if asked.
    Products accumulate in `promote_types(dtype, float32)`.

  Raises:
    ValueError: shapes or dtypes that disagree, values out of range, an unbound `context_axis`, shards
      that do not hold whole chunks, a state from the middle of a chunk, unknown names.
    NotImplementedError: an implementation or collective that is planned but not there yet.
  """
  _check_arguments(z, v, w_down, chunk_size, inner_lr, segment_ids, decay, clip_norm, context_axis)
  fast = _choose(implementation)
  if context_axis is not None:
    collective = check_collective(collective)

  *lead, t, f = z.shape
  d = v.shape[-1]
  dtype = z.dtype
  state_dtype = jnp.dtype(state_dtype or accumulation_dtype(dtype))
  _check_state(state, (*lead, f, d), state_dtype, context_axis)
  accumulate = accumulation_dtype(dtype)
  n, tail = divmod(t, chunk_size)

  z = z.reshape(-1, t, f)
  b = z.shape[0]
  v = v.astype(dtype).reshape(b, t, d)
  s = jnp.zeros((b, f, d), state_dtype) if state is None else state.S.reshape(b, f, d)
  lr = jnp.asarray(inner_lr, accumulate)
  facts = None
  if segment_ids is not None:
    facts = chunk_facts(segment_ids.reshape(b, t), chunk_size, context_axis)

  with jax.named_scope("slow_weight"):
    y = jnp.einsum("btf,fd->btd", z, w_down.astype(dtype), preferred_element_type=accumulate)

  z_full = z[:, : n * chunk_size].reshape(b, n, chunk_size, f)
  v_full = v[:, : n * chunk_size].reshape(b, n, chunk_size, d)
  keep = jnp.ones((b, n), state_dtype)
  if facts is not None:
    v_full = jnp.where(facts.writes[..., None], v_full, jnp.zeros_like(v_full))
    keep = facts.keeps.astype(state_dtype)
  axes = varying_axes(z_full, v_full, s, keep, lr, *_arrays(decay))
  if context_axis is not None and varying_axes(lax.axis_index(context_axis)):
    axes |= {context_axis}
  z_full, v_full, s, keep, lr = (vary_over(x, axes) for x in (z_full, v_full, s, keep, lr))
  if isinstance(decay, jax.Array):
    decay = vary_over(decay.astype(state_dtype), axes)

  with jax.named_scope("fast_weight"):
    reads, norms = jnp.zeros(v_full.shape, accumulate), keep
    if n:
      reads, s, norms = fast(
        z_full,
        v_full,
        s,
        keep,
        lr,
        decay,
        clip_norm=None if clip_norm is None else float(clip_norm),
        context_axis=context_axis,
        collective=collective,
      )
    if facts is not None:
      reads = jnp.where(facts.reads[..., None], reads, jnp.zeros_like(reads))
    reads = reads.reshape(b, n * chunk_size, d)
    if tail:
      tail_reads = scan.read(z[:, n * chunk_size :], s)
      if facts is not None:
        tail_reads = jnp.where(facts.tail_reads[..., None], tail_reads, jnp.zeros_like(tail_reads))
      reads = jnp.concatenate([reads, tail_reads], axis=1)
    stats = FastWeightStats(
      update=norms.reshape(*lead, n),
      state=_norm(s).reshape(lead),
      fast=_norm(reads).reshape(lead),
      slow=_norm(y).reshape(lead),
    )
    y = (y + reads).astype(dtype).reshape(*lead, t, d)
    if context_axis is not None:
      s = last_shard(s, context_axis)

  state = FastWeightState(S=s.reshape(*lead, f, d), pending=tail)
  return (y, state, lax.stop_gradient(stats)) if return_stats else (y, state)


def _norm(x: Float[Array, "B X Y"]) -> Float[Array, "B"]:
  return jnp.linalg.norm(lax.stop_gradient(x), axis=(1, 2))


def _choose(implementation: str | None):
  if implementation is None:
    return _IMPLEMENTATIONS["sequential"]
  known = ", ".join(map(repr, _IMPLEMENTATIONS))
  if implementation in _PLANNED:
    raise NotImplementedError(
      f"implementation={implementation!r} is not implemented yet: use {known}"
    )
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is not one of {known}")
  return _IMPLEMENTATIONS[implementation]


def _arrays(*values) -> list[jax.Array]:
  return [x for x in values if isinstance(x, jax.Array)]


def _is_traced(x) -> bool:
  return isinstance(x, jax.core.Tracer)


def _check_arguments(
  z, v, w_down, chunk_size, inner_lr, segment_ids, decay, clip_norm, context_axis
) -> None:
  for name, x in (("z", z), ("v", v), ("w_down", w_down)):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} has dtype {x.dtype}, expected a floating-point one")
  if z.ndim < 2:
    raise ValueError(f"z has shape {z.shape}, expected [..., T, F]")
  if v.shape[:-1] != z.shape[:-1]:
    raise ValueError(f"v has shape {v.shape}, expected [..., T, D] with z's leading {z.shape[:-1]}")
  if w_down.shape != (z.shape[-1], v.shape[-1]):
    raise ValueError(
      f"w_down has shape {w_down.shape}, expected [F, D] = {(z.shape[-1], v.shape[-1])} "
      "(the transpose of a PyTorch weight)"
    )
  if chunk_size < 1:
    raise ValueError(f"chunk_size={chunk_size} must be at least 1 token")
  for name, x in (("inner_lr", inner_lr), ("decay", decay)):
    if x is not None and jnp.ndim(x) != 0:
      raise ValueError(f"{name} has shape {jnp.shape(x)}, expected a number or a 0-d array")
  if decay is not None and not _is_traced(decay) and not 0 < float(decay) <= 1:
    raise ValueError(f"decay={decay} must be in (0, 1]: the state's factor per chunk")
  if clip_norm is not None:
    if isinstance(clip_norm, jax.Array):
      raise ValueError(
        f"clip_norm={clip_norm} is an array: it has no gradient, pass a Python float"
      )
    if clip_norm <= 0:
      raise ValueError(f"clip_norm={clip_norm} must be positive; None for no clip")
  if segment_ids is not None:
    check_segment_ids(segment_ids, z.shape[:-1])
  t = z.shape[-2]
  if context_axis is not None:
    shards = shard_count(context_axis)
    if t % chunk_size:
      raise ValueError(
        f"chunk_size={chunk_size} does not divide the {t} tokens of a shard ({shards} shards over "
        f"{context_axis!r}, {t * shards} tokens): shards hold whole chunks"
      )


def _check_state(state, shape, dtype, context_axis) -> None:
  if state is None:
    return
  if state.S.shape != shape:
    raise ValueError(f"state.S has shape {state.S.shape}, expected [..., F, D] = {shape}")
  if state.S.dtype != dtype:
    raise ValueError(f"state.S has dtype {state.S.dtype}, expected state_dtype={dtype}")
  if state.pending:
    raise ValueError(
      f"state comes from the middle of a chunk: {state.pending} tokens after its last full chunk were "
      "read but not learned. Read on from that chunk's end: feed these tokens again, with "
      "dataclasses.replace(state, pending=0)"
    )
  if context_axis is not None and context_axis in varying_axes(state.S):
    raise ValueError(
      f"state.S varies over context_axis={context_axis!r}: every shard must be given the one state "
      "that comes before the whole sequence"
    )
