"""Attention against the plain softmax over a full mask, on one device and on shards."""

from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from contract import mesh_of, packed
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from ttt_jax.extras.plan.hlo import count_collectives
from ttt_jax.ops.attention import blockwise
from ttt_jax.ops.attention.api import _choose, attention

B, T, H, G, K = 2, 24, 4, 2, 6
TOKENS = PartitionSpec(None, "context")
SEGMENTS = packed(B, T)


def _draw(dtype="float32", t=T):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(B, t, h, K)), dtype) for h in (H, G, G, H)]


def _law(q, k, v, window, segment_ids):
  """Computes attention in float64, with the whole `[T, T]` mask."""
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


def _on_shards(shards, *, check_vma=True, **settings):
  """Returns `attention(q, k, v, segment_ids)` over global arrays, on `shards` devices; 0 is no mesh."""
  if not shards:
    return partial(_call, **settings)
  mapped = jax.shard_map(
    partial(_call, context_axis="context", **settings),
    mesh=mesh_of(shards),
    in_specs=(TOKENS,) * 4,
    out_specs=TOKENS,
    check_vma=check_vma,
  )
  return mapped


def _on_shards_unpacked(shards, **settings):
  """Returns `attention(q, k, v)` without segments and without tracking of varying axes."""
  if not shards:
    return partial(attention, **settings)
  return jax.shard_map(
    partial(attention, context_axis="context", **settings),
    mesh=mesh_of(shards),
    in_specs=(TOKENS,) * 3,
    out_specs=TOKENS,
    check_vma=False,
  )


def _call(q, k, v, segment_ids, **settings):
  return attention(q, k, v, segment_ids=segment_ids, **settings)


def _assert_close(actual, law, tolerance):
  for name, a, b in zip(("o", "dq", "dk", "dv"), actual, law):
    error = np.max(np.abs(np.asarray(a, np.float64) - b)) / max(np.max(np.abs(b)), 1e-3)
    assert error < tolerance, f"{name}: {error:.1e}"


PACKED = pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "one document"])


def _assert_law(function, window, is_packed, arrays=None, tolerance=1e-5):
  """Asserts that `function(q, k, v, segment_ids)` has the law's values and gradients."""
  arrays = _draw() if arrays is None else arrays
  t = arrays[0].shape[1]
  ids = packed(B, t) if is_packed else np.ones((B, t), np.int32)
  actual = jax.jit(
    lambda *a: _values_and_gradients(lambda q, k, v: function(q, k, v, jnp.asarray(ids)), *a)
  )(*arrays)
  _assert_close(actual, _expected(arrays, window, ids if is_packed else None), tolerance)
  return actual


@PACKED
# On eight shards of three tokens: within a shard, one hop, several hops, beyond the first shard.
@pytest.mark.parametrize("window", [1, 3, 5, 17, 24, None])
@pytest.mark.parametrize("shards", [0, 2, 8])
def test_equals_the_law(shards, window, is_packed):
  _assert_law(_on_shards(shards, window=window), window, is_packed)


@PACKED
@pytest.mark.parametrize("window", [5, 17])
@pytest.mark.parametrize("shards", [0, 8])
def test_wide_windows(shards, window, is_packed, monkeypatch):
  """Windows that are too wide for `local` take `blockwise`."""
  monkeypatch.setattr("ttt_jax.ops.attention.api._LOCAL_WINDOW", 0)
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 4)
  _assert_law(_on_shards(shards, window=window), window, is_packed)


# Shards of 12, 8 and, odd, of 3 tokens; on three shards the one in the middle is its own mirror.
@PACKED
@pytest.mark.parametrize("balance", [True, False], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_full_attention_on_shards(shards, balance, is_packed, monkeypatch):
  """Every shard, and every half of a shard, has several blocks of queries."""
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 2)
  _assert_law(_on_shards(shards, balance=balance), None, is_packed)


@pytest.mark.parametrize(("window", "local"), [(5, 128), (5, 0), (None, 0)])
def test_without_segments_or_tracking(window, local, monkeypatch):
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 2)
  monkeypatch.setattr("ttt_jax.ops.attention.api._LOCAL_WINDOW", local)
  function = _on_shards_unpacked(4, window=window)
  _assert_law(lambda q, k, v, _: function(q, k, v), window, False)


@pytest.mark.parametrize("window", [70, 140, None])
def test_lengths_that_no_block_divides(window, monkeypatch):
  """The last of several blocks is not full; blocks are also taken one after another."""
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 64)
  for at_once in (1 << 26, 1) if window == 70 else (1,):
    monkeypatch.setattr("ttt_jax.ops.attention.local._SCORES_AT_ONCE", at_once)
    _assert_law(_on_shards(0, window=window), window, True, _draw(t=150))


@pytest.mark.parametrize("window", [5, 150, None])
def test_float64(window):
  with jax.enable_x64(True):
    arrays = _draw("float64", t=160)
    (o, *_) = _assert_law(_on_shards(2, window=window), window, True, arrays, 1e-12)
    assert o.dtype == jnp.float64


