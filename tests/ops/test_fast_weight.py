"""The contract: every implementation, collective, number of shards and dtype against the float64 law."""

import dataclasses
from functools import partial

import contract
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from contract import COLLECTIVES, OP_VARIANTS, assert_close, expected, make_case, packed, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import ttt_jax
from ttt_jax import FastWeightState, inplace_ttt

EACH_VARIANT = pytest.mark.parametrize("variant", OP_VARIANTS.values(), ids=OP_VARIANTS)


@pytest.fixture(scope="module")
def laws():
  """Returns cases and their law by (packed, dtype), all with decay, clip and an incoming state."""
  cache = {}

  def get(is_packed, dtype):
    if (is_packed, dtype) not in cache:
      case = make_case(
        dtype=dtype,
        segment_ids=packed(2, 24) if is_packed else None,
        decay="learned",
        clip_norm=2.0,
        state=True,
      )
      cache[is_packed, dtype] = case, expected(case)
    return cache[is_packed, dtype]

  return get


# Shards and the collective that joins them: each with each is the next test's and hypothesis' business.
SHARDS = {1: "all_gather", 2: "ring", 4: "all_to_all", 8: "doubling"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "one document"])
@pytest.mark.parametrize("shards", SHARDS)
@EACH_VARIANT
def test_contract(variant, shards, is_packed, dtype, laws):
  case, law = laws(is_packed, dtype)
  actual = run(case, dtype=dtype, shards=shards, collective=SHARDS[shards], **variant)
  assert_close(actual, law, dtype)


@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("shards", [2, 8])
@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("implementation", ["sequential", "associative"])
def test_collectives(implementation, collective, shards, wire_dtype, laws):
  """The exchange works in `sequential`'s own backward pass and under automatic differentiation."""
  case, law = laws(True, "float32")
  variant = {"implementation": implementation, "collective": collective, "wire_dtype": wire_dtype}
  assert_close(run(case, shards=shards, **variant), law, wire_dtype or "float32")


def test_contract_cases_clip_some_chunks_and_not_others(laws):
  for is_packed in (True, False):
    case, _ = laws(is_packed, "float32")
    z, v = (case.arrays[name].reshape(2, 8, 3, -1) for name in "zv")  # [B, N, C, ...]
    learned = np.ones((2, 8, 3))
    if case.segment_ids is not None:  # a chunk learns from its last document
      ids = np.asarray(case.segment_ids).reshape(2, 8, 3)
      learned = (ids == ids[..., -1:]) & (ids > 0)
    update = case.arrays["inner_lr"] * np.einsum("bncf,bncd,bnc->bnfd", z, v, learned)
    clipped = np.linalg.norm(update, axis=(2, 3)) > 2.0
    assert 2 < clipped.sum() < clipped.size - 2


