"""The operator obeys its laws, and the exclusive prefix over devices equals a plain loop."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import COLLECTIVES, mesh_of, several_slices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from ttt_jax import Update, combine, exclusive_prefix
from ttt_jax.ops.update import apply_update


def _draw(seed, *lead, size=(3, 2)):
  """Draws keeps: a reset, a decay or the paper's 1."""
  rng = np.random.default_rng(seed)
  keep = rng.choice([0.0, 0.75, 1.0], lead)
  return Update(
    jnp.asarray(keep, jnp.float32), jnp.asarray(rng.normal(size=(*lead, *size)), jnp.float32)
  )


def _assert_same(a, b):
  np.testing.assert_allclose(a.keep, b.keep, rtol=1e-6)
  np.testing.assert_allclose(a.delta, b.delta, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_associative_with_identity(seed):
  a, b, c = (_draw(seed + i, 4) for i in range(3))
  _assert_same(combine(combine(a, b), c), combine(a, combine(b, c)))
  identity = Update(jnp.ones(4), jnp.zeros((4, 3, 2)))
  _assert_same(combine(identity, a), a)
  _assert_same(combine(a, identity), a)
  state = _draw(seed + 3, 4).delta
  np.testing.assert_allclose(
    apply_update(combine(a, b), state),
    apply_update(b, apply_update(a, state)),
    rtol=1e-5,
    atol=1e-6,
  )


def test_order_matters():
  a, reset = _draw(0, 1), Update(jnp.zeros(1), jnp.ones((1, 3, 2)))
  assert not np.allclose(combine(a, reset).delta, combine(reset, a).delta)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_fold(reverse):
  updates = _draw(5, 7)
  # With reverse=True lax.associative_scan hands over the later element first.
  operator = (lambda later, earlier: combine(earlier, later)) if reverse else combine
  scanned = jax.lax.associative_scan(operator, updates, reverse=reverse)
  each = [jax.tree.map(lambda x, i=i: x[i], updates) for i in range(7)]
  for i in range(7):
    law = reduce(combine, each[i:] if reverse else each[: i + 1])
    _assert_same(jax.tree.map(lambda x, i=i: x[i], scanned), law)


def _loop(updates, reverse):
  """Computes the exclusive prefix of `[P, ...]` updates one after another, in float64."""
  keeps, deltas = (np.asarray(x, np.float64) for x in updates)
  keep, delta = np.ones_like(keeps[0]), np.zeros_like(deltas[0])
  out = []
  for p in reversed(range(len(keeps))) if reverse else range(len(keeps)):
    out.append((keep, delta))
    factor = keeps[p].reshape(keeps[p].shape + (1,) * (delta.ndim - keeps[p].ndim))
    keep, delta = keep * keeps[p], factor * delta + deltas[p]
  return [np.stack(x) for x in zip(*(reversed(out) if reverse else out))]


def _on_devices(updates, shards, **settings):
  """Computes `exclusive_prefix` of `[P, ...]` updates, one per device, as `[P, ...]` prefixes."""

  def local(update):
    mine = Update(update.keep[0], update.delta[0])
    return jax.tree.map(lambda x: x[None], exclusive_prefix(mine, "context", **settings))

  spec = PartitionSpec("context")
  mapped = jax.shard_map(local, mesh=mesh_of(shards), in_specs=spec, out_specs=spec)
  with several_slices():
    return mapped(updates)


SHAPES = [((2,), (5, 3)), ((), (8, 2)), ((2, 2), (3,)), ((3,), ())]


@pytest.mark.parametrize(("lead", "size"), SHAPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_exclusive_prefix(collective, shards, reverse, lead, size):
  updates = _draw(shards, shards, *lead, size=size)
  prefix = jax.jit(partial(_on_devices, shards=shards, collective=collective, reverse=reverse))(
    updates
  )
  keep, delta = _loop(updates, reverse)
  np.testing.assert_allclose(prefix.keep, keep, rtol=1e-6)
  np.testing.assert_allclose(prefix.delta, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_on_the_wire_in_bfloat16(collective):
  """Deltas are rounded to 8 bits each time they are sent; sums are not."""
  updates = _draw(3, 8, 2, size=(8, 2))
  settings = {"shards": 8, "collective": collective}
  wide = jax.jit(partial(_on_devices, **settings))(updates)
  narrow = jax.jit(partial(_on_devices, wire_dtype=jnp.bfloat16, **settings))(updates)
  assert narrow.delta.dtype == jnp.float32
  error = np.max(np.abs(narrow.delta - wide.delta)) / np.max(np.abs(wide.delta))
  assert 2**-12 < error < 7 * 2**-9
  np.testing.assert_array_equal(narrow.keep, wide.keep)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_gradient_of_the_prefix(collective, shards, reverse):
  """The derivatives of both outputs in keep and delta equal those of the loop."""
  updates = _draw(9, shards, 2)
  weights = _draw(10, shards, 2)

  def weighted(prefix):
    return jnp.sum(prefix.keep * (1 + weights.keep)) + jnp.sum(prefix.delta * weights.delta)

  def plain(updates):
    order = range(shards)[::-1] if reverse else range(shards)
    prefix, out = Update(jnp.ones(2), jnp.zeros((2, 3, 2))), {}
    for p in order:
      out[p] = prefix
      prefix = combine(prefix, jax.tree.map(lambda x, p=p: x[p], updates))
    return weighted(jax.tree.map(lambda *x: jnp.stack(x), *(out[p] for p in range(shards))))

  def parallel(updates):
    return weighted(_on_devices(updates, shards, collective=collective, reverse=reverse))

  _assert_same(jax.jit(jax.grad(parallel))(updates), jax.grad(plain)(updates))


def test_bad_input(unchecked_types):
  update = _draw(0, 2, 2)
  with pytest.raises(ValueError, match=r"collective='post' is not one of all_gather, doubling"):
    _on_devices(update, 2, collective="post")
  with pytest.raises(ValueError, match="'context' is not a mesh axis of an enclosing"):
    exclusive_prefix(update, "context")
  with pytest.raises(ValueError, match=r"update.keep has shape \(1,\)"):
    jax.shard_map(
      lambda x: exclusive_prefix(Update(jnp.ones(1), x), "context").delta,
      mesh=mesh_of(2),
      in_specs=PartitionSpec("context"),
      out_specs=PartitionSpec("context"),
    )(jnp.ones((4, 3)))
