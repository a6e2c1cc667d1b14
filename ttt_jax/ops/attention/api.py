"""Causal attention over packed rows and contiguous shards, without ever making a `[T, T]` array.

What is here is which keys a device's queries meet, how keys, values and queries travel when the sequence
lies on several devices, and the choice of a kernel: cuDNN's on GPU, splash attention on TPU, `blockwise`
or, for short windows, a plain softmax anywhere.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.ops.attention import blockwise, splash
from ttt_jax.ops.documents import check_segment_ids
from ttt_jax.ops.hardware import cuda_capability, target_platform
from ttt_jax.ops.linear import finite_cotangent
from ttt_jax.ops.manual import is_checked, shard_count, varying_axes
from ttt_jax.ops.numerics import accumulation_dtype, finite, poison

IMPLEMENTATIONS = ("xla", "splash", "cudnn")
_PREFERRED = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla")}
_SMALLEST_BLOCK = 64  # queries; smaller blocks leave matrix units idle
# Up to here `_local` takes all blocks at once; beyond, on CPU, `blockwise` is 3 to 10 times as fast.
_LOCAL_WINDOW = 128
_SCORES_AT_ONCE = 1 << 26  # numbers; more blocks than this many scores are taken one after another


def attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  *,
  window: int | None = None,
  segment_ids: Int[Array, "B T"] | None = None,
  context_axis: str | None = None,
  implementation: str | None = None,
  balance: bool | None = None,
) -> Float[Array, "B T H K"]:
  """`o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s` over the tokens s that t sees.

  Token t sees s if `t - window < s <= t` and both are in one segment: itself always. Grouped-query:
  H is a multiple of G. Softmax in float32 or wider; returns q's dtype.

  What a token does not see reaches neither its output nor its gradient, also where it is NaN or infinite;
  of `"splash"` and `"cudnn"`, which are libraries' kernels, that is not promised.

  Memory is `O(T)`; scores are recomputed in the backward pass. With `context_axis`, T is this device's
  contiguous shard. A window fetches the `window - 1` keys and values before the shard from its left
  neighbours (halo exchange, `2 (window - 1) G K` numbers per row and device). Full attention gathers
  all keys and values; a later shard's queries then see more of them, which `balance` evens out.

  Args:
    q: queries; k, v: keys and values.
    window: tokens seen, the token itself included; None for all earlier ones.
    segment_ids: a number per token, unique to its document within the whole row (see
      `segments.number_documents`); padding, 0, sees padding.
    context_axis: a mesh axis of the enclosing `jax.shard_map`.
    implementation: `"xla"` takes everything; `"splash"` is the TPU's kernel, `"cudnn"` the GPU's,
      where they can express the call; None chooses that of the platform traced for, else `"xla"`.
    balance: in full attention over P shards, shard p exchanges the second half of its queries with
      its mirror P-1-p, and the outputs back (`T H K` numbers sent per row and device), so that all
      devices have equal work. None does; with a window they have it anyway.

  Raises:
    UserError: shapes or values that disagree, an unbound `context_axis`, an unknown name.
    UnsupportedError: an implementation that cannot express the call, with the reasons.
  """
  _check(q, k, v, window, segment_ids, implementation)
  if context_axis is not None and shard_count(context_axis) == 1:
    context_axis = None
  implementation = _choose(implementation, q, k, v, window, segment_ids, context_axis)
  if implementation == "cudnn":
    return _cudnn(q, k, v, window, context_axis)
  if implementation == "xla" and window is not None and window <= _LOCAL_WINDOW:
    return _local(q, k, v, segment_ids, window, context_axis)
  kernel = _BLOCK_KERNELS[implementation]
  if window is not None:
    return _windowed(kernel, q, k, v, segment_ids, window, context_axis)
  return _full(kernel, q, k, v, segment_ids, context_axis, balance is not False)


def _range(length):
  return jnp.arange(length, dtype=jnp.int32)


def _start(t, context_axis):
  """The position in the sequence of this device's first token."""
  return jnp.int32(0) if context_axis is None else t * lax.axis_index(context_axis)


