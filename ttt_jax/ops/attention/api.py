"""Computes causal attention over packed rows and contiguous shards, without making a `[T, T]` array.

`attention` checks its arguments and chooses an implementation: cuDNN's kernel on GPU (`cudnn.py`), splash
attention on TPU (`splash.py`), plain XLA anywhere (`blockwise.py`; `local.py` for short windows).
`sharded.py` has what devices exchange.
"""

from functools import partial
from types import ModuleType

from jaxtyping import Array, Float, Int

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.names import ATTENTION_IMPLEMENTATIONS
from ttt_jax.ops.attention import blockwise, cudnn, local, sharded, splash
from ttt_jax.ops.documents import check_segment_ids
from ttt_jax.ops.hardware import target_platform
from ttt_jax.ops.manual import shard_count

_PREFERRED = {"tpu": ("splash", "xla"), "gpu": ("cudnn", "xla")}
# Kernels whose `attend` takes blocks of queries at any positions of the row.
_BLOCK_KERNELS = {"xla": blockwise, "splash": splash}
# The longest window that "xla" takes with `local`; beyond it, on CPU, `blockwise` is 3 to 10 times as fast.
_LOCAL_WINDOW = 128


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
  """Computes `o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s` over the tokens s that t sees.

  Token t sees s if `t - window < s <= t` and both are in one segment, so it always sees itself.
  Grouped-query: H is a multiple of G. Softmax in float32 or wider; returns q's dtype.

  With `"xla"` NaN and infinities too reach only the outputs and gradients of the tokens that see them. The
  libraries' kernels, `"splash"` and `"cudnn"`, multiply values that a token does not see by 0: a NaN in a
  value can reach all tokens of its block.

  Memory is `O(T)`; scores are recomputed in the backward pass. With `context_axis`, T is this device's
  contiguous shard. A window fetches the `window - 1` keys and values before the shard from its left
  neighbours (halo exchange, `2 (window - 1) G K` numbers per row and device). Full attention gathers
  all keys and values; a later shard's queries then see more of them, which `balance` evens out.

  Args:
    q: queries; k, v: keys and values.
    window: tokens seen, the token itself included; None for all earlier ones.
    segment_ids: a number per token, unique to its document within the whole row (see
      `documents.number_documents`); padding, 0, sees padding.
    context_axis: a mesh axis of the enclosing `jax.shard_map`.
    implementation: `"xla"` takes every call; `"splash"` is a kernel for TPU, `"cudnn"` for GPU, which
      refuse some calls. None chooses the kernel of the platform traced for, or `"xla"` if it refuses.
    balance: in full attention over P shards, shard p swaps the second half of its queries with its
      mirror P-1-p, and the outputs back (`T H K` numbers sent per row and device), so that all devices
      compute equally much. None is True; with a window work is equal anyway.

  Raises:
    UserError: shapes or values that disagree, an unbound `context_axis`, an unknown name.
    UnsupportedError: the implementation refuses the call; the message has its reasons.
  """
  _check(q, k, v, window, segment_ids, implementation)
  if context_axis is not None and shard_count(context_axis) == 1:
    context_axis = None
  implementation = _choose(implementation, q, k, v, window, segment_ids, context_axis)
  if implementation == "cudnn":
    return cudnn.attend(q, k, v, window, context_axis)
  if implementation == "xla" and window is not None and window <= _LOCAL_WINDOW:
    return local.attend(q, k, v, segment_ids, context_axis, window=window)
  kernel = _BLOCK_KERNELS[implementation]
  if window is not None:
    return sharded.windowed(kernel, q, k, v, segment_ids, context_axis, window=window)
  return sharded.full(kernel, q, k, v, segment_ids, context_axis, balance=balance is not False)


def block_kernel(implementation: str | None, q: Array, k: Array, v: Array) -> ModuleType:
  """Returns the kernel of an implementation whose `attend` takes queries at any positions of a row.

  cuDNN's kernel cannot: `"cudnn"` and None give the best of the others on this platform.
  """
  on_tpu = target_platform() == "tpu" and not splash.refusals(q, k, v, None)
  if implementation in (None, "cudnn"):
    implementation = "splash" if on_tpu else "xla"
  return _BLOCK_KERNELS[implementation]


def _choose(implementation, q, k, v, window, segment_ids, context_axis) -> str:
  """Returns the implementation named, or the platform's first one that can express the call."""
  refusals = {  # list what of the call an implementation cannot express
    "xla": list,
    "splash": partial(splash.refusals, q, k, v, context_axis),
    "cudnn": partial(cudnn.refusals, q, window, segment_ids, context_axis),
  }
  if implementation is None:
    preferred = _PREFERRED.get(target_platform(), ("xla",))
    return next(name for name in preferred if not refusals[name]())
  if reasons := refusals[implementation]():
    raise UnsupportedError(
      f"attention.implementation={implementation!r} cannot take {', '.join(reasons)}: use 'xla'"
    )
  return implementation


def _check(q, k, v, window, segment_ids, implementation):
  """Raises UserError unless shapes agree and window and implementation have valid values."""
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
  if implementation not in (None, *ATTENTION_IMPLEMENTATIONS):
    names = ", ".join(map(repr, ATTENTION_IMPLEMENTATIONS))
    raise UserError(f"attention implementation={implementation!r} is not one of {names}")
