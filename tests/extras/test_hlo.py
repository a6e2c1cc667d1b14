"""Tests the parser of compiled programs: trip counts of loops, bytes sent, bytes moved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.extras.plan.hlo import Program, _groups, count_collectives, sent_bytes


def mesh_of(*sizes):
  names = ("a", "b", "c")[: len(sizes)]
  devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
  return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(sizes))


def text_of(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_collectives_in_loops_count_as_often_as_they_run():
  """A loop of 5 in a loop of 3, over one axis of two, runs 15 gathers, 3 permutes and 1 sum."""
  mesh = mesh_of(2, 4)

  def inner(x, _):
    whole = lax.all_gather(x, "b", tiled=True)
    return x + jnp.sum(whole.reshape(4, -1), axis=0) * 1e-3, None

  def outer(x, _):
    x, _ = lax.scan(inner, x, None, length=5)
    return lax.ppermute(x, "a", [(0, 1), (1, 0)]), None

  def function(x):
    x, _ = lax.scan(outer, x, None, length=3)
    return lax.psum(x, "b")

  mapped = jax.shard_map(function, mesh=mesh, in_specs=P("b"), out_specs=P(), check_vma=False)
  text = text_of(mapped, jnp.zeros((4 * 6,), jnp.float32))
  program = Program(text)
  found = {x.kind: x for x in program.collectives}
  assert {kind: x.times for kind, x in found.items()} == {
    "all-gather": 15,
    "collective-permute": 3,
    "all-reduce": 1,
  }
  # Six numbers a device: a gather sends what the three others get, a sum twice three quarters.
  assert {kind: x.bytes for kind, x in found.items()} == {
    "all-gather": 3 * 6 * 4,
    "collective-permute": 6 * 4,
    "all-reduce": 2 * 6 * 4 * 3 // 4,
  }
  assert sorted(found["all-gather"].groups) == [(0, 1, 2, 3), (4, 5, 6, 7)]
  assert set(found["collective-permute"].groups) == {(i, (i + 4) % 8) for i in range(8)}
  assert not program.unknown_loops
  assert count_collectives(text) == dict.fromkeys(found, 1)
  assert sent_bytes(text)["all-gather"] == 3 * 6 * 4


def test_a_scope_is_found():
  mesh = mesh_of(4)

  def function(x):
    with jax.named_scope("the_exchange"):
      return lax.psum(x, "a")

  mapped = jax.shard_map(function, mesh=mesh, in_specs=P("a"), out_specs=P())
  [found] = Program(text_of(mapped, jnp.zeros((8,)))).collectives
  assert "the_exchange" in found.scope


@pytest.mark.parametrize("first", [0, 2])
def test_loops_from_any_start(first):
  mesh = mesh_of(4)

  def function(x):
    def body(i, x):
      return lax.psum(x, "a") * (1.0 / (1 + i))

    return lax.fori_loop(first, 7, body, x)

  mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
  program = Program(text_of(mapped, jnp.ones((3,))))
  assert sum(x.times for x in program.collectives) == 7 - first


def test_a_loop_of_unknown_length_counts_once_and_is_named():
  mesh = mesh_of(4)

  def function(x, n):
    return lax.fori_loop(0, n, lambda i, x: lax.psum(x, "a") * 0.5, x)

  mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
  program = Program(text_of(mapped, jnp.ones((3,)), jnp.int32(5)))
  assert [x.times for x in program.collectives] == [1]
  assert len(program.unknown_loops) == 1


def test_moved_bytes():
  n = 1024
  x = jnp.ones((n,), jnp.float32)
  assert Program(text_of(lambda x: x * 2 + 1, x)).moved_bytes == 2 * 4 * n


def test_moved_bytes_are_those_of_xla_where_there_is_no_loop():
  a, b = jnp.ones((24, 32)), jnp.ones((32, 40))
  compiled = jax.jit(lambda a, b: jnp.sin(a @ b) @ b.T).lower(a, b).compile()
  assert Program(compiled.as_text()).moved_bytes == compiled.cost_analysis()["bytes accessed"]


def test_a_loop_over_a_stack_moves_its_slices_and_not_the_stack():
  layers, d = 6, 32
  stack, x = jnp.ones((layers, d, d), jnp.float32), jnp.ones((8, d), jnp.float32)

  def function(x, stack):
    return lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, stack)[0]

  moved = Program(text_of(function, x, stack)).moved_bytes
  least = layers * (d * d + 2 * 8 * d) * 4
  assert least <= moved < 4 * least  # the stack in every step would be 6 times as much


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("mesh['a'=2,'b'=3] {'b'}", ((0, 1, 2), (3, 4, 5))),
    ("mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("{}", ((0,),)),
  ],
)
def test_groups(text, groups):
  assert _groups(text) == groups


def test_what_is_no_program():
  with pytest.raises(ValueError, match="no ENTRY"):
    Program("HloModule empty")


def test_groups_of_one_device_send_nothing():
  mesh = mesh_of(8, 1)
  x = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("a")))
  mapped = jax.shard_map(
    lambda x: lax.psum(x, "b"), mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False
  )
  assert Program(text_of(mapped, x)).collectives == []