OPTIONS = {
  "plain": {},
  "decay": {"decay": 0.75},
  "learned decay": {"decay": "learned"},
  "clip": {"clip_norm": 2.0},
  "all clipped": {"clip_norm": 0.01},
  "state": {"state": True},
  "ragged": {"tokens": 26},
  "ragged, packed, all": {
    "tokens": 25,
    "segment_ids": packed(2, 25, seed=3),
    "decay": "learned",
    "clip_norm": 2.0,
    "state": True,
  },
  "documents that end in the ragged tail": {
    "batch": 3,
    "tokens": 26,
    "segment_ids": [[1] * 25 + [2], [1] * 24 + [2] * 2, [1] * 25 + [0]],
    "state": True,
  },
  "shorter than a chunk": {"tokens": 2, "state": True},
  "one full chunk": {"tokens": 3},
  "chunks of one token": {"tokens": 5, "chunk_size": 1},
  "one row": {"batch": 1, "state": True},
  "padding before, between and behind": {
    "segment_ids": [[0] * 4 + [1] * 7 + [0] * 5 + [2] * 6 + [0] * 2, [1] * 20 + [0] * 4],
    "state": True,
  },
  "a row of padding drops the state": {
    "segment_ids": [[0] * 24, [1] * 3 + [0] * 21],
    "state": True,
  },
  "an id used again": {"segment_ids": [[1] * 5 + [2] * 5 + [1] * 14, [1, 2] * 12], "state": True},
  "documents of one token": {"segment_ids": [list(range(1, 25))] * 2, "state": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@EACH_VARIANT
def test_one_device(variant, options):
  case = make_case(**OPTIONS[options])
  assert_close(run(case, shards=None, **variant), expected(case))


SHARDED = {
  # 8 shards of one chunk of one token
  "a very short shard": {"tokens": 8, "chunk_size": 1, "segment_ids": packed(2, 8, 3)},
  "a document that spans five shards": {
    "segment_ids": [[1] * 4 + [2] * 17 + [3] * 3, [1] * 2 + [2] * 15 + [3] * 7]
  },
  "a border on a chunk's and a shard's edge": {
    "segment_ids": [[1] * 12 + [2] * 12, [1] * 6 + [2] * 18]
  },
  "shards without a document start": {"segment_ids": [[1] * 24, [1] * 23 + [2]]},
  "documents of one token": {"segment_ids": [list(range(1, 25))] * 2},
  "an id used again on the next shard": {
    "segment_ids": [[1] * 3 + [2] * 3 + [1] * 18, [1, 2] * 12]
  },
  "padding": {"segment_ids": [[0] * 5 + [1] * 7 + [0] * 12, [0] * 24]},
}


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_eight_shards(collective, name):
  case = make_case(**SHARDED[name], decay="learned", state=True)
  variant = {"implementation": "sequential", "collective": collective}
  assert_close(run(case, shards=8, **variant), expected(case))


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("variant", ["associative", "dual"])
def test_eight_shards_in_other_ways(variant, name):
  case = make_case(**SHARDED[name], decay="learned", state=True)
  assert_close(run(case, shards=8, **OP_VARIANTS[variant]), expected(case))


@EACH_VARIANT
def test_float64(variant):
  case = make_case(segment_ids=packed(2, 24), decay="learned", clip_norm=2.0, state=True)
  law = expected(case)
  with jax.enable_x64(True):
    for shards in (None, 4):
      actual = run(case, dtype="float64", shards=shards, **variant)
      assert_close(actual, law, "float64")


@EACH_VARIANT
def test_without_tracking_of_varying_axes(variant):
  """The op works with `check_vma=False`, which some code still sets."""
  case = make_case(segment_ids=packed(2, 24), decay="learned", clip_norm=2.0, state=True)
  actual = run(case, shards=4, check_vma=False, **variant)
  assert_close(actual, expected(case))


@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_case(data):
  """Hypothesis draws sizes, segments, decay, clip, tail, state, shards, implementation, collective."""
  shards = data.draw(st.sampled_from([None, 1, 2, 4, 8]), "shards")
  chunk_size = data.draw(st.integers(1, 4), "chunk_size")
  chunks = data.draw(st.integers(1, 2), "chunks per shard") * (shards or 2)
  tail = 0 if shards else data.draw(st.integers(0, chunk_size - 1), "tail")
  batch, tokens = data.draw(st.integers(1, 2), "batch"), chunks * chunk_size + tail
  row = st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)
  runs = st.one_of(row, row.map(sorted))
  case = make_case(
    seed=data.draw(st.integers(0, 99), "seed"),
    batch=batch,
    tokens=tokens,
    chunk_size=chunk_size,
    f=data.draw(st.integers(1, 7), "F"),
    d=data.draw(st.integers(1, 4), "D"),
    segment_ids=data.draw(st.none() | st.lists(runs, min_size=batch, max_size=batch), "segments"),
    decay=data.draw(st.sampled_from([None, "learned", 0.5, 1.0]), "decay"),
    clip_norm=data.draw(st.sampled_from([None, 0.5, 1.5]), "clip"),
    state=data.draw(st.booleans(), "state"),
  )
  actual = run(
    case,
    shards=shards,
    **data.draw(st.sampled_from([*OP_VARIANTS.values(), {}]), "variant"),
    collective=data.draw(st.sampled_from([*COLLECTIVES, None]), "collective"),
  )
  assert_close(actual, expected(case))


def _arrays(case, dtype=jnp.float32):
  return {name: jnp.asarray(x, dtype) for name, x in case.arrays.items()}


@EACH_VARIANT
def test_causality_as_a_gradient(variant):
  """y at t has a gradient to earlier tokens, but exactly 0 to later tokens and to v of its own chunk."""
  case = make_case(batch=1, tokens=11)
  arrays = _arrays(case)

  def y_at(z, v, t):
    y, _ = inplace_ttt(z, v, arrays["w_down"], chunk_size=3, inner_lr=0.25, **variant)
    return jnp.sum(y[0, t])

  jacobian = jax.jit(jax.vmap(jax.grad(y_at, (0, 1)), (None, None, 0)))
  dz, dv = jacobian(arrays["z"], arrays["v"], jnp.arange(11))
  dz, dv = np.abs(dz[:, 0]).sum(-1), np.abs(dv[:, 0]).sum(-1)  # [t, s]
  chunk = np.arange(11) // 3
  earlier = chunk[None, :] < chunk[:, None]
  assert not dv[~earlier].any()
  assert not dz[~earlier & ~np.eye(11, dtype=bool)].any()
  assert (dv[earlier] > 0).all()
  assert (dz[earlier] > 0).all()


@EACH_VARIANT
def test_reading_on_equals_reading_at_once(variant):
  case = make_case(tokens=20, decay=0.9)
  z, v, w = (_arrays(case)[name] for name in ("z", "v", "w_down"))
  op = partial(inplace_ttt, chunk_size=3, inner_lr=0.25, decay=0.9, **variant)
  y, state = op(z, v, w)
  first, middle = op(z[:, :12], v[:, :12], w)
  second, end = op(z[:, 12:], v[:, 12:], w, state=middle)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(end.S, state.S, rtol=1e-5, atol=1e-5)
  assert (middle.pending, end.pending, state.pending) == (0, 2, 2)


@EACH_VARIANT
@pytest.mark.parametrize("shards", [None, 4])
def test_rows_of_different_lengths(variant, shards):
  """Each row of a right-padded batch gives what it gives alone, without padding."""
  case = make_case(batch=4, state=True, decay=0.75, clip_norm=0.5)
  lengths = (24, 3, 17, 2)
  values = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
  common = {"chunk_size": 3, "inner_lr": 0.25, "decay": 0.75, "clip_norm": 0.5, **variant}

  def read(z, v, w, s, lengths=None, context_axis=None):
    y, state = ttt_jax.inplace_ttt(
      z,
      v,
      w,
      state=ttt_jax.FastWeightState(s),
      lengths=lengths,
      context_axis=context_axis,
      **common,
    )
    return y, state.S

  arguments = (values["z"], values["v"], values["w_down"], values["state"])
  whole = read
  if shards is not None:
    rows = PartitionSpec(None, "context")
    whole = jax.shard_map(
      partial(read, context_axis="context"),
      mesh=contract.mesh_of(shards),
      in_specs=(rows, rows, PartitionSpec(), PartitionSpec(), PartitionSpec()),
      out_specs=(rows, PartitionSpec()),
    )
  y, s = jax.jit(whole)(*arguments, jnp.asarray(lengths))
  for row, length in enumerate(lengths):
    z, v, w, state = arguments
    alone = read(z[row : row + 1, :length], v[row : row + 1, :length], w, state[row : row + 1])
    np.testing.assert_allclose(y[row, :length], alone[0][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(s[row], alone[1][0], rtol=1e-5, atol=1e-5)


def test_leading_dimensions_are_batch():
  case = make_case(batch=6)
  z, v, w = (_arrays(case)[name] for name in ("z", "v", "w_down"))
  op = partial(inplace_ttt, w_down=w, chunk_size=3, inner_lr=0.25)
  y, state = op(z, v)
  y2, state2 = op(z.reshape(2, 3, 24, 5), v.reshape(2, 3, 24, 6))
  assert np.array_equal(y2.reshape(y.shape), y)
  assert state2.S.shape == (2, 3, 5, 6)
  y0, state0 = op(z[0], v[0])
  np.testing.assert_allclose(y0, y[0], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(state0.S, state.S[0], rtol=1e-5, atol=1e-6)
  y_mapped, _ = jax.vmap(op)(z, v)
  np.testing.assert_allclose(y_mapped, y, rtol=1e-5, atol=1e-6)


@EACH_VARIANT
def test_in_scan_and_checkpoint(variant):
  """Three layers as a scan over stacked weights with remat equal the same layers written out."""
  case = make_case(f=6, d=5)
  x = jnp.asarray(case.arrays["v"], jnp.float32)
  ups = jax.random.normal(jax.random.key(0), (3, 5, 6))
  downs = jax.random.normal(jax.random.key(1), (3, 6, 5))

  def layer(x, weights):
    up, down = weights
    y, _ = inplace_ttt(jnp.tanh(x @ up), x, down, chunk_size=3, inner_lr=0.1, **variant)
    return y / 4, None

  def scanned(x, ups, downs):
    return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (ups, downs))[0] ** 2)

  def written_out(x, ups, downs):
    for i in range(3):
      x, _ = layer(x, (ups[i], downs[i]))
    return jnp.sum(x**2)

  actual = jax.jit(jax.grad(scanned, (0, 1, 2)))(x, ups, downs)
  law = jax.jit(jax.grad(written_out, (0, 1, 2)))(x, ups, downs)
  for a, b in zip(actual, law):
    assert np.max(np.abs(a - b)) < 1e-5 * np.max(np.abs(b))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_data_and_tokens_over_context(kind):
  case = make_case(batch=4, segment_ids=packed(4, 24), decay="learned", state=True)
  mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(kind,) * 2)
  rows, tokens, whole = PartitionSpec("data"), PartitionSpec("data", "context"), PartitionSpec()
  specs = {
    "z": tokens,
    "v": tokens,
    "w_down": whole,
    "inner_lr": whole,
    "decay": whole,
    "state": rows,
  }

  def local(arrays, segment_ids):
    arrays = arrays | {"state": FastWeightState(arrays["state"])}
    y, state = inplace_ttt(**arrays, chunk_size=3, segment_ids=segment_ids, context_axis="context")
    return y, state.S

  mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, tokens), out_specs=(tokens, rows))
  where = jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec),
    (specs, tokens, (tokens, rows)),
    is_leaf=lambda x: isinstance(x, PartitionSpec),
  )
  arrays = jax.device_put(_arrays(case), where[0])
  ids = jax.device_put(case.segment_ids, where[1])
  cotangents = tuple(jnp.asarray(c, jnp.float32) for c in case.cotangents)
  cotangents = jax.device_put(cotangents, where[2])

  @jax.jit
  def both(arrays, ids, cotangents):
    values, pull_back = jax.vjp(lambda arrays: mapped(arrays, ids), arrays)
    return values, pull_back(cotangents)[0]

  assert_close(jax.tree.map(np.asarray, both(arrays, ids, cotangents)), expected(case))


