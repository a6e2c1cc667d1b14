"""The least-squares rule: every implementation, on any number of shards, against the float64 oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import COLLECTIVES, mesh_of, packed, several_slices
from jax.sharding import AxisType, PartitionSpec

import ttt_jax
from ttt_jax.ops.fast_weight.least_squares.sums import (
  Sums,
  condition,
  factor,
  pack,
  packed_shape,
  unpack,
)
from ttt_jax.ops.fast_weight.reference import least_squares_reference

B, F, D, C, R = 2, 6, 3, 3, 4
TOLERANCE = {"float64": 1e-11, "float32": 2e-4}
ALL = ("associative", "dual", "sequential")


def make_arrays(*, tokens=24, seed=0, state=False, gate=True, decay=True, project=False):
  """Random arguments that are differentiated, in float64."""
  rng = np.random.default_rng(seed)
  arrays = {
    "z": rng.normal(size=(B, tokens, F)),
    "v": rng.normal(size=(B, tokens, D)),
    "w_down": rng.normal(size=(F, D)),
    "ridge": np.asarray(0.3),
    "read_scale": np.asarray(1.7),
  }
  arrays["z"][0, tokens // 5] = 0  # a token without a key
  if gate:
    # Sums without decay have the gate of the leverage alone.
    direction = (rng.normal(size=R if project else F),) if decay else ()
    arrays["read_gate"] = (np.asarray(0.6), np.asarray(5.0), *direction)
  if project:
    arrays["key_projection"] = rng.normal(size=(F, R))
  if decay:
    arrays["decay"] = np.asarray(0.8)
  if state:
    keys = rng.normal(size=(B, 4, R if project else F))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    arrays["state"] = (
      np.einsum("bcf,bcg->bfg", keys, keys),
      np.einsum("bcf,bcd->bfd", keys, rng.normal(size=(B, 4, D))),
    )
  return arrays


def cotangents(tokens, r):
  rng = np.random.default_rng(1)
  of_a = rng.normal(size=(B, r, r))
  return (
    rng.normal(size=(B, tokens, D)),
    of_a + np.swapaxes(of_a, 1, 2),
    rng.normal(size=(B, r, D)),
  )


def op(segment_ids=None, *, shards=None, **options):
  """`inplace_ttt` as a function of the arrays that gives y, A and D."""

  def local(arrays, segment_ids, context_axis=None):
    arrays = dict(arrays)
    if "state" in arrays:
      a, d = arrays["state"]
      arrays["state"] = ttt_jax.FastWeightState(A=a, D=d)
    with several_slices():
      y, state = ttt_jax.inplace_ttt(
        **arrays,
        chunk_size=C,
        rule="least_squares",
        segment_ids=segment_ids,
        context_axis=context_axis,
        **options,
      )
    return y, state.A, state.D

  ids = None if segment_ids is None else jnp.asarray(segment_ids)
  if shards is None:
    return lambda arrays: local(arrays, ids)

  def mapped(arrays):
    tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
    specs = {name: tokens if name in ("z", "v") else whole for name in arrays}
    return jax.shard_map(
      partial(local, context_axis="context"),
      mesh=mesh_of(shards),
      in_specs=(specs, whole if ids is None else tokens),
      out_specs=(tokens, whole, whole),
    )(arrays, ids)

  return mapped


def law(segment_ids=None):
  ids = None if segment_ids is None else jnp.asarray(segment_ids)
  return lambda arrays: least_squares_reference(**arrays, chunk_size=C, segment_ids=ids)


def both(function, arrays, dtype):
  """Values and gradients, of A's symmetric part."""
  arrays, out = to_jax((arrays, cotangents_of(arrays)), dtype)

  @jax.jit
  def run(arrays, out):
    values, pull_back = jax.vjp(function, arrays)
    return values, pull_back(out)[0]

  values, gradients = jax.tree.map(np.asarray, run(arrays, out))
  if "state" in gradients:
    a, d = gradients["state"]
    gradients["state"] = ((a + np.swapaxes(a, 1, 2)) / 2, d)
  return values, gradients


def to_jax(arrays, dtype="float32"):
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)


def cotangents_of(arrays):
  r = np.shape(arrays["key_projection"])[1] if "key_projection" in arrays else F
  return cotangents(arrays["z"].shape[1], r)


def assert_agree(got, want, dtype):
  flat, _ = jax.tree.flatten_with_path(want)
  for (path, b), a in zip(flat, jax.tree.leaves(got), strict=True):
    name = jax.tree_util.keystr(path)
    assert np.isfinite(a).all(), name
    size = max(np.max(np.abs(b)), 0.1 if np.ndim(b) == 0 else 0)
    error = np.max(np.abs(a - b)) / size if size else np.max(np.abs(a))
    assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"