def _full(kernel, q, k, v, segment_ids, context_axis, balance):
  """Local queries, or half of them and half of the mirror shard's, against all keys."""
  t = q.shape[1]
  if context_axis is None:
    return kernel.attend(q, k, v, _range(t), segment_ids, segment_ids)
  with jax.named_scope("gather_keys_and_values"):
    k, v = lax.all_gather(jnp.stack([k, v]), context_axis, axis=2, tiled=True)
    if segment_ids is not None:
      segment_ids = lax.all_gather(segment_ids, context_axis, axis=1, tiled=True)
  block = kernel.block_length(-(-t // 2))
  half = block * -(-t // (2 * block))  # queries behind the shard's end fill up the second half
  if not balance or half >= t:  # a shard of one block has nothing to swap
    return _at(kernel, q, _start(t, context_axis) + _range(t), k, v, segment_ids)
  shard = lax.axis_index(context_axis)
  mirror = shard_count(context_axis) - 1 - shard
  own, swapped = shard * t + _range(half), mirror * t + half + _range(half)
  q = _swap_second_halves(_pad_back(q, 2 * half - t), context_axis)
  o = _at(kernel, q, jnp.concatenate([own, swapped]), k, v, segment_ids, block=block)
  return _swap_second_halves(o, context_axis)[:, :t]


def _swap_second_halves(x, context_axis):
  """The second half of the mirror shard's tokens in place of one's own; its own inverse."""
  shards = shard_count(context_axis)
  kept, sent = jnp.split(x, 2, axis=1)
  with jax.named_scope("swap_second_halves"):
    received = lax.ppermute(sent, context_axis, [(p, shards - 1 - p) for p in range(shards)])
  return jnp.concatenate([kept, received], axis=1)


def _at(kernel, q, position, k, v, segment_ids, **how):
  """Queries at any positions of the row against all keys; `segment_ids` are the whole row's."""
  of_q = None
  if segment_ids is not None:
    of_q = jnp.take(segment_ids, position, axis=1, mode="clip")
  return kernel.attend(q, k, v, position, of_q, segment_ids, **how)


def _windowed(kernel, q, k, v, segment_ids, window, context_axis):
  """Local queries against the halo and the shard's own keys."""
  t = q.shape[1]
  if context_axis is None:
    return kernel.attend(q, k, v, _range(t), segment_ids, segment_ids, window=window)
  halo = window - 1
  with jax.named_scope("halo_exchange"):
    halo_k, halo_v, before = _halo(k, v, segment_ids, halo, context_axis)
  if segment_ids is None:
    segment_ids, before = jnp.ones((q.shape[0], t), jnp.int32), jnp.int32(1)
  # What lies before the sequence is in no query's segment.
  exists = _start(t, context_axis) + _range(halo) >= halo
  nowhere = jnp.iinfo(segment_ids.dtype).max
  before = jnp.where(jnp.broadcast_to(exists, (q.shape[0], halo)), before, nowhere)
  return kernel.attend(
    q,
    jnp.concatenate([halo_k, k], axis=1),
    jnp.concatenate([halo_v, v], axis=1),
    halo + _range(t),
    segment_ids,
    jnp.concatenate([before, segment_ids], axis=1),
    window=window,
  )


def _local(q, k, v, segment_ids, window, context_axis):
  """Blocks of L >= window queries against their own keys and those of the block before."""
  b, t, h, _ = q.shape
  start = _start(t, context_axis)
  if segment_ids is None:
    segment_ids = jnp.ones((b, t), jnp.int32)
  size = min(max(window, _SMALLEST_BLOCK), max(t, window))
  blocks = -(-t // size)
  tail = blocks * size - t
  if context_axis is None:
    before = (_zeros_before(k, size), _zeros_before(v, size), _zeros_before(segment_ids, size))
  else:
    with jax.named_scope("halo_exchange"):
      halo = _halo(k, v, segment_ids, window - 1, context_axis)
    before = tuple(_pad_front(x, size - (window - 1)) for x in halo)

  def cut(x, front):
    """`[blocks, B, 2 L, ...]`: every block with the one before it."""
    whole = jnp.concatenate([front, _pad_back(x, tail)], axis=1)
    parts = jnp.moveaxis(whole.reshape(b, blocks + 1, size, *x.shape[2:]), 1, 0)
    return jnp.concatenate([parts[:-1], parts[1:]], axis=2)

  def block(inputs):
    q, k, v, q_segments, k_segments, index = inputs
    q_position = start + index * size + _range(size)
    k_position = start + (index - 1) * size + _range(2 * size)
    return _attend(q, k, v, q_position, k_position, q_segments, k_segments, window)

  with jax.named_scope("local_attention"):
    inputs = (
      _blocks_of(q, blocks, size),
      cut(k, before[0]),
      cut(v, before[1]),
      _blocks_of(segment_ids, blocks, size),
      cut(segment_ids, before[2]),
      _range(blocks),
    )
    at_once = max(1, _SCORES_AT_ONCE // (b * h * size * 2 * size))
    return _join(_map_blocks(block, inputs, at_once), t)


def _halo(k, v, segment_ids, length, context_axis):
  """The last `length` tokens before the shard, from as many left neighbours as it takes.

  What lies before the sequence arrives as zeros.
  """
  shards, t = shard_count(context_axis), k.shape[1]
  arrays = [(jnp.stack([k, v]), 2)] + ([] if segment_ids is None else [(segment_ids, 1)])
  parts = []  # of the halo, from right to left
  for hop in range(1, -(-length // t) + 1):
    if hop >= shards:
      missing = length - (hop - 1) * t  # before the first shard, wherever we are
      parts.append([_zeros_tail(x, missing, axis) for x, axis in arrays])
      break
    take = min(t, length - (hop - 1) * t)
    route = [(p, p + hop) for p in range(shards - hop)]
    parts.append(
      [
        lax.ppermute(lax.slice_in_dim(x, t - take, t, axis=axis), context_axis, route)
        for x, axis in arrays
      ]
    )
  if not parts:
    parts = [[_zeros_tail(x, 0, axis) for x, axis in arrays]]
  joined = [
    jnp.concatenate([part[i] for part in reversed(parts)], axis=axis)
    for i, (_, axis) in enumerate(arrays)
  ]
  return *joined[0], None if segment_ids is None else joined[1]


def _attend(
  q: Float[Array, "B L H K"],
  k: Float[Array, "B S G K"],
  v: Float[Array, "B S G K"],
  q_position: Int[Array, "L"],
  k_position: Int[Array, "S"],
  q_segments: Int[Array, "B L"],
  k_segments: Int[Array, "B S"],
  window: int,
) -> Float[Array, "B L H K"]:
  """One block of queries against its keys; every query sees one.

  Products are of what is finite, as in `blockwise`: NaN is added to the outputs that saw what was not.
  """
  b, size, h, width = q.shape
  wide = accumulation_dtype(q.dtype)
  distance = q_position[:, None] - k_position[None, :]
  in_reach: Bool[Array, "L S"] = (distance >= 0) & (distance < window) & (k_position >= 0)[None]
  seen = in_reach[None] & (q_segments[:, :, None] == k_segments[:, None, :])
  bad_keys = jnp.any(~jnp.isfinite(k) | ~jnp.isfinite(v), axis=(2, 3))
  bad = jnp.any(seen & bad_keys[:, None], axis=-1) | jnp.any(~jnp.isfinite(q), axis=(2, 3))
  q, k, v = finite(q), finite(k), finite(v)
  grouped = q.reshape(b, size, k.shape[2], h // k.shape[2], width)
  scores = jnp.einsum("blgrk,bsgk->bgrls", grouped, k, preferred_element_type=wide)
  scores = jnp.where(seen[:, None, None], scores * width**-0.5, -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1)
  weights = jnp.where(seen[:, None, None], weights, 0).astype(
    v.dtype
  )  # also where a score overflows
  mixed = jnp.einsum("bgrls,bsgk->blgrk", weights, v, preferred_element_type=wide)
  mixed = (
    finite_cotangent(mixed.reshape(q.shape), q.astype(wide)) + poison(bad, wide)[..., None, None]
  )
  return mixed.astype(q.dtype)


def _map_blocks(block, inputs, at_once):
  """`block` over the leading axis, `at_once` of them together; scores are not kept for backward."""
  blocks = inputs[-1].shape[0]
  block = jax.checkpoint(block)
  if blocks <= at_once:
    return jax.vmap(block)(inputs)
  return lax.map(block, inputs, batch_size=at_once if at_once > 1 else None)


def _blocks_of(x, blocks, size):
  """`[B, T, ...]` to `[blocks, B, L, ...]`, zeros behind the end."""
  padded = _pad_back(x, blocks * size - x.shape[1])
  return jnp.moveaxis(padded.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _join(blocks, t):
  """`[blocks, B, L, H, K]` back to `[B, T, H, K]`."""
  n, b, size, *rest = blocks.shape
  return jnp.moveaxis(blocks, 0, 1).reshape(b, n * size, *rest)[:, :t]


def _pad_back(x, length):
  return jnp.pad(x, [(0, 0), (0, length)] + [(0, 0)] * (x.ndim - 2))


def _pad_front(x, length):
  return jnp.pad(x, [(0, 0), (length, 0)] + [(0, 0)] * (x.ndim - 2))


def _zeros_before(x, length):
  return jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)


def _zeros_tail(x, length, axis):
  return jnp.zeros((*x.shape[:axis], length, *x.shape[axis + 1 :]), x.dtype)


def _cudnn(q, k, v, window, context_axis):
  """cuDNN's fused kernel; it counts positions from the first key, so every query needs its key.

  The halo is given dummy queries. On the first shards some of it lies before the sequence: that part
  is moved behind the shard, where nothing sees it.
  """
  fused = partial(
    jax.nn.dot_product_attention,
    is_causal=True,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )
  if context_axis is None:
    return fused(q, k, v)
  with jax.named_scope("halo_exchange"):
    halo_k, halo_v, _ = _halo(k, v, None, window - 1, context_axis)
  missing = jnp.maximum(0, window - 1 - _start(q.shape[1], context_axis))
  rows = ((_zeros_before(q, window - 1), q), (halo_k, k), (halo_v, v))
  o = fused(*(jnp.roll(jnp.concatenate(x, axis=1), -missing, axis=1) for x in rows))
  return jnp.roll(o, missing, axis=1)[:, window - 1 :]


# What takes blocks of queries at any positions: `attend` and `block_length`.
_BLOCK_KERNELS = {"xla": blockwise, "splash": splash}


def block_kernel(implementation: str | None, q, k, v):
  """The module whose `attend` takes queries at any positions: of an implementation, or the best here.

  cuDNN's kernel has positions of its own: who asks for it gets the best of the others.
  """
  on_tpu = target_platform() == "tpu" and not _refusals_of_splash(q, k, v, None)
  if implementation in (None, "cudnn"):
    implementation = "splash" if on_tpu else "xla"
  return _BLOCK_KERNELS[implementation]


def _choose(implementation, q, k, v, window, segment_ids, context_axis) -> str:
  """The implementation named, or the first of the platform's that can express the call."""
  refusals = partial(_refusals, q, k, v, window, segment_ids, context_axis)
  if implementation is None:
    preferred = _PREFERRED.get(target_platform(), ("xla",))
    return next(name for name in preferred if not refusals(name))
  if reasons := refusals(implementation):
    raise UnsupportedError(
      f"attention.implementation={implementation!r} cannot take {', '.join(reasons)}: use 'xla'"
    )
  return implementation


def _refusals(q, k, v, window, segment_ids, context_axis, implementation) -> list[str]:
  """What of a call an implementation cannot express."""
  if implementation == "cudnn":
    return _refusals_of_cudnn(q, window, segment_ids, context_axis)
  if implementation == "splash":
    return _refusals_of_splash(q, k, v, context_axis)
  return []


def _refusals_of_splash(q, k, v, context_axis) -> list[str]:
  reasons = []
  if q.dtype not in splash.DTYPES:
    reasons.append(f"dtype {q.dtype}")
  # JAX's kernel does not say over which mesh axes its outputs vary.
  if varying_axes(q, k, v) or (context_axis is not None and is_checked(context_axis)):
    reasons.append("jax.shard_map with check_vma=True (pass False)")
  return reasons


def _refusals_of_cudnn(q, window, segment_ids, context_axis) -> list[str]:
  reasons = []
  if segment_ids is not None:
    reasons.append("segment_ids (its mask would be a [T, T] array)")
  if window is None and context_axis is not None:
    reasons.append("full attention over a sequence split over devices (queries start at key 0)")
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    reasons.append(f"dtype {q.dtype}")
  if target_platform() != "gpu":
    reasons.append(f"the {target_platform()} backend")
  elif (capability := cuda_capability()) is None or capability < 8:
    reasons.append("a GPU other than NVIDIA's of compute capability 8.0 and above")
  else:
    largest = 256 if capability >= 9 else 128
    if q.shape[3] % 8 or q.shape[3] > largest:
      reasons.append(f"head size {q.shape[3]} (a multiple of 8 up to {largest})")
  return reasons


def _check(q, k, v, window, segment_ids, implementation):
  if q.ndim != 4 or k.ndim != 4:
    raise UserError(f"q has shape {q.shape}, k {k.shape}: expected [B, T, H, K] and [B, T, G, K]")
  if k.shape != v.shape or (k.shape[:2], k.shape[3]) != (q.shape[:2], q.shape[3]):
    raise UserError(
      f"k has shape {k.shape} and v {v.shape}, expected [B, T, G, K] to q's [B, T, H, K] = {q.shape}"
    )
  if q.shape[2] % k.shape[2]:
    raise UserError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
  if window is not None and window < 1:
    raise UserError(f"window={window} must be at least 1: a token sees itself")
  if segment_ids is not None:
    check_segment_ids(segment_ids, q.shape[:2])
  if implementation not in (None, *IMPLEMENTATIONS):
    known = ", ".join(map(repr, IMPLEMENTATIONS))
    raise UserError(f"attention implementation={implementation!r} is not one of {known}")