def test_under_vmap_scan_and_checkpoint(monkeypatch):
  """The op works under vmap over rows with their segments, and in a checkpointed scan."""
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 5)

  def row(q, k, v, ids):
    return attention(*(x[None] for x in (q, k, v)), segment_ids=ids[None])[0]

  def scanned(q, k, v, ids):
    body = jax.checkpoint(lambda carry, row_of: (carry, row(*row_of)))
    return jax.lax.scan(body, 0, (q, k, v, ids))[1]

  _assert_law(jax.vmap(row), None, True)
  _assert_law(scanned, None, True)


@pytest.mark.parametrize("balance", [True, False])
def test_work_is_balanced(balance, monkeypatch):
  """Counts the blocks of keys that each device computes as the program runs; a block is one token."""
  bounds, work = blockwise.bounds, []

  def counted(seen):
    first, end = bounds(seen)
    jax.debug.callback(lambda n: work.append(int(n)), jnp.sum(end - first))
    return first, end

  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.bounds", counted)
  monkeypatch.setattr("ttt_jax.ops.attention.blockwise.BLOCK", 1)
  q, k, v, _ = _draw(t=64)
  function = jax.jit(_on_shards(8, balance=balance))
  jax.block_until_ready(function(q, k, v, jnp.ones((B, 64), jnp.int32)))
  jax.effects_barrier()
  if balance:
    assert work == [65 * 64 // 2 // 8] * 8  # an eighth of all pairs each
  else:
    assert sorted(work) == [sum(range(8 * p + 1, 8 * p + 9)) for p in range(8)]


def test_blocks_of_other_documents_are_not_computed():
  """With eight documents of one block each, a block of queries computes only its own block."""
  q_position = jnp.arange(64).reshape(8, 8)
  ids = jnp.broadcast_to(jnp.arange(1, 9)[:, None, None], (8, B, 8))
  seen = blockwise.visible_blocks(q_position, (ids, ids), keys=(8, 8), window=None)
  np.testing.assert_array_equal(seen, np.eye(8, dtype=bool))


@pytest.mark.parametrize("window", [5, None])
def test_bfloat16(window):
  """Inputs have 8 bits, so errors are a few times 2^-8; the softmax is in float32."""
  arrays, ids = _draw("bfloat16"), jnp.asarray(SEGMENTS)
  function = _on_shards(4, window=window)
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


@pytest.mark.parametrize("window", [64, 1024, None])
def test_never_makes_tokens_by_tokens(window):
  t = 4096
  q = jnp.ones((1, t, H, K))
  kv = jnp.ones((1, t, G, K))

  def loss(q, k, v):
    return jnp.sum(attention(q, k, v, window=window))

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, kv, kv)
  shapes = list(_shapes(jaxpr.jaxpr))
  assert all(sum(n >= t for n in shape) <= 1 for shape in shapes)
  block = H * blockwise.BLOCK**2
  largest = H * t * 2 * window if window == 64 else max(block, 2 * H * t * K)
  assert max(np.prod(s, dtype=int) for s in shapes) <= largest


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({"window": 1}, {}),
    ({"window": 3}, {"collective-permute": 2}),  # keys and values together, segment ids
    ({"window": 5}, {"collective-permute": 4}),  # 4 tokens before a shard of 3: two hops
    ({"balance": False}, {"all-gather": 2}),
    ({}, {"all-gather": 2, "collective-permute": 2}),  # queries to their mirror, outputs back
  ],
)
def test_collectives(settings, expected):
  function = _on_shards(8, **settings)
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
    ({"implementation": "flash"}, "implementation='flash' is not one of 'xla', 'splash', 'cudnn'"),
  ],
)
def test_bad_input(changes, message, unchecked_types):
  with pytest.raises(ValueError, match=message):
    _bad(**changes)


def test_cudnn_says_what_it_cannot_take():
  with pytest.raises(NotImplementedError, match=r"segment_ids .*dtype float32, the cpu backend"):
    _bad(implementation="cudnn", segment_ids=jnp.ones((1, 8), jnp.int32))
  on_shards = _on_shards_unpacked(2, implementation="cudnn")
  with pytest.raises(
    NotImplementedError, match="full attention over a sequence split over devices"
  ):
    on_shards(*_draw()[:3])


@pytest.mark.parametrize("window", [1, 5, 17])
@pytest.mark.parametrize("shards", [0, 8])
def test_halo_for_cudnn(shards, window, monkeypatch):
  """The halo around cuDNN's kernel is right: XLA's attention takes its place, with 16-bit inputs."""
  library, calls = jax.nn.dot_product_attention, []

  def xla_instead(*args, implementation, **settings):
    calls.append(implementation)
    return library(*args, implementation="xla", **settings)

  monkeypatch.setattr("jax.nn.dot_product_attention", xla_instead)
  monkeypatch.setattr("ttt_jax.ops.attention.cudnn.refusals", lambda *_: [])
  function = _on_shards_unpacked(shards, window=window, implementation="cudnn")
  _assert_law(lambda q, k, v, _: function(q, k, v), window, False)
  assert set(calls) == {"cudnn"}


