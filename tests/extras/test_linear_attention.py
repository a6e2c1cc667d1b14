"""Compares gated linear attention and the delta rule with the recurrence, token by token in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from ttt_jax.extras.baselines.ops import delta_rule, gated_linear_attention, short_convolution

B, H, K, M = 2, 3, 4, 5

# Tokens, chunk size, ids. Documents begin at a chunk's first and last token, inside of it, two in one;
# padding lies in front, between and behind.
CASES = {
  "ragged": (23, 6, None),
  "one chunk": (7, 64, None),
  "chunks of one token": (5, 1, [[0] * 5, [1, 1, 2, 2, 2]]),
  "packed": (
    23,
    6,
    [[1] * 6 + [2] * 5 + [3] + [1] * 7 + [0] * 4, [0, 0, 5, 5, 6, 5, 0, 5] + [2] * 9 + [9] * 6],
  ),
  "packed, sub-chunks": (37, 32, [[1] * 15 + [2] * 10 + [1] * 12, [4] * 33 + [0, 0, 1, 1]]),
  "sub-chunks": (70, 32, None),
}


def gated_step(s, q, k, v, log_decay):
  s = jnp.exp(log_decay)[:, None] * s + k[:, None] * v[None]
  return s, q @ s


def delta_step(s, q, k, v, beta):
  s = s - beta * k[:, None] * (k @ s - v)[None]
  return s, q @ s


OPS = {"gla": (gated_linear_attention, gated_step), "delta_net": (delta_rule, delta_step)}


def recurrence(step, q, k, v, gate, state, ids):
  """Computes the definition token by token: a state per row and head, dropped where a document begins."""
  before = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)
  begins = (ids != before) & (ids != 0)

  def one_head(q, k, v, gate, s, begins, real):
    def token(s, inputs):
      *x, begins, real = inputs
      new, o = step(jnp.where(begins, 0, s), *x)
      return jnp.where(real, new, s), jnp.where(real, o, 0)

    s, o = jax.lax.scan(token, s, (q, k, v, gate, begins, real))
    return o, s

  one_row = jax.vmap(one_head, in_axes=(1, 1, 1, 1, 0, None, None), out_axes=(1, 0))
  return jax.vmap(one_row)(q, k, v, gate, state, jnp.asarray(begins), jnp.asarray(ids != 0))


def draw(name, tokens, *, seed=0):
  """Makes inputs of an op in float64, with decays from 1 to nearly 0 and keys of norm 1."""
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, B, tokens, H, K))
  v, state = rng.normal(size=(B, tokens, H, M)), rng.normal(size=(B, H, K, M))
  if name == "gla":
    return q, k, v, -np.exp(rng.normal(size=k.shape)), state
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  return q, k, v, rng.uniform(0.1, 1, k.shape[:-1]), state


def values_and_gradients(function, inputs, seed=1):
  """Returns the outputs, and the gradient of a random functional of them in every input."""

  def both(*inputs):
    o, s = function(*inputs)
    rng = np.random.default_rng(seed)
    weights = (jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in (o, s))
    return sum(jnp.sum(w * x) for w, x in zip(weights, (o, s))), (o, s)

  grad = jax.jit(jax.grad(both, argnums=tuple(range(len(inputs))), has_aux=True))
  gradients, outputs = grad(*map(jnp.asarray, inputs))
  return *outputs, *gradients


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_recurrence(name, case):
  tokens, chunk_size, ids = CASES[case]
  op, step = OPS[name]
  given = None if ids is None else jnp.asarray(ids, jnp.int32)
  ids = np.ones((B, tokens), int) if ids is None else np.asarray(ids)
  with jax.enable_x64(True):
    inputs = draw(name, tokens)
    law = values_and_gradients(lambda *x: recurrence(step, *x, ids), inputs)
    actual = values_and_gradients(
      lambda *x: op(*x[:4], state=x[4], segment_ids=given, chunk_size=chunk_size), inputs
    )
    for a, b in zip(actual, law, strict=True):
      assert a.dtype == jnp.float64
      assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_narrow_inputs_are_summed_in_float32(name, dtype):
  op = jax.jit(partial(OPS[name][0], chunk_size=16))
  with jax.enable_x64(True):
    rounded = [jnp.asarray(x, dtype) for x in draw(name, 40)]
    rounded[3:] = [x.astype(jnp.float32) for x in rounded[3:]]  # gates and state are never narrow
    expected = op(*(x.astype(jnp.float64) for x in rounded[:4]), state=rounded[4])
    o, s = op(*rounded[:4], state=rounded[4])
  assert o.dtype == dtype
  assert s.dtype == jnp.float32
  assert (
    relative_error(o.astype(jnp.float32), expected[0]) < {"float32": 1e-5, "bfloat16": 4e-3}[dtype]
  )
  assert relative_error(s, expected[1]) < 1e-5


@pytest.mark.parametrize("log_decay", [0.0, -30.0, -1e4])
def test_no_decay_overflows(log_decay):
  """Log decays sum to -640000 in a chunk, where `exp(-b)` would be infinite from -88 on."""
  q, k, v, gate, state = (jnp.asarray(x, jnp.float32) for x in draw("gla", 70))
  gate = jnp.full_like(gate, log_decay).at[:, :, :, ::2].set(-0.1)
  law = recurrence(gated_step, q, k, v, gate, state, np.ones((B, 70), int))
  actual = values_and_gradients(
    lambda *x: gated_linear_attention(*x[:4], state=x[4]), (q, k, v, gate, state)
  )
  for a, b in zip(actual, law):
    assert relative_error(a, b) < 1e-5
  assert all(np.isfinite(x).all() for x in actual)


@pytest.mark.parametrize("name", OPS)
def test_reading_in_pieces_is_reading_at_once(name):
  op, _ = OPS[name]
  inputs = [jnp.asarray(x, jnp.float32) for x in draw(name, 41)[:4]]
  op = jax.jit(partial(op, chunk_size=8))
  whole, last = op(*inputs)
  pieces, state = [], None
  for start, end in ((0, 17), (17, 18), (18, 41)):
    o, state = op(*(x[:, start:end] for x in inputs), state=state)
    pieces.append(o)
  assert relative_error(jnp.concatenate(pieces, axis=1), whole) < 1e-5
  assert relative_error(state, last) < 1e-5


def test_a_state_that_holds_a_key_is_overwritten_by_the_delta_rule():
  """With beta 1 the last value of a key is read back exactly; gated linear attention reads their sum."""
  k = jnp.asarray([[[[1.0, 0]], [[1.0, 0]], [[0, 1.0]], [[1.0, 0]]]])
  v = jnp.asarray([[[[2.0]], [[3.0]], [[5.0]], [[7.0]]]])
  o, s = delta_rule(k, k, v, jnp.ones((1, 4, 1)))
  assert o[0, :, 0, 0].tolist() == [2, 3, 5, 7]
  assert s[0, 0, :, 0].tolist() == [7, 5]
  o, _ = gated_linear_attention(k, k, v, jnp.zeros_like(k))
  assert o[0, :, 0, 0].tolist() == [2, 5, 5, 12]


@pytest.mark.parametrize("packed", [True, False])
def test_short_convolution(packed):
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, 9, 2, 3)), rng.normal(size=(4, 2, 3))
  before = rng.normal(size=(2, 3, 2, 3))
  ids = np.array([[1, 1, 1, 2, 2, 1, 1, 0, 0], [3, 0, 3, 3, 3, 3, 3, 4, 4]])
  document = np.array([[1, 1, 1, 2, 2, 3, 3, 0, 0], [1, 0, 2, 2, 2, 2, 2, 3, 3]])
  if not packed:
    ids = document = np.ones((2, 9), int)
  expected = np.zeros_like(x)
  whole = np.concatenate([before, x], axis=1)
  for b, t in np.ndindex(2, 9):
    for i in range(4):
      s = t - 3 + i
      same = document[b, t] == (document[b, s] if s >= 0 else document[b, 0])
      if document[b, t] and same:
        expected[b, t] += kernel[i] * whole[b, s + 3]
  given = jnp.asarray(ids, jnp.int32) if packed else None
  x, kernel, before = (jnp.asarray(a, jnp.float32) for a in (x, kernel, before))
  actual = short_convolution(x, kernel, segment_ids=given, before=before)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  nothing = short_convolution(x, kernel, segment_ids=given, before=jnp.zeros_like(before))
  np.testing.assert_array_equal(short_convolution(x, kernel, segment_ids=given), nothing)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"q": jnp.ones((2, 6, 12))}, r"q has shape \(2, 6, 12\)"),
    ({"k": jnp.ones((2, 6, 3, 5))}, r"k has shape \(2, 6, 3, 5\), expected \(2, 6, 3, 4\)"),
    ({"v": jnp.ones((2, 5, 3, 5))}, r"v has shape \(2, 5, 3, 5\), expected \(2, 6, 3, 5\)"),
    ({"beta": jnp.ones((2, 6, 1))}, r"beta has shape \(2, 6, 1\), expected \(2, 6, 3\)"),
    ({"state": jnp.ones((2, 3, 5, 4))}, r"state has shape .* expected \(2, 3, 4, 5\)"),
    ({"segment_ids": jnp.ones((2, 7), jnp.int32)}, r"segment_ids has shape \(2, 7\)"),
    ({"chunk_size": 0}, "chunk_size=0"),
  ],
)
def test_bad_input(changes, message, unchecked_types):
  arrays = {name: jnp.ones((2, 6, 3, width)) for name, width in (("q", 4), ("k", 4), ("v", 5))}
  with pytest.raises(ValueError, match=message):
    delta_rule(**{**arrays, "beta": jnp.ones((2, 6, 3)), **changes})
