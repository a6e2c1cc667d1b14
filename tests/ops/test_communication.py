"""Compiled programs send the documented collectives and bytes, and lower for other machines."""

import contract
import jax
import jax.numpy as jnp
import pytest
from contract import COLLECTIVES, OP_VARIANTS, make_case, packed
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ttt_jax import Update, exclusive_prefix, inplace_ttt
from ttt_jax.extras.plan.hlo import count_collectives, sent_bytes

# The exchange of deltas. Without documents all keeps are 1, and the compiler drops their exchange.
SHARDS, SLICES = 8, 3
FORWARD = {
  "all_gather": {"all-gather": 1},
  "doubling": {"collective-permute": 3},
  "all_to_all": {"all-to-all": 2},
  "ring": {"collective-permute": SHARDS + SLICES - 2},
}
F, D = 24, 10
STATE_BYTES = F * D * 4


def _case(is_packed=False, **options):
  # F divides by 8 shards and 3 slices: no padding is sent.
  return make_case(batch=1, f=F, d=D, segment_ids=packed(1, 24) if is_packed else None, **options)


def _compiled(collective, *, gradient, use_state=False, is_packed=False, **settings):
  case = _case(is_packed)
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
  function = contract.op(case, shards=SHARDS, collective=collective, **settings)

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
  text = _compiled(collective, gradient=False)
  # The outgoing state, which nobody asked for, is not sent.
  assert count_collectives(text) == FORWARD[collective]


def test_the_outgoing_state_costs_one_sum():
  text = _compiled("all_to_all", gradient=False, use_state=True)
  assert count_collectives(text) == FORWARD["all_to_all"] | {"all-reduce": 1}


def test_documents_cost_a_neighbour_exchange_and_a_gather_of_numbers():
  """Documents add the id of the token before the shard, and one keep per row and shard."""
  text = _compiled("all_to_all", gradient=False, is_packed=True)
  numbers = {"collective-permute": 1, "all-gather": 1}
  assert count_collectives(text) == FORWARD["all_to_all"] | numbers


@pytest.mark.parametrize("variant", OP_VARIANTS)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_gradient_exchanges_once_more(collective, variant):
  """The backward pass exchanges the suffix only: the incoming state was saved."""
  counts = count_collectives(_compiled(collective, gradient=True, **OP_VARIANTS[variant]))
  if variant in ("associative", "dual") and collective != "all_gather":
    counts.pop("all-gather", None)  # automatic differentiation also exchanges cotangents of keeps
  assert counts == {name: 2 * n for name, n in FORWARD[collective].items()}


@pytest.mark.parametrize("wire_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("shards", [2, 3, 8])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_bytes_sent(collective, shards, wire_dtype):
  """The device that sends most sends the documented bytes, and half of them in bfloat16."""
  law = {
    "all_gather": shards - 1,
    "doubling": {2: 1, 3: 2, 8: 3}[shards],
    "all_to_all": 2 * (shards - 1) / shards,
    "ring": 1,
  }

  def prefix(delta):
    update = Update(jnp.ones(1), delta)
    settings = {"collective": collective, "wire_dtype": wire_dtype}
    return exclusive_prefix(update, "context", **settings).delta

  spec = PartitionSpec("context")
  mapped = jax.shard_map(prefix, mesh=contract.mesh_of(shards), in_specs=spec, out_specs=spec)
  with contract.several_slices():
    text = jax.jit(mapped).lower(jnp.ones((shards, F, D))).compile().as_text()
  numbers = 4 * (shards - 1)  # the keeps
  state = STATE_BYTES / (1 if wire_dtype is None else 2)
  assert sum(sent_bytes(text).values()) - numbers == law[collective] * state


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
  sends = {"doubling": "collective_permute", "ring": "collective_permute"}
  assert f"stablehlo.{sends.get(collective, collective)}" in lowered.as_text()
