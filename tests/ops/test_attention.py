"""Attention against the plain softmax over a full mask, on one device and on shards."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of, packed
from helpers import count_collectives
from jax.sharding import PartitionSpec

from ttt_jax.ops.attention import attention

B, T, H, G, K = 2, 24, 4, 2, 6
TOKENS = PartitionSpec(None, "context")
SEGMENTS = packed(B, T)


def _draw(dtype="float32", t=T):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, t, h, K)), dtype) for h in (H, G, G, H)]


def _law(q, k, v, window, segment_ids):
  """In float64, from the whole `[T, T]` mask."""
  t = q.shape[1]
  k, v = jnp.repeat(k, H // G, 2), jnp.repeat(v, H // G, 2)
  scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
  distance = np.arange(t)[:, None] - np.arange(t)[None]
  seen = (distance >= 0) & (distance < (window or t))
  seen = np.broadcast_to(seen, (B, 1, t, t))
  if segment_ids is not None:
    seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
  weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhts,bshk->bthk", weights, v)


def _values_and_gradients(function, q, k, v, cotangent):
  values, pull_back = jax.vjp(function, q, k, v)
  return values, *pull_back(cotangent)


def _expected(arrays, window, segment_ids):
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
    law = partial(_law, window=window, segment_ids=segment_ids)
    return [np.asarray(x) for x in jax.jit(partial(_values_and_gradients, law))(*wide)]


def _on_shards(shards, *, check_vma=True, **how):
  """`attention(q, k, v, segment_ids)` over global arrays, on `shards` devices or, for 0, without."""
  if not shards:
    return partial(_call, **how)
  mapped = jax.shard_map(
    partial(_call, context_axis="context", **how),
    mesh=mesh_of(shards),
    in_specs=(TOKENS,) * 4,
    out_specs=TOKENS,
    check_vma=check_vma,
  )
  return mapped


def _call(q, k, v, segment_ids, **how):
  return attention(q, k, v, segment_ids=segment_ids, **how)


def _assert_close(actual, law, tolerance):
  for name, a, b in zip(("o", "dq", "dk", "dv"), actual, law):
    error = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1e-3)
    assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "one document"])
# On eight shards of three tokens: within a shard, one hop, several hops, beyond the first shard.
@pytest.mark.parametrize("window", [1, 3, 5, 17, 24, None])
@pytest.mark.parametrize("shards", [0, 2, 8])
def test_equals_the_law(shards, window, is_packed):
  arrays, ids = _draw(), jnp.asarray(SEGMENTS) if is_packed else jnp.ones((B, T), jnp.int32)
  function = _on_shards(shards, window=window)
  actual = jax.jit(lambda *a: _values_and_gradients(lambda q, k, v: function(q, k, v, ids), *a))(
    *arrays
  )
  _assert_close(actual, _expected(arrays, window, SEGMENTS if is_packed else None), 1e-5)


@pytest.mark.parametrize("window", [5, None])
def test_without_segments_or_tracking(window):
  arrays = _draw()
  mapped = jax.shard_map(
    partial(attention, window=window, context_axis="context"),
    mesh=mesh_of(4),
    in_specs=(TOKENS,) * 3,
    out_specs=TOKENS,
    check_vma=False,
  )
  actual = jax.jit(partial(_values_and_gradients, mapped))(*arrays)
  _assert_close(actual, _expected(arrays, window, None), 1e-5)


@pytest.mark.parametrize("window", [70, None])
def test_lengths_that_no_block_divides(window, monkeypatch):
  """Several blocks, the last one not full; and blocks taken one after another."""
  t = 150
  arrays = _draw(t=t)
  ids = packed(B, t)
  law = _expected(arrays, window, ids)
  for at_once in (1 << 26, 1):
    monkeypatch.setattr("ttt_jax.ops.attention._SCORES_AT_ONCE", at_once)
    actual = jax.jit(
      lambda *a: _values_and_gradients(
        lambda q, k, v: attention(q, k, v, window=window, segment_ids=jnp.asarray(ids)), *a
      )
    )(*arrays)
    _assert_close(actual, law, 1e-5)


@pytest.mark.parametrize("window", [5, None])
def test_bfloat16(window):
  """Inputs of 8 bits: a few times 2^-8, softmax in float32."""
  arrays, ids = _draw("bfloat16"), jnp.asarray(SEGMENTS)
  function = _on_shards(4, window=window)
  with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes
    actual = jax.jit(lambda *a: _values_and_gradients(lambda q, k, v: function(q, k, v, ids), *a))(
      *arrays
    )
  assert actual[0].dtype == jnp.bfloat16
  _assert_close(actual, _expected(arrays, window, SEGMENTS), 2.5e-2)


def _shapes(jaxpr):
  for equation in jaxpr.eqns:
    for out in equation.outvars:
      yield getattr(out.aval, "shape", ())
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _shapes(inner)


@pytest.mark.parametrize("window", [64, None])
def test_never_makes_tokens_by_tokens(window):
  t = 4096
  q = jnp.ones((1, t, H, K))
  kv = jnp.ones((1, t, G, K))

  def loss(q, k, v):
    return jnp.sum(attention(q, k, v, window=window))

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv)
  shapes = list(_shapes(jaxpr.jaxpr))
  assert all(sum(n >= t for n in shape) <= 1 for shape in shapes)
  if window:
    assert max(np.prod(s, dtype=int) for s in shapes) <= H * t * 2 * window


@pytest.mark.parametrize(
  ("window", "expected"),
  [
    (1, {}),
    (3, {"collective-permute": 2}),  # keys and values together, segment ids
    (5, {"collective-permute": 4}),  # 4 tokens before a shard of 3: two hops
    (None, {"all-gather": 2, "collective-permute": 2}),  # queries to their mirror, outputs back
  ],
)
def test_collectives(window, expected):
  function = _on_shards(8, window=window)
  ids = jnp.asarray(SEGMENTS)
  compiled = jax.jit(function).lower(*_draw()[:3], ids).compile()
  assert count_collectives(compiled.as_text()) == expected


def _bad(**changes):
  arguments = {
    "q": jnp.ones((1, 8, 4, 6)),
    "k": jnp.ones((1, 8, 2, 6)),
    "v": jnp.ones((1, 8, 2, 6)),
  }
  return attention(**(arguments | changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"v": jnp.ones((1, 8, 1, 6))}, r"k has shape \(1, 8, 2, 6\) and v \(1, 8, 1, 6\)"),
    ({"q": jnp.ones((1, 7, 4, 6))}, r"\[B, T, H, K\] = \(1, 7, 4, 6\)"),
    ({"q": jnp.ones((1, 8, 3, 6))}, "2 key heads do not divide 3 query heads"),
    ({"window": 0}, "window=0 must be at least 1"),
    ({"segment_ids": jnp.ones((1, 9), jnp.int32)}, r"segment_ids has shape \(1, 9\)"),
    ({"context_axis": "context"}, "'context' is not a mesh axis of an enclosing"),
    ({"implementation": "flash"}, "implementation='flash' is not one of 'xla', 'cudnn'"),
  ],
)
def test_bad_input(changes, message, unchecked_types):
  with pytest.raises(ValueError, match=message):
    _bad(**changes)


def test_cudnn_says_what_it_cannot_take():
  with pytest.raises(NotImplementedError, match=r"segment_ids .*dtype float32, the cpu backend"):
    _bad(implementation="cudnn", segment_ids=jnp.ones((1, 8), jnp.int32))