@pytest.mark.parametrize("implementation", ["associative", "dual"])
def test_second_derivatives(implementation):
  case = make_case(batch=1, tokens=9)
  arrays = _arrays(case)

  def loss(inner_lr):
    y, _ = inplace_ttt(
      arrays["z"],
      arrays["v"],
      arrays["w_down"],
      chunk_size=3,
      inner_lr=inner_lr,
      implementation=implementation,
    )
    return jnp.sum(y**2) / 2

  # y is affine in the rate, so the loss is a parabola.
  at = jnp.float32(0.25)
  second = jax.grad(jax.grad(loss))(at)
  law = loss(at + 1) - 2 * loss(at) + loss(at - 1)
  np.testing.assert_allclose(second, law, rtol=1e-3)


def test_small_updates_survive_in_the_float32_state():
  """1024 bfloat16 updates of 1e-4 of the weight add up; in bfloat16, `W + S` would stay W."""
  n = 1024
  z = jnp.ones((1, n, 1), jnp.bfloat16)
  v = jnp.ones((1, n, 1), jnp.bfloat16)
  w = jnp.ones((1, 1), jnp.bfloat16)
  op = partial(inplace_ttt, chunk_size=1, inner_lr=1e-4, implementation="sequential")
  y, state = op(z, v, w)
  assert state.S.dtype == jnp.float32
  np.testing.assert_allclose(state.S, n * 1e-4, rtol=1e-4)
  np.testing.assert_allclose(y[0, -1].astype(jnp.float32), 1 + (n - 1) * 1e-4, rtol=2**-8)
  _, lost = op(z, v, w, state_dtype=jnp.bfloat16)
  assert float(lost.S[0, 0, 0]) < 0.9 * n * 1e-4