def documents(kind, tokens=24):
  if kind is None:
    return None
  if kind == "packed":
    return packed(B, tokens, seed=2)
  ids = np.ones((B, tokens), np.int32)  # one border inside of a chunk, and padding behind
  ids[0, 13:], ids[1, -2:] = 2, 0
  return ids


CASES = [
  pytest.param(kind, tokens, options, id=f"{kind}-{tokens}-{'-'.join(options) or 'plain'}")
  for kind, tokens, options in [
    (None, 24, {"gate": False, "decay": False}),
    (None, 23, {}),
    (None, 23, {"state": True}),
    (None, 2, {"state": True}),
    ("long", 24, {"state": True}),
    ("long", 23, {"decay": False}),
    ("packed", 23, {"state": True, "gate": False}),
    ("long", 23, {"state": True, "project": True}),
    (None, 24, {"project": True}),
  ]
]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(("kind", "tokens", "options"), CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_device(dtype, kind, tokens, options, implementation):
  if implementation == "dual" and options.get("state"):
    pytest.skip("refused, see below")
  arrays, ids = make_arrays(tokens=tokens, **options), documents(kind, tokens)
  with jax.enable_x64(True):
    want = both(law(ids), arrays, "float64")
  with jax.enable_x64(dtype == "float64"):
    got = both(op(ids, implementation=implementation), arrays, dtype)
  assert_agree(got, want, dtype)


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
@pytest.mark.parametrize(
  ("kind", "options"),
  [
    (None, {"state": True}),
    ("long", {"state": True, "project": True}),
    ("packed", {}),
  ],
)
@pytest.mark.parametrize("shards", [2, 8])
def test_shards(shards, kind, options, implementation):
  arrays, ids = make_arrays(**options), documents(kind)
  with jax.enable_x64(True):
    want = both(law(ids), arrays, "float64")
    got = both(op(ids, shards=shards, implementation=implementation), arrays, "float64")
  assert_agree(got, want, "float64")


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_collectives(collective):
  arrays, ids = make_arrays(state=True), documents("long")
  with jax.enable_x64(True):
    want = both(law(ids), arrays, "float64")
    got = both(op(ids, shards=4, collective=collective), arrays, "float64")
  assert_agree(got, want, "float64")


def test_half_of_a_travels():
  """A is symmetric: it is packed to F // 2 + 1 columns, for odd and even F."""
  for f in (1, 2, 5, 6):
    rng = np.random.default_rng(f)
    a = rng.normal(size=(B, f, f))
    sums = Sums(jnp.asarray(a + np.swapaxes(a, 1, 2)), jnp.asarray(rng.normal(size=(B, f, D))))
    packed_sums = pack(sums)
    assert packed_sums.shape == (B, *packed_shape(f, D))
    assert packed_shape(f, D)[1] == f // 2 + 1 + D
    jax.tree.map(np.testing.assert_array_equal, unpack(packed_sums), sums)


def test_reading_on_is_reading_at_once():
  arrays = to_jax(make_arrays())
  whole = op()(arrays)
  for cut in (3, 12):
    first = {name: x[:, :cut] if name in ("z", "v") else x for name, x in arrays.items()}
    then = {name: x[:, cut:] if name in ("z", "v") else x for name, x in arrays.items()}
    y, a, d = op()(first)
    y_then, *sums = op()(then | {"state": (a, d)})
    np.testing.assert_allclose(jnp.concatenate([y, y_then], 1), whole[0], rtol=2e-4, atol=2e-4)
    for got, want in zip(sums, whole[1:], strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_lengths_are_rows_of_their_own():
  """A right-padded row is the row without its padding, whatever the padding holds."""
  arrays = make_arrays(decay=False)
  arrays["z"][0, 14:] = np.nan
  arrays = to_jax(arrays)
  y, a, d = op(lengths=jnp.asarray([14, 24]))(arrays)
  for row, length in ((0, 14), (1, 24)):
    alone = {
      name: x[row : row + 1, :length] if name in ("z", "v") else x for name, x in arrays.items()
    }
    y_row, a_row, d_row = op()(alone)
    np.testing.assert_allclose(y[row, :length], y_row[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(a[row], a_row[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(d[row], d_row[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_nan_stays_in_its_document(implementation):
  """In values and gradients: the other documents are what they are without it."""
  ids = np.ones((B, 24), np.int32)
  ids[:, 10:] = 2
  arrays = make_arrays(decay=False)
  function = op(ids, implementation=implementation)
  clean = both(function, arrays, "float32")
  arrays["z"][0, 2:5] = np.nan
  (y, *_), gradients = both(function, arrays, "float32")
  np.testing.assert_allclose(y[:, 10:], clean[0][0][:, 10:], rtol=1e-5)
  np.testing.assert_allclose(y[1], clean[0][0][1], rtol=1e-5)
  for name in ("z", "v"):
    np.testing.assert_allclose(
      gradients[name][0, 10:], clean[1][name][0, 10:], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(gradients[name][1], clean[1][name][1], rtol=1e-4, atol=1e-6)
  assert np.isnan(y[0, 6:10]).all()  # what saw it is not finite


@pytest.mark.parametrize("ridge", [1e-30, 1e-3, 10.0])
def test_one_repeated_token(ridge):
  """M has rank one and a ridge that float32 does not resolve: no NaN, and the one value is read."""
  rng = np.random.default_rng(0)
  z = jnp.asarray(np.broadcast_to(rng.normal(size=(1, 1, 64)), (1, 32, 64)), jnp.float32)
  v = jnp.ones((1, 32, D))

  def read(z, v):
    y, state = ttt_jax.inplace_ttt(
      z,
      v,
      jnp.zeros((64, D)),
      chunk_size=8,
      rule="least_squares",
      ridge=ridge,
      implementation="sequential",
    )
    return jnp.sum(y), (y, state)

  gradients, (y, state) = jax.grad(read, argnums=(0, 1), has_aux=True)(z, v)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((gradients, y, state)))
  assert not y[:, :8].any()
  if ridge < 1:
    np.testing.assert_allclose(y[:, 8:], 1, atol=0.02)
  assert float(condition(factor(state.A, jnp.float32(ridge)))[0]) < 1e8


def test_leverage_gates_what_was_not_seen():
  """A token like those before is read, one orthogonal to all of them is not."""
  keys = np.eye(8, dtype=np.float32)[None, [0, 1, 0, 5]]
  v = jnp.ones((1, 4, D))
  y, _ = ttt_jax.inplace_ttt(
    jnp.asarray(keys),
    v,
    jnp.zeros((8, D)),
    chunk_size=2,
    rule="least_squares",
    read_gate=(0.5, 50.0),
  )
  np.testing.assert_allclose(y[0, 2], 1, atol=0.01)
  np.testing.assert_allclose(y[0, 3], 0, atol=1e-6)


def test_bfloat16_activations():
  """Keys, sums and solves are float32; what is rounded is z, v, W and y."""
  arrays = make_arrays(gate=False)
  rounded = {
    name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
    if name in ("z", "v", "w_down")
    else x
    for name, x in arrays.items()
  }
  with jax.enable_x64(True):
    want = law()(jax.tree.map(jnp.asarray, rounded))
  got = op()(
    {
      name: jnp.asarray(x, jnp.bfloat16 if name in ("z", "v", "w_down") else jnp.float32)
      for name, x in rounded.items()
    }
  )
  assert got[0].dtype == jnp.bfloat16
  assert got[1].dtype == got[2].dtype == jnp.float32
  np.testing.assert_allclose(got[0].astype(np.float32), want[0], rtol=0.02, atol=0.03)
  np.testing.assert_allclose(got[2], want[2], rtol=1e-4, atol=1e-4)


def test_statistics():
  arrays = to_jax(make_arrays())
  function = partial(
    ttt_jax.inplace_ttt, chunk_size=C, rule="least_squares", return_stats=True, **arrays
  )
  _, state, stats = function()
  np.testing.assert_allclose(stats.state, jnp.linalg.norm(state.D, axis=(1, 2)), rtol=1e-5)
  assert ((stats.leverage > 0) & (stats.leverage < 1)).all()
  assert (stats.condition >= 1).all()
  slow = jnp.linalg.norm(arrays["z"] @ arrays["w_down"], axis=(1, 2))
  np.testing.assert_allclose(stats.slow, slow, rtol=1e-4)


def test_memory_does_not_grow_with_the_chunks():
  """No state per chunk is kept for the backward pass: twice the chunks take less than a state more."""

  def temporary(chunk_size):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 256, 128), (1, 256, 8), (128, 8))]

    def loss(z, v, w):
      y, _ = ttt_jax.inplace_ttt(
        z, v, w, chunk_size=chunk_size, rule="least_squares", implementation="sequential"
      )
      return jnp.sum(y)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary(8) < temporary(64) + 128 * 128 * 4


def test_forward_mode_and_the_refusal():
  arrays = make_arrays(gate=False, decay=False)
  tangents = jax.tree.map(lambda x: jnp.ones_like(jnp.asarray(x)), arrays)
  primals = jax.tree.map(jnp.asarray, arrays)
  _, tangent = jax.jvp(op(implementation="associative"), (primals,), (tangents,))
  _, dual_tangent = jax.jvp(op(implementation="dual"), (primals,), (tangents,))
  np.testing.assert_allclose(tangent[0], dual_tangent[0], rtol=1e-3, atol=1e-3)
  with pytest.raises(ttt_jax.UnsupportedError, match="implementation='associative'"):
    jax.jvp(op(implementation="sequential"), (primals,), (tangents,))


@pytest.mark.usefixtures("unchecked_types")
def test_bad_input():
  arrays = make_arrays(gate=False, decay=False)
  z, v, w = (jnp.asarray(arrays[name]) for name in ("z", "v", "w_down"))
  ours = {"chunk_size": C, "rule": "least_squares"}
  a, d = jnp.zeros((B, F, F)), jnp.zeros((B, F, D))
  state = ttt_jax.FastWeightState
  for options, message in (
    ({**ours, "rule": "squares"}, "rule='squares' is not one of 'sum', 'least_squares'"),
    ({**ours, "ridge": 0.0}, "ridge=0.0 must be positive"),
    ({**ours, "read_gate": 0.5}, r"read_gate=0.5 is not \(threshold, sharpness\)"),
    (
      {**ours, "read_gate": (0.5, 9.0, np.ones(5))},
      r"read_gate\[2\] has shape \(5,\), .* \[6\]",
    ),
    (
      {**ours, "key_projection": np.ones((5, 2))},
      r"key_projection has shape \(5, 2\), .* \[6, R\]",
    ),
    ({**ours, "clip_norm": 1.0}, "clip_norm=1.0 bounds the update of rule='sum'"),
    ({**ours, "merge": True}, "merge=True: rule='least_squares' has no"),
    ({**ours, "state": state(S=d)}, "state has S, and rule='least_squares' reads on from A, D"),
    ({**ours, "state": state(A=a, D=d), "implementation": "dual"}, "starts without a state"),
    ({**ours, "state": state(A=a[:, :2], D=d)}, r"state.A has shape \(2, 2, 6\), expected"),
    ({"chunk_size": C}, "inner_lr is missing"),
    ({"chunk_size": C, "inner_lr": 1, "ridge": 0.5}, "ridge=0.5 belongs to rule='least_squares'"),
    ({"chunk_size": C, "inner_lr": 1, "state": state(A=a, D=d)}, "state has A, D, and rule='sum'"),
  ):
    with pytest.raises((ttt_jax.UserError, ttt_jax.UnsupportedError), match=message):
      ttt_jax.inplace_ttt(z, v, w, **options)


def test_many_solves_at_once():
  """LAPACK's threads do not wait for those of other rows and devices (jaxlib 0.10, two cores)."""
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(4, 256, 96)), jnp.float32)
  v = jnp.asarray(rng.normal(size=(4, 256, 4)), jnp.float32)
  read = partial(
    ttt_jax.inplace_ttt, w_down=jnp.zeros((96, 4)), chunk_size=16, rule="least_squares"
  )
  y, _ = jax.jit(partial(read, implementation="dual"))(z, v)
  tokens = PartitionSpec(None, "context")
  split = jax.shard_map(
    lambda z, v: read(z, v, context_axis="context")[0],
    mesh=mesh_of(8),
    in_specs=(tokens, tokens),
    out_specs=tokens,
  )
  np.testing.assert_allclose(jax.jit(split)(z, v), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("project", [False, True], ids=["all of F", "projected"])
def test_over_global_arrays(project, kind):
  """With rows over `data` and F over `tensor`: A and D are split by rows of F, or of R."""
  arrays = to_jax(make_arrays(state=True, project=project))
  a, d = arrays.pop("state")
  arrays["state"] = ttt_jax.FastWeightState(A=a, D=d)
  options = {"chunk_size": C, "rule": "least_squares"}
  y, state = ttt_jax.inplace_ttt(**arrays, **options)
  mesh = jax.make_mesh((2, 2, 2), ("data", "context", "tensor"), axis_types=(kind,) * 3)
  read = ttt_jax.context_parallel(mesh)
  got, got_state, stats = jax.jit(partial(read, **options, return_stats=True))(**arrays)
  np.testing.assert_allclose(got, y, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(got_state.A, state.A, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got_state.D, state.D, rtol=1e-4, atol=1e-5)
  assert stats.leverage.shape == (B, 2)
