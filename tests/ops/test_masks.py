"""NaN and infinities of one document, of padding or after a row's end reach nothing else."""

from functools import partial

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import COLLECTIVES, OP_VARIANTS, TOLERANCE, make_case
from jax.sharding import PartitionSpec

import ttt_jax

EACH_VARIANT = pytest.mark.parametrize("variant", OP_VARIANTS.values(), ids=OP_VARIANTS)

# 24 tokens in chunks of 3; the bad document begins and ends inside of a chunk, or at a chunk's edge.
ROWS = {
  "first": ([1] * 10 + [2] * 14, [1]),
  "in between": ([1] * 7 + [2] * 4 + [3] * 13, [2]),
  "last": ([1] * 14 + [2] * 10, [2]),
  "at edges": ([1] * 6 + [2] * 6 + [3] * 12, [2]),
  "padding": ([0] * 4 + [1] * 7 + [0] * 3 + [2] * 8 + [0] * 2, [0]),
}


def _case(name, **options):
  ids, bad = ROWS[name]
  ids = np.array([ids, ids[::-1]], np.int32)
  case = make_case(segment_ids=ids, **{"decay": "learned", "clip_norm": 2.0} | options)
  return case, np.isin(ids, bad)


def _spoiled(case, where, bad, *, of=("z", "v"), cotangent=None):
  """Returns the case with bad numbers in the tokens `where`, and in their cotangents unless given."""
  arrays = dict(case.arrays)
  for name in of:
    arrays[name] = np.where(
      where[..., None] & (np.arange(arrays[name].shape[-1]) < 2), bad, arrays[name]
    )
  d_y, d_s = case.cotangents
  d_y = np.where(where[..., None], bad if cotangent is None else cotangent, d_y)
  return case._replace(arrays=arrays, cotangents=(d_y, d_s))


def _cut(case, where):
  """Returns the case with harmless tokens instead, on which nothing else depends."""
  arrays = case.arrays | {
    name: np.where(where[..., None], 0.5, case.arrays[name]) for name in ("z", "v")
  }
  d_y, d_s = case.cotangents
  return case._replace(arrays=arrays, cotangents=(np.where(where[..., None], 0, d_y), d_s))


def _assert_others_unchanged(actual, law, where, *, last_is_good, weights=False, dtype="float32"):
  """Selects y, dz and dv of the other tokens, and the state of rows whose last document is another."""
  (values, gradients), (law_values, law_gradients) = actual, law
  pairs = {"y": (values[0], law_values[0])}
  pairs |= {f"d{n}": (gradients[n], law_gradients[n]) for n in ("z", "v")}
  pairs = {name: (a[~where], b[~where]) for name, (a, b) in pairs.items()}
  pairs["S"] = (values[1][last_is_good], law_values[1][last_is_good])
  for name in weights or ():
    pairs[f"d{name}"] = gradients[name], law_gradients[name]
  for name, (a, b) in pairs.items():
    assert np.isfinite(a).all(), name
    scale = max(np.max(np.abs(b), initial=0), 0.1)
    assert np.max(np.abs(a - b), initial=0) < 10 * TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("name", ROWS)
@EACH_VARIANT
def test_on_one_device(variant, name):
  case, where = _case(name)
  bad = np.inf if name in ("at edges", "last") else np.nan
  law = contract.expected(_cut(case, where))
  actual = contract.run(_spoiled(case, where, bad), shards=None, **variant)
  assert not np.isfinite(actual[0][0][where]).all()  # it shows where it is
  good = ~where[:, -1] | (name == "padding")
  _assert_others_unchanged(actual, law, where, last_is_good=good)


SHARDS = [(1, "first"), (2, "in between"), (4, "last"), (4, "padding"), (8, "first")]


@pytest.mark.parametrize(("shards", "name"), SHARDS)
@EACH_VARIANT
def test_on_shards(variant, shards, name):
  case, where = _case(name)
  law = contract.expected(_cut(case, where))
  collective = {1: "ring", 2: "all_to_all", 4: "doubling", 8: "all_gather"}[shards]
  actual = contract.run(
    _spoiled(case, where, np.nan), shards=shards, collective=collective, **variant
  )
  good = ~where[:, -1] | (name == "padding")
  _assert_others_unchanged(actual, law, where, last_is_good=good)


@pytest.mark.parametrize(("shards", "name"), [(4, "first"), (8, "in between"), (8, "last")])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_collectives(collective, shards, name):
  """A weight of 0 drops a bad delta, forward and backward; the incoming state is the bad document's."""
  case, where = _case(name, clip_norm=None, state=True)
  law = contract.expected(_cut(case, where))
  variant = {"implementation": "sequential", "shards": shards, "collective": collective}
  bad = np.inf if name == "in between" else np.nan
  actual = contract.run(_spoiled(case, where, bad), **variant)
  _assert_others_unchanged(actual, law, where, last_is_good=~where[:, -1])


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("reverse", [False, True])
def test_exclusive_prefix_drops_what_a_keep_of_zero_drops(reverse, collective):
  """`combine` drops bad numbers too; a keep that happens to be 0 still has a gradient."""
  keep = np.array([[1, 0.5], [0.5, 1], [0, 0.5], [1, 0.5]], np.float32)
  if reverse:
    keep = keep[::-1].copy()
  delta = np.random.default_rng(0).normal(size=(4, 2, 5, 3)).astype(np.float32)
  first, last = (3, 0) if reverse else (0, 3)
  delta[first, 0, 2] = np.nan

  def prefix(keep, delta):
    return ttt_jax.exclusive_prefix(
      ttt_jax.Update(keep[0], delta[0]), "context", collective=collective, reverse=reverse
    ).delta[None]

  spec = PartitionSpec("context")
  mapped = jax.shard_map(prefix, mesh=contract.mesh_of(4), in_specs=spec, out_specs=spec)
  clean = np.where(np.isnan(delta), 7, delta)
  with contract.several_slices():
    actual, expected = jax.jit(mapped)(keep, delta), jax.jit(mapped)(keep, clean)
    of_keep = jax.jit(jax.grad(lambda k: jnp.sum(mapped(k, clean)[last])))(keep)
  assert np.isfinite(actual[last]).all()
  np.testing.assert_array_equal(actual[last], expected[last])
  two = 1 if reverse else 2
  assert abs(of_keep[two, 0]) > 0.1


