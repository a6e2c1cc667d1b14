"""The cost model has the right figures and choices, and the op follows them."""

import dataclasses
from unittest import mock

import contract
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import ttt_jax
from ttt_jax.extras.plan.hlo import count_collectives
from ttt_jax.ops.exchange import cost
from ttt_jax.ops.hardware import DEVICES, find_device

LARGE = {"chunk_size": 1024, "d_ff": 9728, "d_model": 2560}


def test_every_device_has_figures_and_their_source():
  assert set(DEVICES) == {"v5e", "v5p", "v6e", "h100", "h200", "cpu"}
  for device in DEVICES.values():
    for field in ("peak", "peak_float32", "memory", "link", "latency"):
      assert getattr(device, field) > 0
    assert device.source


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v5p", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("h100", "h100"),
    (None, "cpu"),
  ],
)
def test_device_kinds(kind, name):
  assert find_device(kind).name == name


def test_unknown_device():
  with pytest.raises(ValueError, match="device='abacus' is not in the table: use one of v5e, v5p"):
    ttt_jax.explain(tokens=4096, device="abacus", **LARGE)


def test_torus_links_get_the_ring_and_switches_all_to_all():
  for device, collective in (("v5e", "ring"), ("v5p", "ring"), ("h200", "all_to_all")):
    found = ttt_jax.explain(tokens=131072, shards=16, device=device, **LARGE)
    assert found.collective == collective
    assert found.collectives[collective] == min(found.collectives.values())


def test_few_visible_tokens_get_the_dual_form():
  few = ttt_jax.explain(tokens=2048, device="h200", dtype="float32", **LARGE)
  many = ttt_jax.explain(tokens=131072, device="h200", dtype="float32", **LARGE)
  assert (few.implementation, many.implementation) == ("dual", "sequential")


def test_slices_make_the_ring_fastest():
  """K minimises the model's time of the ring."""
  exchange = 16, 9728 * 2560 * 4
  device = dataclasses.replace(DEVICES["v5p"], latency=1e-5)
  best = cost.ring_slices(*exchange, device, rows=9728)
  assert 2 < best < cost._MOST_SLICES

  def seconds(slices):
    with mock.patch.object(cost, "ring_slices", return_value=slices):
      return cost.collective_seconds(*exchange, device, rows=9728)["ring"]

  assert seconds(best) <= min(seconds(best - 1), seconds(best + 1))


def test_explanation_reads_well():
  text = str(ttt_jax.explain(tokens=131072, shards=16, device="v5p", **LARGE))
  for part in ("8192 tokens a shard in 8 chunks", "459 TFLOP/s", "cloud.google.com", "<- chosen"):
    assert part in text
  assert text.count("<- chosen") == 2


def test_explain_refuses():
  with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
    ttt_jax.explain(tokens=0, **LARGE)
  with pytest.raises(
    ValueError, match=r"tokens=5000 is not a multiple of shards \* chunk_size = 2048"
  ):
    ttt_jax.explain(tokens=5000, shards=2, **LARGE)


def _compiled(shards, **settings):
  tokens = PartitionSpec(None, "context")

  def local(z, v, w):
    return ttt_jax.inplace_ttt(
      z, v, w, chunk_size=2, inner_lr=0.1, context_axis="context", **settings
    )[0]

  mapped = jax.shard_map(
    local,
    mesh=contract.mesh_of(shards),
    in_specs=(tokens, tokens, PartitionSpec()),
    out_specs=tokens,
  )
  arguments = jnp.ones((1, 32, 24)), jnp.ones((1, 32, 16)), jnp.ones((24, 16))
  return jax.jit(mapped).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(
  ("collective", "sends"), [("all_to_all", "all-to-all"), ("doubling", "collective-permute")]
)
def test_the_op_follows_the_choice(collective, sends):
  with mock.patch.object(cost, "choose_collective", return_value=collective):
    assert set(count_collectives(_compiled(8))) == {sends}


def test_a_program_for_another_machine_gets_its_choice():
  """A program traced on a CPU for a mesh of TPUs gets the figures of the TPU."""
  device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=2, platform="tpu")
  mesh = AbstractMesh((16,), ("context",), axis_types=(AxisType.Auto,), abstract_device=device)
  tokens = PartitionSpec(None, "context")
  mapped = jax.shard_map(
    lambda z, v, w: ttt_jax.inplace_ttt(
      z, v, w, chunk_size=8, inner_lr=0.1, context_axis="context"
    )[0],
    mesh=mesh,
    in_specs=(tokens, tokens, PartitionSpec()),
    out_specs=tokens,
  )
  sizes = ((1, 256, 2048), (1, 256, 1024), (2048, 1024))
  arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
  lowered = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("tpu",))
  assert "collective_permute" in lowered.as_text()
