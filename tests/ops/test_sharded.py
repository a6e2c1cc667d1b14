"""The op over global arrays works inside models that do not use ttt_jax's modules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import assert_close, expected, make_case, packed
from helpers import relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ttt_jax

MESHES = {
  "context 8": {"context": 8},
  "data 2 x context 2 x tensor 2": {"data": 2, "context": 2, "tensor": 2},
  "fsdp 2 x context 4": {"fsdp": 2, "context": 4},
  "data 2 x fsdp 2 x context 2, other names": {"rows": 2, "more_rows": 2, "time": 2},
}
NAMES = {
  "data 2 x fsdp 2 x context 2, other names": {
    "axis": "time",
    "batch_axes": ("rows", "more_rows"),
    "tensor_axis": None,
  }
}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def _mesh(name, kind):
  axes = MESHES[name]
  size = int(np.prod(list(axes.values())))
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices()[:size]
  )


@KINDS
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("implementation", ["sequential", "associative", "dual"])
def test_equals_the_law(implementation, name, kind):
  """Values and gradients equal the law's; a clip needs the norm over all of F, a state is split along F."""
  case = make_case(
    batch=4,
    f=6,
    d=5,
    segment_ids=packed(4, 24),
    decay="learned",
    clip_norm=2.0,
    state=True,
  )
  op = ttt_jax.context_parallel(_mesh(name, kind), **NAMES.get(name, {}))

  @jax.jit
  def run(arrays, cotangents):
    def function(arrays):
      arrays = arrays | {"state": ttt_jax.FastWeightState(arrays["state"])}
      y, state = op(
        **arrays,
        segment_ids=jnp.asarray(case.segment_ids),
        chunk_size=3,
        clip_norm=2.0,
        implementation=implementation,
      )
      return y, state.S

    values, pull_back = jax.vjp(function, arrays)
    if kind == AxisType.Explicit:  # a cotangent has the sharding of its value there
      cotangents = tuple(
        jax.sharding.reshard(c, jax.typeof(x).sharding) for c, x in zip(cotangents, values)
      )
    return values, pull_back(cotangents)[0]

  narrow = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
  actual = run(narrow(case.arrays), narrow(case.cotangents))
  assert_close(jax.tree.map(np.asarray, actual), expected(case))


# A decoder of one's own, in plain JAX: nothing of ttt_jax but the op.


def _init(key, layers=3, vocab=11, d=6, f=10):
  keys = jax.random.split(key, 6)

  def draw(key, *shape):
    return 0.3 * jax.random.normal(key, shape)

  return {
    "embed": draw(keys[0], vocab, d),
    "layers": {
      "gate": draw(keys[1], layers, d, f),
      "up": draw(keys[2], layers, d, f),
      "down": draw(keys[3], layers, f, d),
      "conv": draw(keys[4], layers, 3, d),
      "rate": 0.1 * jnp.ones(layers),
    },
    "out": draw(keys[5], d, vocab),
  }


def _loss(params, tokens, labels, fast_weight, targets):
  embedded = jax.nn.one_hot(tokens, 11) @ params["embed"]

  @jax.checkpoint
  def layer(h, p):
    z = jax.nn.silu(h @ p["gate"]) * (h @ p["up"])
    v = targets(embedded, p["conv"], None, chunk_size=4)
    y, _ = fast_weight(z, v, p["down"], chunk_size=4, inner_lr=p["rate"], decay=0.9)
    return h + y, None

  h, _ = jax.lax.scan(layer, embedded, params["layers"])
  logits = jax.nn.log_softmax(h @ params["out"])
  return -jnp.mean(jnp.sum(logits * jax.nn.one_hot(labels, 11), axis=-1))


@KINDS
@pytest.mark.parametrize("name", ["context 8", "data 2 x context 2 x tensor 2"])
def test_in_a_model_without_a_framework(name, kind):
  """Under jit, grad, scan and remat, loss and gradients equal those of one device."""
  params = _init(jax.random.key(0))
  tokens = jax.random.randint(jax.random.key(1), (2, 33), 0, 11)
  tokens, labels = tokens[:, :-1], tokens[:, 1:]

  def step(fast_weight, targets):
    return jax.jit(jax.value_and_grad(partial(_loss, fast_weight=fast_weight, targets=targets)))

  one_device = step(ttt_jax.inplace_ttt, ttt_jax.ntp_targets)(params, tokens, labels)
  mesh = _mesh(name, kind)
  op = ttt_jax.context_parallel(mesh)
  rows = NamedSharding(
    mesh, PartitionSpec("data" if "data" in mesh.axis_names else None, "context")
  )
  with jax.set_mesh(mesh):
    sharded = step(op, op.ntp_targets)(params, *jax.device_put((tokens, labels), rows))
  assert float(one_device[0]) > 1
  errors = jax.tree.map(relative_error, sharded, one_device)
  assert max(jax.tree.leaves(errors)) < 1e-5, errors