def test_combine_has_a_gradient_in_a_keep_of_zero():
  delta = jnp.arange(1.0, 7).reshape(1, 2, 3)

  def total(keep, delta):
    earlier, later = ttt_jax.Update(jnp.ones(1), delta), ttt_jax.Update(keep, delta)
    return jnp.sum(ttt_jax.combine(earlier, later).delta)

  zero = jnp.zeros(1)
  assert float(jax.grad(total)(zero, delta)[0]) == 21
  assert float(jax.jvp(partial(total, delta=delta), (zero,), (jnp.ones(1),))[1]) == 21
  assert np.array_equal(jax.grad(total, 1)(zero, delta), jnp.ones((1, 2, 3)))
  broken = ttt_jax.Update(jnp.ones(1), delta.at[0, 1, 1].set(jnp.nan))
  assert np.array_equal(ttt_jax.combine(broken, ttt_jax.Update(zero, delta)).delta, delta)


@pytest.mark.parametrize("is_padding", [True, False])
@EACH_VARIANT
def test_without_a_cotangent_it_adds_nothing_to_the_gradient_of_w(variant, is_padding):
  """Padding adds nothing to the gradients of the rate and the decay either; it enters no loss."""
  case, where = _case("padding" if is_padding else "first", clip_norm=None)
  weights = ("w_down", "inner_lr", "decay") if is_padding else ("w_down",)
  if not is_padding:  # the state of a row that ends with the bad document has a cotangent
    case = case._replace(cotangents=(case.cotangents[0], 0 * case.cotangents[1]))
  law = contract.expected(_cut(case, where))
  actual = contract.run(_spoiled(case, where, np.nan, cotangent=0), shards=None, **variant)
  _assert_others_unchanged(actual, law, where, last_is_good=np.zeros(2, bool), weights=weights)


@EACH_VARIANT
def test_the_ragged_tail(variant):
  """A document ends or begins in the tail, which reads but does not update."""
  ids = np.array([[1] * 25 + [2], [1] * 10 + [2] * 16], np.int32)
  for bad in (1, 2):
    case = make_case(tokens=26, segment_ids=ids, decay="learned", state=True)
    where = ids == bad
    law = contract.expected(_cut(case, where))
    actual = contract.run(_spoiled(case, where, np.nan), shards=None, **variant)
    _assert_others_unchanged(actual, law, where, last_is_good=np.zeros(2, bool))


@pytest.mark.parametrize("shards", [None, 4])
@EACH_VARIANT
def test_behind_the_end_of_a_row(variant, shards):
  """With `lengths`, padding enters nothing, also where it fills a part of the last chunk."""
  case = make_case(batch=3, state=True)
  lengths = np.array([24, 10, 3], np.int32)
  behind = np.arange(24)[None] >= lengths[:, None]

  def run(case):
    def function(arrays, lengths, context_axis=None):
      arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
      arrays["state"] = ttt_jax.FastWeightState(arrays["state"])
      y, state = ttt_jax.inplace_ttt(
        **arrays, chunk_size=3, decay=0.75, lengths=lengths, context_axis=context_axis, **variant
      )
      return y, state.S

    if shards is not None:
      tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
      specs = {name: tokens if name in "zv" else whole for name in case.arrays}
      function = jax.shard_map(
        partial(function, context_axis="context"),
        mesh=contract.mesh_of(shards),
        in_specs=(specs, whole),
        out_specs=(tokens, whole),
      )
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
    cotangents = tuple(jnp.asarray(c, jnp.float32) for c in case.cotangents)

    @jax.jit
    def both(arrays, cotangents):
      values, pull_back = jax.vjp(lambda a: function(a, jnp.asarray(lengths)), arrays)
      return values, pull_back(cotangents)[0]

    return jax.tree.map(np.asarray, both(arrays, cotangents))

  law = run(_cut(case, behind))
  actual = run(_spoiled(case, behind, np.nan, cotangent=0))
  _assert_others_unchanged(
    actual, law, behind, last_is_good=np.ones(3, bool), weights=("w_down", "inner_lr", "state")
  )


@pytest.mark.parametrize("shards", [None, 4])
@EACH_VARIANT
def test_the_future(variant, shards):
  """Without documents, later tokens, also of the same chunk, do not reach an output."""
  case = make_case(clip_norm=2.0, decay=0.75, state=True)
  later = np.broadcast_to(np.arange(24) >= 13, (2, 24))
  y = contract.run(_spoiled(case, later, np.nan), shards=shards, **variant)[0][0]
  law = contract.expected(_cut(case, later))[0][0]
  np.testing.assert_allclose(y[:, :13], law[:, :13], rtol=1e-4, atol=1e-5)
  assert np.isnan(y[:, 13::2]).any(axis=-1).all()
