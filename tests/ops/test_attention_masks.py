"""NaN and infinities stay in their document: attention, linear attention, targets and losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of
from jax.sharding import PartitionSpec

import ttt_jax
from ttt_jax.extras.baselines.ops import delta_rule, gated_linear_attention, short_convolution
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import token_losses
from ttt_jax.ops.attention.api import attention

# The third is bad: documents before and behind it, and padding.
IDS = np.array([[1] * 6 + [2] * 5 + [3] * 6 + [4] * 4 + [0] * 3, [0] * 2 + [3] * 9 + [4] * 13])
IDS = IDS.astype(np.int32)
BAD_DOCUMENT, PADDING = IDS == 3, IDS == 0
T = IDS.shape[1]


def _draw(*widths, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=(2, T, *width)), jnp.float32) for width in widths]


def _spoil(x, where, bad):
  """Makes the first number of every other token bad, so that some of the document's tokens are good."""
  chosen = where & (np.arange(T) % 2 == 0)[None]
  flat = np.array(x).reshape(2, T, -1)
  flat[..., 0] = np.where(chosen, bad, flat[..., 0])
  return jnp.asarray(flat.reshape(x.shape))


def _check(function, arrays, where, bad, *, shared=()):
  """Asserts that outputs and gradients of the other tokens equal those with harmless numbers instead.

  `shared` are parameters, whose gradients are also compared: for padding, that has no cotangent.
  """
  cotangent = _draw(jax.eval_shape(function, arrays, *shared).shape[2:], seed=1)[0]
  zero = jnp.where(where[(...,) + (None,) * (cotangent.ndim - 2)], 0, cotangent)

  @jax.jit
  def both(arrays, cotangent, *shared):
    y, pull_back = jax.vjp(function, arrays, *shared)
    return y, *pull_back(cotangent)

  expected = both(arrays, zero, *shared)
  for name in arrays:
    spoiled = arrays | {name: _spoil(arrays[name], where, bad)}
    cotangents = [zero] if shared else [_spoil(cotangent, where, bad), zero]
    for c in cotangents:
      y, gradients, *of_shared = both(spoiled, c, *shared)
      pairs = {"y": (y, expected[0])}
      pairs |= {f"d{n}": (gradients[n], expected[1][n]) for n in arrays}
      pairs = {n: (np.asarray(a)[~where], np.asarray(b)[~where]) for n, (a, b) in pairs.items()}
      pairs |= {f"shared {i}": pair for i, pair in enumerate(zip(of_shared, expected[2:]))}
      for n, (a, b) in pairs.items():
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=f"{n}, {bad} in {name}")
      if where is BAD_DOCUMENT:
        assert not np.isfinite(np.asarray(y)[where]).all(), (
          f"{bad} in {name} is not seen in its place"
        )


KINDS = {
  "local": {"window": 5},
  "blockwise": {"window": None},
  "blockwise, window": {"window": 5},
}


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", [BAD_DOCUMENT, PADDING], ids=["document", "padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention(kind, where, bad, monkeypatch):
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 8)
  if kind == "blockwise, window":
    monkeypatch.setattr("ttt_jax.ops.attention.api._LOCAL_WINDOW", 0)
  arrays = dict(zip("qkv", _draw((4, 6), (2, 6), (2, 6))))
  ids = jnp.asarray(np.where(IDS > 0, IDS, 0))
  _check(
    lambda a: attention(**a, segment_ids=ids, implementation="xla", **KINDS[kind]),
    arrays,
    where,
    bad,
  )


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_to_earlier_tokens(kind, name, monkeypatch):
  """In one document a NaN reaches just the tokens that see it: not earlier ones, none beyond the window."""
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 8)
  if kind == "blockwise, window":
    monkeypatch.setattr("ttt_jax.ops.attention.api._LOCAL_WINDOW", 0)
  arrays = dict(zip("qkv", _draw((4, 6), (2, 6), (2, 6))))
  arrays[name] = arrays[name].at[1, 13, 1, 2].set(jnp.nan)
  o = attention(**arrays, implementation="xla", **KINDS[kind])
  end = 14 if name == "q" else 13 + (KINDS[kind]["window"] or T)
  sees = (np.arange(T) >= 13) & (np.arange(T) < end)
  assert np.array_equal(np.isnan(o).any(axis=(2, 3)), np.stack([np.zeros(T, bool), sees]))


