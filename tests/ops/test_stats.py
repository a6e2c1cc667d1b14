"""The statistics are exact enough in bfloat16, where the output is rounded to three digits."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import OP_VARIANTS, inplace_ttt_reference, make_case, packed
from flax import nnx
from helpers import MODEL, mesh_of, random_rows
from jax.sharding import PartitionSpec

import ttt_jax
from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.nn.transformer import Transformer

EACH_VARIANT = pytest.mark.parametrize("variant", OP_VARIANTS.values(), ids=OP_VARIANTS)


def _stats(case, **variant):
  arrays = {
    name: jnp.asarray(x, jnp.bfloat16) for name, x in case.arrays.items() if name != "inner_lr"
  }
  ids = None if case.segment_ids is None else jnp.asarray(case.segment_ids)
  return jax.jit(
    partial(
      ttt_jax.inplace_ttt,
      chunk_size=3,
      inner_lr=0.25,
      segment_ids=ids,
      return_stats=True,
      **variant,
    )
  )(**arrays)


@pytest.mark.parametrize("segment_ids", [None, packed(2, 48)], ids=["one document", "packed"])
@EACH_VARIANT
def test_a_state_of_zero_has_no_part_in_the_output(variant, segment_ids):
  case = make_case(tokens=48, f=40, d=24, segment_ids=segment_ids)
  case.arrays["v"] *= 0
  _, state, stats = _stats(case, **variant)
  assert not np.any(state.S)
  assert np.array_equal(stats.fast, [0, 0])
  assert np.array_equal(stats.update, [0, 0])
  assert np.array_equal(stats.state, [0, 0])
  assert np.all(stats.slow > 1)


@EACH_VARIANT
def test_a_small_part_is_measured_and_not_the_rounding(variant):
  """A fast part of 1e-5 of the output is measured, though the output is rounded to 2e-3."""
  case = make_case(tokens=48, f=40, d=24)
  case.arrays["v"] *= 1e-5
  stats = _stats(case, **variant)[2]
  with jax.enable_x64(True):
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in case.arrays.items()}
    arrays = {name: x.astype(jnp.float64) for name, x in arrays.items()}
    y, _ = inplace_ttt_reference(**arrays, chunk_size=3)
    slow = arrays["z"] @ arrays["w_down"]
    ratio = np.asarray(jnp.linalg.norm(y - slow, axis=(1, 2)) / jnp.linalg.norm(slow, axis=(1, 2)))
  assert np.all((ratio > 2e-6) & (ratio < 1e-4))
  np.testing.assert_allclose(stats.fast / stats.slow, ratio, rtol=2e-2)


@pytest.mark.parametrize(
  "variant", [OP_VARIANTS["dual"], OP_VARIANTS["sequential, one product"]], ids=str
)
def test_split_over_tensor(variant):
  """The parts of a token are summed over the devices that share F, then squared."""
  case = make_case(tokens=24, f=6, d=5)
  arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
  law = ttt_jax.inplace_ttt(**arrays, chunk_size=3, return_stats=True)[2]
  of_f = PartitionSpec(None, None, "tensor")
  specs = {
    "z": of_f,
    "v": PartitionSpec(),
    "w_down": PartitionSpec("tensor"),
    "inner_lr": PartitionSpec(),
  }
  mesh = jax.make_mesh(
    (2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
  )
  read = partial(
    ttt_jax.inplace_ttt, chunk_size=3, tensor_axis="tensor", return_stats=True, **variant
  )
  stats = jax.jit(
    jax.shard_map(
      lambda arrays: read(**arrays)[2], mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec()
    )
  )(arrays)
  for actual, expected in zip(stats, law):
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_nothing_is_read_twice_without_statistics():
  """Without `return_stats` the program has no product for the sampled tokens."""

  def products(**variant):
    case = make_case(tokens=24)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in case.arrays.items()}
    read = partial(
      ttt_jax.inplace_ttt, chunk_size=3, **OP_VARIANTS["sequential, one product"], **variant
    )
    return str(jax.make_jaxpr(lambda a: read(**a))(arrays)).count("dot_general")

  assert products() == 4  # reading and learning, in the loop and outside of it
  assert products(return_stats=True) > 4


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
@pytest.mark.parametrize("merge", [None, True])
def test_a_model_that_starts_from_a_pretrained_one(merge, mesh):
  """With init="identity" the convolution is zero, and so are all updates."""
  config = dataclasses.replace(MODEL, dtype="bfloat16")
  ttt = TTTConfig(layers=(0, 2), chunk_size=4, init="identity", merge=merge)
  model = Transformer(config, AttentionConfig(window=5), ttt, rngs=nnx.Rngs(0))
  tokens, segment_ids, _ = random_rows(2, 32)
  with jax.set_mesh(mesh_of(*(mesh or (1, 1)))):
    stats = jax.jit(lambda m: m(tokens, segment_ids, return_stats=True)[1])(model)
  assert np.array_equal(stats.output_ratio, [0, 0])
  assert np.array_equal(stats.state_ratio, [0, 0])
  assert np.array_equal(stats.update_ratio, [0, 0])