def test_what_merging_loses_in_bfloat16():
  """A token reads the difference of two equal weights, one of which learned 1e-3: merged, it reads 0."""
  n = 11
  z = jnp.zeros((1, n, 2), jnp.bfloat16).at[0, :, 0].set(1).at[0, -1, 1].set(-1)
  v = jnp.ones((1, n, 1), jnp.bfloat16)
  w = jnp.ones((2, 1), jnp.bfloat16)
  op = partial(inplace_ttt, chunk_size=1, inner_lr=1e-4)
  for variant in (
    OP_VARIANTS["dual"],
    OP_VARIANTS["associative"],
    OP_VARIANTS["sequential, two products"],
    {},
  ):
    y, _ = op(z, v, w, **variant)
    np.testing.assert_allclose(float(y[0, -1, 0]), 1e-3, rtol=2**-7)
  y, _ = op(z, v, w, **OP_VARIANTS["sequential, one product"])
  assert float(y[0, -1, 0]) == 0


@EACH_VARIANT
def test_stats(variant):
  case = make_case(segment_ids=packed(2, 24))
  arrays = _arrays(case)
  y, state, stats = inplace_ttt(
    **arrays, chunk_size=3, segment_ids=contract._ids(case), return_stats=True, **variant
  )
  z, v = case.arrays["z"].reshape(2, 8, 3, 5), case.arrays["v"].reshape(2, 8, 3, 6)
  ids = case.segment_ids.reshape(2, 8, 3)
  writes = ((ids == ids[:, :, -1:]) & (ids != 0))[..., None]
  update = 0.25 * np.einsum("bcf,bcd->bfd", z[:, -1], (v * writes)[:, -1])
  np.testing.assert_allclose(stats.update, np.linalg.norm(update, axis=(1, 2)), rtol=1e-5)
  np.testing.assert_allclose(stats.state, np.linalg.norm(state.S, axis=(1, 2)), rtol=1e-5)
  slow = case.arrays["z"] @ case.arrays["w_down"]
  np.testing.assert_allclose(stats.slow, np.linalg.norm(slow, axis=(1, 2)), rtol=1e-5)
  np.testing.assert_allclose(stats.fast, np.linalg.norm(y - slow, axis=(1, 2)), rtol=1e-4)