@pytest.mark.parametrize("kind", ["local", "blockwise"])
def test_attention_on_shards(kind):
  arrays = dict(zip("qkv", _draw((4, 6), (2, 6), (2, 6))))
  spec = PartitionSpec(None, "context")
  mapped = jax.shard_map(
    lambda a, ids: attention(**a, segment_ids=ids, context_axis="context", **KINDS[kind]),
    mesh=mesh_of(4),
    in_specs=(spec, spec),
    out_specs=spec,
  )
  _check(lambda a: mapped(a, jnp.asarray(IDS)), arrays, BAD_DOCUMENT, np.nan)


def test_a_broken_cotangent_is_not_lost():
  """A bad token reaches no other token, but its own gradient is NaN."""
  q, k, v = _draw((4, 6), (2, 6), (2, 6))
  broken = jnp.zeros(q.shape).at[1, 5, 2, 3].set(jnp.nan)
  for kind in ("local", "blockwise"):
    _, pull_back = jax.vjp(
      lambda q, kind=kind: attention(q, k, v, segment_ids=jnp.asarray(IDS), **KINDS[kind]), q
    )
    assert np.isnan(pull_back(broken)[0][1, 5]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", [BAD_DOCUMENT, PADDING], ids=["document", "padding"])
@pytest.mark.parametrize("op", [gated_linear_attention, delta_rule])
def test_linear_attention(op, where, bad):
  q, k, v, gate = _draw((2, 4), (2, 4), (2, 3), (2, 4))
  k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
  arrays = {"q": q, "k": k, "v": v}
  arrays |= (
    {"log_decay": -jnp.abs(gate)}
    if op is gated_linear_attention
    else {"beta": jax.nn.sigmoid(gate[..., 0])}
  )
  _check(lambda a: op(**a, segment_ids=jnp.asarray(IDS), chunk_size=8)[0], arrays, where, bad)


@pytest.mark.parametrize("op", [gated_linear_attention, delta_rule])
def test_the_state_of_linear_attention(op):
  """The state is NaN only in rows whose last document or incoming state held a NaN."""
  q, k, v, gate = _draw((2, 4), (2, 4), (2, 3), (2, 4))
  gate = -jnp.abs(gate) if op is gated_linear_attention else jax.nn.sigmoid(gate[..., 0])
  ids = jnp.asarray(IDS)
  for place, rows in (((0, 7), []), ((0, 18), [0]), ((1, 4), []), ((1, 20), [1])):
    _, state = op(q, k, v.at[place].set(jnp.nan), gate, segment_ids=ids, chunk_size=8)
    assert np.array_equal(np.isnan(state).any(axis=(1, 2, 3)), [row in rows for row in range(2)])
  broken = jnp.zeros((2, 2, 4, 3)).at[0, 1, 2, 1].set(jnp.nan)
  o, state = op(q, k, v, gate, state=broken, segment_ids=ids, chunk_size=8)
  assert np.array_equal(np.isnan(o).any(axis=(2, 3)), (np.arange(2) == 0)[:, None] & (IDS == 1))
  assert np.isfinite(state).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("where", [BAD_DOCUMENT, PADDING], ids=["document", "padding"])
def test_targets_and_short_convolution(where, bad):
  """Padding adds nothing to the gradients of the kernels, and its own gradient is 0."""
  x, heads = _draw((6,), (2, 3))
  conv, projection = jax.random.normal(jax.random.key(0), (5, 6)), jnp.eye(6) + 0.1
  kernel, ids = jax.random.normal(jax.random.key(1), (4, 2, 3)), jnp.asarray(IDS)

  def targets(arrays, conv, projection):
    return ttt_jax.ntp_targets(arrays["x"], conv, projection, chunk_size=8, segment_ids=ids)

  def short(arrays, kernel):
    return short_convolution(arrays["x"], kernel, segment_ids=ids)

  for function, source, weights in ((targets, x, (conv, projection)), (short, heads, (kernel,))):
    if where is PADDING:
      _check(function, {"x": source}, where, bad, shared=weights)
    else:
      _check(partial(lambda f, w, a: f(a, *w), function, weights), {"x": source}, where, bad)


def test_losses():
  """The logits of a token without a label do not matter."""
  (logits,) = _draw((7,))
  labels = np.where(IDS != 3, np.random.default_rng(0).integers(0, 7, IDS.shape), IGNORE)
  labels = jnp.asarray(labels, jnp.int32)
  _, pull_back = jax.vjp(lambda x: token_losses(x, labels)[0], logits)
  expected = pull_back(jnp.ones(IDS.shape))[0]
  spoiled = _spoil(logits, BAD_DOCUMENT, np.nan)
  losses, pull_back = jax.vjp(lambda x: token_losses(x, labels)[0], spoiled)
  np.testing.assert_array_equal(losses, token_losses(logits, labels)[0])
  np.testing.assert_array_equal(pull_back(jnp.ones(IDS.shape))[0], expected)
