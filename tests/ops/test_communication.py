"""What the op sends, counted in compiled programs, and that it lowers for machines that are not here."""

import contract
import jax
import jax.numpy as jnp
import pytest
from contract import COLLECTIVES, IMPLEMENTATIONS, make_case, packed
from helpers import count_collectives
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ttt_jax import inplace_ttt

# The exchange of deltas. Without documents all keeps are 1, and the compiler drops their exchange.
FORWARD = {"all_gather": {"all-gather": 1}, "all_to_all": {"all-to-all": 2}}


def _compiled(collective, *, gradient, use_state, is_packed, implementation="sequential"):
  case = make_case(segment_ids=packed(2, 24) if is_packed else None)
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
  function = contract.op(case, shards=8, implementation=implementation, collective=collective)

  def loss(arrays):
    y, s = function(arrays)
    return jnp.sum(y * y) + (jnp.sum(s) if use_state else 0.0)

  def forward(arrays):
    return function(arrays) if use_state else function(arrays)[0]

  program = jax.grad(lambda z: loss(arrays | {"z": z})) if gradient else None
  run = jax.jit(program) if gradient else jax.jit(forward)
  return run.lower(arrays["z"] if gradient else arrays).compile().as_text()


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_forward_exchanges_once(collective):
  text = _compiled(collective, gradient=False, use_state=False, is_packed=False)
  # The outgoing state, which nobody asked for, is not sent.
  assert count_collectives(text) == FORWARD[collective]


def test_the_outgoing_state_costs_one_sum():
  text = _compiled("all_to_all", gradient=False, use_state=True, is_packed=False)
  assert count_collectives(text) == FORWARD["all_to_all"] | {"all-reduce": 1}


def test_documents_cost_a_neighbour_exchange_and_a_gather_of_numbers():
  """The id of the token before the shard, and one keep per row and shard."""
  text = _compiled("all_to_all", gradient=False, use_state=False, is_packed=True)
  numbers = {"collective-permute": 1, "all-gather": 1}
  assert count_collectives(text) == FORWARD["all_to_all"] | numbers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_gradient_exchanges_once_more(collective, implementation):
  text = _compiled(
    collective, gradient=True, use_state=False, is_packed=False, implementation=implementation
  )
  counts = count_collectives(text)
  exchanges = {name: counts.get(name, 0) for name in ("all-gather", "all-to-all")}
  if implementation == "sequential":
    twice = {name: 2 * n for name, n in FORWARD[collective].items()}
    assert exchanges == {"all-gather": 0, "all-to-all": 0} | twice
  else:
    assert exchanges["all-to-all"] == (4 if collective == "all_to_all" else 0)
  assert counts.get("collective-permute", 0) == 0


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lowers_for_tpu_on_64_devices(collective, gradient, kind):
  mesh = AbstractMesh((4, 16), ("data", "context"), axis_types=(kind,) * 2)
  tokens, whole = PartitionSpec("data", "context"), PartitionSpec()

  def local(z, v, w, segment_ids):
    return inplace_ttt(
      z,
      v,
      w,
      chunk_size=8,
      inner_lr=0.1,
      segment_ids=segment_ids,
      context_axis="context",
      collective=collective,
    )[0]

  def forward(z, v, w, segment_ids):
    mapped = jax.shard_map(
      local, mesh=mesh, in_specs=(tokens, tokens, whole, tokens), out_specs=tokens
    )
    return mapped(z, v, w, segment_ids)

  def loss(*arguments):
    return jnp.sum(forward(*arguments).astype(jnp.float32))

  def shape(spec, *dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  program = jax.grad(loss, (0, 1, 2)) if gradient else forward
  arguments = (
    shape(tokens, 4, 256, 24),
    shape(tokens, 4, 256, 16),
    shape(whole, 24, 16),
    shape(tokens, 4, 256, dtype=jnp.int32),
  )
  lowered = jax.jit(program).trace(*arguments).lower(lowering_platforms=("tpu",))
  assert f"stablehlo.{collective}" in lowered.as_text()