def test_stats_of_long_rows_are_estimates():
  case = make_case(tokens=1200)
  y, _, stats = inplace_ttt(**_arrays(case), chunk_size=3, return_stats=True)
  slow = case.arrays["z"] @ case.arrays["w_down"]
  np.testing.assert_allclose(stats.slow, np.linalg.norm(slow, axis=(1, 2)), rtol=0.2)
  np.testing.assert_allclose(stats.fast, np.linalg.norm(y - slow, axis=(1, 2)), rtol=0.2)


def _sizes(jaxpr):
  """Yields the number of elements of every array that a program makes, inner programs included."""
  for equation in jaxpr.eqns:
    for out in equation.outvars:
      yield out.aval.size if hasattr(out.aval, "size") else 0
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _sizes(inner)


def test_sequential_holds_one_state():
  """Forward and backward make no array as large as a few states, whatever the number of chunks."""
  chunks, c, f, d = 64, 2, 16, 24
  z, v = jnp.ones((1, chunks * c, f)), jnp.ones((1, chunks * c, d))
  w = jnp.ones((f, d))

  def largest(implementation):
    def loss(z, v, w, lr, decay):
      y, state = inplace_ttt(
        z,
        v,
        w,
        chunk_size=c,
        inner_lr=lr,
        decay=decay,
        clip_norm=1.0,
        implementation=implementation,
      )
      return jnp.sum(y) + jnp.sum(state.S)

    gradient = jax.grad(loss, (0, 1, 2, 3, 4))
    jaxpr = jax.make_jaxpr(gradient)(z, v, w, jnp.float32(0.1), jnp.float32(0.9))
    return max(_sizes(jaxpr.jaxpr))

  assert largest("sequential") <= chunks * c * max(f, d)  # the inputs' own size
  assert largest("associative") >= chunks * f * d  # the measure does measure


def _call(**changes):
  arguments = {
    "z": jnp.ones((2, 12, 5)),
    "v": jnp.ones((2, 12, 6)),
    "w_down": jnp.ones((5, 6)),
    "chunk_size": 4,
    "inner_lr": 0.1,
  }
  return inplace_ttt(**(arguments | changes))


