"""Applies the two rules of the fast weight: chooses the implementation, and puts y together."""

import jax
import jax.numpy as jnp

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.names import IMPLEMENTATIONS
from ttt_jax.ops import linear
from ttt_jax.ops.fast_weight import cost
from ttt_jax.ops.fast_weight.associative import associative
from ttt_jax.ops.fast_weight.dual import dual
from ttt_jax.ops.fast_weight.least_squares.api import IMPLEMENTATIONS as OF_LEAST_SQUARES
from ttt_jax.ops.fast_weight.least_squares.api import least_squares
from ttt_jax.ops.fast_weight.least_squares.api import measure as measure_least_squares
from ttt_jax.ops.fast_weight.sequential import sequential
from ttt_jax.ops.fast_weight.stats import measure
from ttt_jax.ops.hardware import find_device
from ttt_jax.ops.manual import shard_count, varying_zeros
from ttt_jax.ops.numerics import accumulation_dtype, matmul, where

_OF_SUM = {"associative": associative, "dual": dual, "sequential": sequential}


def read_sum(
  sizes, chunks, tail, masks, w, settings, exchange, sample_places, implementation, *, merge
):
  """Reads and writes by the sum: y `[B, T, D]`, the state, and the statistics if there are places."""
  implementation, merge = _choose_sum(
    implementation, merge, sizes, chunks.z.dtype, settings.state_dtype, exchange
  )
  b, n, c, d = sizes.b, sizes.n, sizes.c, sizes.d
  y, s, samples = jnp.zeros((b, 0, d), tail.dtype), chunks.s_in, None
  if n and merge:
    with jax.named_scope("fast_weight"):
      y, s, samples = sequential(chunks, settings, exchange, w, sample_places=sample_places)
    y = y.reshape(b, n * c, d)
  elif n:
    with jax.named_scope("fast_weight"):
      fast, s, *_ = implementation(chunks, settings, exchange)
    with jax.named_scope("slow_weight"):
      slow = _slow_product(chunks.z.reshape(b, n * c, -1), w, masked=chunks.reads is not None)
    samples = None if sample_places is None else fast[:, :, sample_places]
    y = (slow + fast.reshape(b, n * c, d)).astype(tail.dtype)
  if sizes.tail:
    y = jnp.concatenate([y, _read_tail(tail, w, s, masks)], axis=1)
  if s is None:
    s = varying_zeros((b, sizes.f, d), settings.state_dtype, tail)
  stats = None
  if sample_places is not None:
    stats = measure(chunks, settings, w, s, sample_places=sample_places, fast_part=samples)
  return y, s, stats


def read_least_squares(
  sizes,
  chunks,
  tail,
  masks,
  w,
  update_settings,
  exchange,
  sample_places,
  implementation,
  *,
  settings,
  rank,
):
  """Reads and writes by least squares, as `read_sum`, with keys of `rank` dimensions."""
  choice = _choose_least_squares(
    implementation, sizes, rank, exchange, has_state=chunks.s_in is not None
  )
  with jax.named_scope("fast_weight"):
    fast = least_squares(chunks, tail, masks, settings, update_settings, exchange, choice)
  z = jnp.concatenate([chunks.z.reshape(sizes.b, -1, sizes.f), tail], axis=1)
  with jax.named_scope("slow_weight"):
    y = _slow_product(z, w, masked=masks is not None)
  parts = [fast.y.reshape(sizes.b, -1, sizes.d)]
  parts += [] if fast.tail is None else [fast.tail]
  y = (y + jnp.concatenate(parts, axis=1).astype(y.dtype)).astype(z.dtype)
  stats = None
  if sample_places is not None:
    stats = measure_least_squares(
      chunks, fast, settings, update_settings, w, sample_places=sample_places
    )
  return y, fast.sums, stats


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


def _choose_sum(implementation, merge, sizes, dtype, state_dtype, exchange):
  """Returns the implementation's function, and whether it reads `W + S` in one product."""
  _check_implementation(implementation)
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
  return _OF_SUM[implementation], merge


def _choose_least_squares(implementation, sizes, rank, exchange, *, has_state):
  """Returns the implementation's function, for keys of `rank` dimensions."""
  _check_implementation(implementation)
  if implementation is None:
    implementation = cost.choose_least_squares(
      sizes.n, sizes.c, rank, sizes.d, is_closed=exchange is None and not has_state
    )
  return OF_LEAST_SQUARES[implementation]


def _check_implementation(implementation):
  if implementation not in (None, *IMPLEMENTATIONS):
    names = ", ".join(map(repr, IMPLEMENTATIONS))
    raise UserError(f"implementation={implementation!r} is not one of {names}")