@KINDS
def test_in_an_equinox_model(kind):
  equinox = pytest.importorskip("equinox")

  class Block(equinox.Module):
    gate: equinox.nn.Linear
    up: equinox.nn.Linear
    down: jax.Array
    conv: jax.Array

    def __init__(self, key):
      keys = jax.random.split(key, 4)
      self.gate = equinox.nn.Linear(6, 10, key=keys[0])
      self.up = equinox.nn.Linear(6, 10, key=keys[1])
      self.down = jax.random.normal(keys[2], (10, 6))
      self.conv = jax.random.normal(keys[3], (3, 6))

    def __call__(self, x, fast_weight, targets):
      each = lambda layer: jax.vmap(jax.vmap(layer))  # noqa: E731
      z = jax.nn.silu(each(self.gate)(x)) * each(self.up)(x)
      v = targets(x, self.conv, None, chunk_size=4)
      return fast_weight(z, v, self.down, chunk_size=4, inner_lr=0.1)[0]

  block = Block(jax.random.key(0))
  x = jax.random.normal(jax.random.key(1), (2, 32, 6))

  def step(*functions):
    return equinox.filter_jit(equinox.filter_grad(lambda b, x: jnp.sum(b(x, *functions) ** 2)))

  mesh = _mesh("context 8", kind)
  op = ttt_jax.context_parallel(mesh)
  one_device = step(ttt_jax.inplace_ttt, ttt_jax.ntp_targets)(block, x)
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    sharded = step(op, op.ntp_targets)(block, jax.device_put(x, sharding))
  errors = jax.tree.map(relative_error, sharded, one_device)
  assert max(jax.tree.leaves(errors)) < 1e-5


@KINDS
def test_in_a_linen_model(kind):
  from flax import linen

  class Block(linen.Module):
    @linen.compact
    def __call__(self, x, fast_weight, targets):
      z = linen.silu(linen.Dense(10)(x)) * linen.Dense(10)(x)
      conv = self.param("conv", linen.initializers.normal(1.0), (3, 6))
      down = self.param("down", linen.initializers.normal(1.0), (10, 6))
      v = targets(x, conv, None, chunk_size=4)
      return fast_weight(z, v, down, chunk_size=4, inner_lr=0.1)[0]

  one = (ttt_jax.inplace_ttt, ttt_jax.ntp_targets)
  x = jax.random.normal(jax.random.key(1), (2, 32, 6))
  params = Block().init(jax.random.key(0), x, *one)

  def step(*functions):
    return jax.jit(jax.grad(lambda p, x: jnp.sum(Block().apply(p, x, *functions) ** 2)))

  mesh = _mesh("context 8", kind)
  op = ttt_jax.context_parallel(mesh)
  one_device = step(*one)(params, x)
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, PartitionSpec(None, "context"))
    sharded = step(op, op.ntp_targets)(params, jax.device_put(x, sharding))
  errors = jax.tree.map(relative_error, sharded, one_device)
  assert max(jax.tree.leaves(errors)) < 1e-5


def test_state_and_statistics():
  """The op continues from a sharded state; statistics have a dimension of shards."""
  mesh = _mesh("data 2 x context 2 x tensor 2", AxisType.Auto)
  op = ttt_jax.context_parallel(mesh)
  case = make_case(batch=2, tokens=24, f=6)
  z, v, w = (jnp.asarray(case.arrays[name], jnp.float32) for name in ("z", "v", "w_down"))
  settings = {"chunk_size": 3, "inner_lr": 0.25, "clip_norm": 2.0}

  @jax.jit
  def read(z, v, w):
    first, middle = op(z[:, :12], v[:, :12], w, **settings)
    rest = op(z[:, 12:], v[:, 12:], w, state=middle, return_stats=True, **settings)
    return ttt_jax.inplace_ttt(z, v, w, return_stats=True, **settings), first, rest

  (y, state, stats), first, (second, end, sharded) = read(z, v, w)
  np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(end.S, state.S, rtol=1e-4, atol=1e-5)
  for name in ("update", "state"):  # of the last shard's end
    actual, law = getattr(sharded, name), getattr(stats, name)
    assert actual.shape == (2, 2)
    np.testing.assert_allclose(actual[:, -1], law, rtol=1e-4)


def test_bad_input(unchecked_types):
  mesh = _mesh("data 2 x context 2 x tensor 2", AxisType.Auto)
  with pytest.raises(ValueError, match=r"'sequence' is not an axis of the mesh, which has 'data'"):
    ttt_jax.context_parallel(mesh, axis="sequence")
  with pytest.raises(ValueError, match="mesh axis 'data' of 2 devices has no use here"):
    ttt_jax.context_parallel(mesh, batch_axes=())
  with pytest.raises(ValueError, match="'rows' is not an axis"):
    ttt_jax.context_parallel(mesh, batch_axes=("rows", "data"))
  with pytest.raises(ValueError, match="one twice"):
    ttt_jax.context_parallel(mesh, batch_axes=("data", "context"))
  op = ttt_jax.context_parallel(mesh)
  z, v, w = jnp.ones((2, 24, 6)), jnp.ones((2, 24, 5)), jnp.ones((6, 5))
  settings = {"chunk_size": 3, "inner_lr": 0.1}
  with pytest.raises(ValueError, match=r"2 devices over \('data',\) do not divide B=3"):
    op(jnp.ones((3, 24, 6)), jnp.ones((3, 24, 5)), w, **settings)
  with pytest.raises(ValueError, match="2 devices over 'tensor' do not divide F=5"):
    op(z[..., :5], v, w[:5], **settings)
  with pytest.raises(ValueError, match="2 devices over 'context' do not divide T=23"):
    op(z[:, :23], v[:, :23], w, **settings)
  with pytest.raises(ValueError, match="chunk_size=5 does not divide the 12 tokens of a shard"):
    op(z, v, w, chunk_size=5, inner_lr=0.1)
  with pytest.raises(ValueError, match="z has no batch dimension"):
    op(z[0], v[0], w, **settings)