@pytest.mark.parametrize(
  ("tokens", "shards", "window", "is_packed"),
  [
    (256, 0, 70, True),
    (256, 0, None, False),
    (256, 4, 70, False),
    (256, 4, None, True),  # shards of half a block: nothing to balance
    (1024, 2, 70, True),
    (1024, 2, None, True),
  ],
)
def test_splash_interpreted(tokens, shards, window, is_packed, monkeypatch):
  """Pallas interprets the TPU's kernel on CPU, with blocks of 128 tokens."""
  monkeypatch.setattr("ttt_jax.ops.attention.splash._INTERPRET", True)
  monkeypatch.setattr("ttt_jax.ops.attention.splash._BLOCKS", (128,))
  settings = {"window": window, "implementation": "splash"}
  if is_packed:
    function = _on_shards(shards, check_vma=False, **settings)
  else:
    unpacked = _on_shards_unpacked(shards, **settings)
    function = lambda q, k, v, _: unpacked(q, k, v)  # noqa: E731
  _assert_law(function, window, is_packed, _draw(t=tokens))


def _lowered_for_tpu(mesh, dtype="bfloat16", **settings):
  """Traces the gradients on a mesh that need not exist, and lowers them for TPU."""
  tokens = jax.NamedSharding(mesh, TOKENS)
  arrays = [jax.ShapeDtypeStruct((1, 4096, h, 128), dtype, sharding=tokens) for h in (H, G, G)]
  ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=tokens)
  mapped = jax.shard_map(
    partial(_call, context_axis="context", **settings),
    mesh=mesh,
    in_specs=(TOKENS,) * 4,
    out_specs=TOKENS,
    check_vma=settings.get("implementation") != "splash",
  )
  gradients = jax.grad(lambda *a: jnp.sum(mapped(*a).astype(jnp.float32)), (0, 1, 2))
  return jax.jit(gradients).trace(*arrays, ids).lower(lowering_platforms=("tpu",))


@pytest.mark.parametrize("window", [300, None])
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_lowers_for_tpu(implementation, window):
  mesh = jax.sharding.AbstractMesh((16,), ("context",))
  text = _lowered_for_tpu(mesh, window=window, implementation=implementation).as_text()
  kernels = text.count("@tpu_custom_call")
  assert kernels == (3 if implementation == "splash" else 0)  # outputs; dq; dk and dv


@pytest.mark.parametrize("window", [300, None])
def test_compiles_for_tpu(window, monkeypatch):
  """libtpu compiles the gradients ahead of time for sixteen chips."""
  pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is not installed")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
  mesh = jax.sharding.Mesh(np.asarray(topology.devices), ("context",))
  compiled = _lowered_for_tpu(mesh, window=window, implementation="splash").compile()
  assert compiled.as_text().count("tpu_custom_call") >= 3


def test_splash_says_what_it_cannot_take():
  with pytest.raises(NotImplementedError, match="dtype float16: use 'xla'"):
    _bad(implementation="splash", **{name: jnp.ones((1, 8, 2, 6), "float16") for name in "qkv"})
  with pytest.raises(NotImplementedError, match=r"shard_map with check_vma=True \(pass False\)"):
    _on_shards(2, implementation="splash")(*_draw()[:3], jnp.asarray(SEGMENTS))


@pytest.mark.parametrize(
  ("backend", "changes", "expected"),
  [
    ("cpu", {}, "xla"),
    ("tpu", {}, "splash"),
    ("tpu", {"dtype": "float16"}, "xla"),
    ("gpu", {"dtype": "bfloat16"}, "cudnn"),
    ("gpu", {"dtype": "bfloat16", "head_size": 12}, "xla"),
    ("gpu", {"dtype": "bfloat16", "head_size": 256}, "xla"),  # of an A100: 128 at most
    ("gpu", {"dtype": "bfloat16", "segment_ids": jnp.ones((1, 8), jnp.int32)}, "xla"),
    ("gpu", {"dtype": "float32"}, "xla"),
  ],
)
def test_the_best_that_can_express_the_call(backend, changes, expected, monkeypatch):
  class A100:
    compute_capability = "8.0"

  for module in ("api", "cudnn"):
    monkeypatch.setattr(f"ttt_jax.ops.attention.{module}.target_platform", lambda: backend)
  monkeypatch.setattr("jax.devices", lambda: [A100])
  shape = (1, 8, 2, changes.get("head_size", 8))
  q = jax.ShapeDtypeStruct(shape, changes.get("dtype", "float32"))
  chosen = []

  def choose(q):
    chosen.append(_choose(None, q, q, q, None, changes.get("segment_ids"), None))
    return q

  jax.eval_shape(choose, q)
  assert chosen == [expected]
