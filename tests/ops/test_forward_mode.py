"""Forward mode through the op equals forward mode through the float64 law, on one device and on shards."""

from functools import partial

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import COLLECTIVES, make_case, mesh_of, packed, several_slices
from jax.sharding import PartitionSpec

import ttt_jax
from ttt_jax.ops.fast_weight.reference import inplace_ttt_reference

FORWARD = pytest.mark.parametrize("implementation", ["associative", "dual"])


@pytest.fixture(scope="module")
def case():
  return make_case(segment_ids=packed(2, 24), decay="learned", clip_norm=2.0, state=True)


@pytest.fixture(scope="module")
def law(case):
  """Returns y, S and their tangents in the direction of `_tangents`."""
  with jax.enable_x64(True):
    function = partial(
      inplace_ttt_reference,
      chunk_size=3,
      segment_ids=jnp.asarray(case.segment_ids),
      **case.options,
    )
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items()}
    return jax.tree.map(
      np.asarray, jax.jvp(lambda a: function(**a), (arrays,), (_tangents(case, jnp.float64),))
    )


def _tangents(case, dtype=jnp.float32):
  rng = np.random.default_rng(7)
  return {n: jnp.asarray(rng.normal(size=np.shape(x)), dtype) for n, x in case.arrays.items()}


def _arrays(case):
  return {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}


def _assert_close(actual, law):
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(law), strict=True):
    assert np.max(np.abs(a - b)) < 2e-5 * np.max(np.abs(b))


# Every collective and number of shards; each with each for one of the implementations.
CASES = [("dual", c, p, True) for c in COLLECTIVES for p in (2, 4, 8)]
CASES += [("associative", c, 4, c != "ring") for c in COLLECTIVES]


@pytest.mark.parametrize(("implementation", "collective", "shards", "check_vma"), CASES)
def test_on_shards(implementation, collective, shards, check_vma, case, law):
  """Documents, a decay, a clip and an incoming state have tangents too."""
  function = contract.op(
    case,
    shards=shards,
    check_vma=check_vma,
    implementation=implementation,
    collective=collective,
  )
  run = jax.jit(lambda a, t: jax.jvp(function, (a,), (t,)))
  _assert_close(run(_arrays(case), _tangents(case)), law)


@FORWARD
def test_over_global_arrays(implementation, case, law):
  mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  op = ttt_jax.context_parallel(mesh)

  def function(arrays):
    arrays = arrays | {"state": ttt_jax.FastWeightState(arrays["state"])}
    y, state = op(
      **arrays,
      chunk_size=3,
      segment_ids=jnp.asarray(case.segment_ids),
      implementation=implementation,
      **case.options,
    )
    return y, state.S

  arrays, tangents = _arrays(case), _tangents(case)
  y, push_forward = jax.linearize(jax.jit(function), arrays)
  _assert_close((y, push_forward(tangents)), law)


@FORWARD
def test_one_device(implementation, case, law):
  function = contract.op(case, shards=None, implementation=implementation)
  run = jax.jit(lambda a, t: jax.jvp(function, (a,), (t,)))
  _assert_close(run(_arrays(case), _tangents(case)), law)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_prefix(collective):
  """vmap over rows of a tangent, or of a gradient, gives those of each row."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  keep, delta = draw(4, 2), draw(4, 2, 5, 3)
  tangents = draw(3, 4, 2), draw(3, 4, 2, 5, 3)
  spec = PartitionSpec("context")

  def prefix(keep, delta):
    update = ttt_jax.Update(keep[0], delta[0])
    found = ttt_jax.exclusive_prefix(update, "context", collective=collective)
    return found.keep[None], found.delta[None]

  mapped = jax.shard_map(prefix, mesh=mesh_of(4), in_specs=(spec, spec), out_specs=spec)

  def push(*tangents):
    return jax.jvp(mapped, (keep, delta), tangents)[1]

  def pull(*cotangents):
    return jax.vjp(mapped, keep, delta)[1](cotangents)

  with several_slices():
    for function in (push, pull):
      mapped_rows = jax.jit(jax.vmap(function))(*tangents)
      each = [jax.jit(function)(*(t[i] for t in tangents)) for i in range(3)]
      for a, *rows in zip(mapped_rows, *each):
        np.testing.assert_allclose(a, jnp.stack(rows), rtol=1e-5, atol=1e-6)
    # <J t, c> = <t, J^T c>
    pushed = jax.jit(push)(*(t[0] for t in tangents))
    pulled = jax.jit(pull)(*(t[1] for t in tangents))
  dot = lambda a, b: float(sum(jnp.vdot(x, y) for x, y in zip(a, b)))  # noqa: E731
  a, b = dot(pushed, [t[1] for t in tangents]), dot([t[0] for t in tangents], pulled)
  assert abs(a) > 0.1
  assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("shards", [None, 4])
@FORWARD
def test_second_derivatives(implementation, shards):
  """`jvp` of `grad`, and the Hessian in the rate and the decay, equal those of the law."""
  case = make_case(batch=1, tokens=12, decay="learned")
  arrays = _arrays(case)

  def loss_of(function, arrays):
    def loss(numbers):
      y, s = function(arrays | {"inner_lr": numbers[0], "decay": numbers[1]})
      return jnp.sum(y**2) + jnp.sum(s**3)

    return loss

  with jax.enable_x64(True):
    wide = {name: jnp.asarray(x) for name, x in case.arrays.items()}
    law = loss_of(lambda a: inplace_ttt_reference(**a, chunk_size=3), wide)
    expected = np.asarray(jax.hessian(law)(jnp.array([0.25, 0.875])))
  function = contract.op(case, shards=shards, implementation=implementation, collective="doubling")
  loss, at = loss_of(function, arrays), jnp.array([0.25, 0.875])
  np.testing.assert_allclose(jax.jit(jax.hessian(loss))(at), expected, rtol=1e-4)
  column = jax.jit(lambda t: jax.jvp(jax.grad(loss), (at,), (t,))[1])(jnp.array([0.0, 1.0]))
  np.testing.assert_allclose(column, expected[:, 1], rtol=1e-4)


@pytest.mark.parametrize("mode", ["jvp", "jvp of jit", "jit of jvp", "linearize", "jacfwd"])
@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("settings", [{"implementation": "sequential"}, {}], ids=str)
def test_sequential_says_what_to_use(settings, shards, mode):
  case = make_case(tokens=96, f=2, d=2)  # many visible tokens: None chooses sequential
  arrays = _arrays(case)
  function = contract.op(case, shards=shards, **settings)
  push = {
    "jvp": lambda f: jax.jvp(f, (arrays,), (arrays,)),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (arrays,), (arrays,)),
    "jit of jvp": lambda f: jax.jit(lambda a: jax.jvp(f, (a,), (a,)))(arrays),
    "linearize": lambda f: jax.linearize(f, arrays)[1](arrays),
    "jacfwd": lambda f: jax.jacfwd(lambda lr: f(arrays | {"inner_lr": lr}))(jnp.float32(0.1)),
  }[mode]
  with pytest.raises(
    NotImplementedError, match=r"forward-mode .*'sequential'.*pass implementation='dual' or 'associ"
  ):
    push(function)