BAD = [
  ({"z": jnp.ones((2, 12, 5), jnp.int32)}, "z has dtype int32"),
  ({"v": jnp.ones((2, 11, 6))}, r"v has shape \(2, 11, 6\).*\(2, 12\)"),
  ({"w_down": jnp.ones((6, 5))}, r"w_down has shape \(6, 5\), expected \[F, D\] = \(5, 6\)"),
  ({"chunk_size": 0}, "chunk_size=0"),
  ({"decay": 0.0}, r"decay=0.0 must be in \(0, 1\]"),
  ({"decay": 1.01}, "decay=1.01"),
  ({"decay": jnp.ones(2)}, r"decay has shape \(2,\)"),
  ({"inner_lr": jnp.ones(2)}, r"inner_lr has shape \(2,\)"),
  ({"lengths": jnp.ones(3, jnp.int32)}, r"lengths has shape \(3,\).*expected integers \(2,\)"),
  ({"lengths": jnp.ones(2)}, "lengths has shape .* and dtype float32"),
  ({"clip_norm": 0.0}, "clip_norm=0.0 must be positive"),
  ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive"),
  ({"clip_norm": jnp.float32(1)}, "clip_norm.*Python float"),
  (
    {"segment_ids": jnp.ones((2, 11), jnp.int32)},
    r"segment_ids has shape \(2, 11\), expected \(2, 12\)",
  ),
  ({"segment_ids": jnp.ones((2, 12))}, "segment_ids has dtype float32"),
  ({"state": FastWeightState(jnp.ones((2, 6, 5)))}, r"state.S has shape \(2, 6, 5\)"),
  ({"state": FastWeightState(jnp.ones((2, 5, 6), jnp.bfloat16))}, "state.S has dtype bfloat16"),
  ({"state": FastWeightState(jnp.ones((2, 5, 6)), 3)}, "middle of a chunk: 3 tokens"),
  (
    {"implementation": "fast"},
    "implementation='fast' is not one of 'associative', 'dual', 'sequential'",
  ),
  ({"context_axis": "context"}, "context_axis='context' is not a mesh axis of an enclosing"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input(changes, message, unchecked_types):
  with pytest.raises(ValueError, match=message):
    _call(**changes)


@pytest.mark.parametrize("implementation", ["associative", "dual"])
def test_merge_needs_a_state_to_merge(implementation):
  with pytest.raises(NotImplementedError, match=f"merge=True: implementation='{implementation}'"):
    _call(implementation=implementation, merge=True)


def _on_shards(**changes):
  tokens = PartitionSpec(None, "context")
  return jax.shard_map(
    lambda z, v: _call(z=z, v=v, context_axis="context", **changes)[0],
    mesh=contract.mesh_of(4),
    in_specs=(tokens, tokens),
    out_specs=tokens,
  )(jnp.ones((2, 16, 5)), jnp.ones((2, 16, 6)))


def test_a_decay_that_is_an_array_with_lengths():
  """An array as decay gives the numbers of the constant; its own gradient is refused, not wrong."""
  rng = np.random.default_rng(0)
  z, v = (jnp.asarray(rng.normal(size=(2, 12, n)), jnp.float32) for n in (5, 6))
  lengths = jnp.array([12, 7], jnp.int32)

  def total(decay, z):
    y, state = _call(z=z, v=v, lengths=lengths, decay=decay)
    return jnp.sum(y**2) + jnp.sum(state.S**2)

  expected = jax.value_and_grad(lambda z: total(0.5, z))(z)
  actual = jax.jit(jax.value_and_grad(total, argnums=1))(jnp.float32(0.5), z)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), actual, expected)
  with pytest.raises(NotImplementedError, match="the gradient of decay with lengths"):
    jax.jit(jax.grad(total))(jnp.float32(0.5), z)


def test_bad_input_on_shards(unchecked_types):
  with pytest.raises(ValueError, match=r"chunk_size=3 does not divide the 4 tokens of a shard.*16"):
    _on_shards(chunk_size=3)
  with pytest.raises(ValueError, match="wire_dtype=int8 is not a floating-point dtype"):
    _on_shards(wire_dtype="int8")
  with pytest.raises(ValueError, match="tensor_axis='tensor' is not a mesh axis"):
    _on_shards(tensor_axis="tensor")
  with pytest.raises(ValueError, match="collective='mail'"):
    _on_shards(collective="mail")
  varying = jax.shard_map(
    lambda z, v, s: _call(z=z, v=v, state=FastWeightState(s), context_axis="context")[0],
    mesh=contract.mesh_of(4),
    in_specs=(PartitionSpec(None, "context"),) * 2 + (PartitionSpec("context"),),
    out_specs=PartitionSpec(None, "context"),
  )
  with pytest.raises(ValueError, match=r"state\.S varies over context_axis='context'"):
    varying(jnp.ones((2, 16, 5)), jnp.ones((2, 16, 6)), jnp.ones((8, 5, 6)))


def test_state_is_a_pytree_that_can_be_replaced():
  _, state = _call(chunk_size=5)
  assert state.pending == 2
  assert [x.shape for x in jax.tree.leaves(state)] == [(2, 5, 6)]
  y, _ = _call(chunk_size=5, state=dataclasses.replace(state, pending=0))
  assert y.shape == (2, 12, 6)
  assert ttt_jax.FastWeightState is FastWeightState
