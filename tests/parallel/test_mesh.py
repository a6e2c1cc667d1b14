"""The step over data, fsdp, context and tensor: equal on every mesh, what a device holds and gathers."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_rows, randomized, relative_error

from ttt_jax.config import (
  AttentionConfig,
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.parallel.mesh import make_mesh, spec
from ttt_jax.parallel.parameters import dimensions, shardings
from ttt_jax.training.step import abstract_state, init_state, jit_train_step, new_state, put_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")


CONFIG = Config(
  model=ModelConfig(
    vocab_size=40,
    num_layers=4,
    d_model=24,
    d_ff=56,
    num_heads=8,
    num_kv_heads=8,
    head_dim=6,
    qk_norm=True,
    tie_embeddings=False,
  ),
  attention=AttentionConfig(window=5, full_layers=(1, 3)),
  ttt=TTTConfig(layers=(0, 2), chunk_size=4, decay=0.9, init="next_token"),
  data=DataConfig(seq_len=64),
  train=TrainConfig(steps=8, batch_size=8, warmup_steps=2, learning_rate=1e-2, z_loss=1e-2),
)
# data x fsdp x context x tensor
SHAPES = [(8, 1, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 2, 2)]


def _mesh(shape):
  return make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def _changed(section, **fields):
  return dataclasses.replace(
    CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **fields)}
  )


def _batch(mesh, seed):
  tokens, segment_ids, labels = random_rows(8, 64, vocab=40, seed=seed)
  labels[seed % 8, 5:] = -1  # rows of different weight
  return put_batch({"tokens": tokens, "segment_ids": segment_ids, "labels": labels}, mesh)


def _start(config, mesh):
  """A state of random parameters, none of them zero."""
  model = randomized(init_state(config, mesh).model, 7)
  state = new_state(config, jax.device_put(model, shardings(model, mesh)))
  return jax.device_put(state, shardings(state, mesh))


def _run(config, mesh, steps):
  state, step, seen = _start(config, mesh), jit_train_step(config, mesh), []
  with jax.set_mesh(mesh):
    for seed in range(steps):
      state, metrics = step(state, _batch(mesh, seed))
      seen.append([float(metrics[name]) for name in ("loss", "grad_norm", "update_norm")])
  return np.array(seen), state


@pytest.fixture(scope="module")
def one_device():
  return _run(CONFIG, _mesh((1, 1, 1, 1)), 5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_five_steps_are_those_of_one_device(shape, one_device):
  expected, expected_state = one_device
  seen, state = _run(CONFIG, _mesh(shape), 5)
  np.testing.assert_allclose(seen, expected, rtol=1e-5)
  assert np.all(expected[1:, 2] > 0)
  for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(expected_state.model)):
    assert relative_error(a, b) < 1e-4
  abstract = abstract_state(CONFIG, _mesh(shape))
  for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
    assert x.sharding == like.sharding
    assert (x.shape, x.dtype) == (like.shape, like.dtype)


def test_fsdp_holds_an_eighth_and_gathers_layer_by_layer():
  mesh = _mesh((1, 8, 1, 1))
  abstract = abstract_state(CONFIG, mesh)
  for path, x in jax.tree.leaves_with_path(abstract):
    parts = math.prod(x.shape) // math.prod(x.sharding.shard_shape(x.shape))
    assert parts == (8 if math.prod(x.shape) > 2 * 5 * 24 else 1), jax.tree_util.keystr(path)
  with jax.set_mesh(mesh):
    text = jit_train_step(CONFIG, mesh).lower(abstract, _batch(mesh, 0)).compile().as_text()
  gathers, computation = [], ""
  for line in text.splitlines():
    if line.endswith("{") and " = " not in line:
      computation = line
    found = re.search(r" = f32\[([\d,]+)\]\S* all-gather\(", line)
    if found:
      gathers.append((computation, sorted(map(int, found.group(1).split(",")))))
  of_mlp = [computation for computation, dims in gathers if dims == [24, 56]]
  # gate, up, down of a layer with and one without fast weights, forward and backward; backward no down
  # projection is computed again.
  assert len(of_mlp) >= 10
  assert len(set(of_mlp)) == 2
  assert not any(computation.startswith("ENTRY") for computation in of_mlp)
  # Nothing of a whole stack; outside of the layers the head alone.
  assert not any(dims[0] == 2 for _, dims in gathers)
  assert [dims for computation, dims in gathers if computation.startswith("ENTRY")] == [[24, 40]]


def test_microbatches_add_up(one_device):
  """Rows have different numbers of labels, so that a mean of means would be another number."""
  config = _changed("train", accumulate=2)
  seen, _ = _run(config, _mesh((2, 2, 1, 1)), 3)
  np.testing.assert_allclose(seen, one_device[0][:3], rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
  mesh = _mesh((1, 1, 1, 1))
  step = jit_train_step(CONFIG, mesh)
  state = _start(CONFIG, mesh)
  with jax.set_mesh(mesh):
    state, _ = step(state, _batch(mesh, 0))
    good = jax.device_get(state)
    broken = state._replace(model=jax.tree.map(jnp.copy, state.model))
    broken.model.norm.scale[...] = broken.model.norm.scale[...].at[3].set(jnp.nan)
    for times in (1, 2):
      broken, metrics = step(broken, _batch(mesh, 1))
      assert np.isnan(metrics["loss"])
      assert [int(metrics[name]) for name in ("skipped", "bad_in_a_row")] == [times, times]
      assert float(metrics["update_norm"]) == 0
    assert int(broken.step) == 3
    for a, b in zip(jax.tree.leaves(broken.opt_state), jax.tree.leaves(good.opt_state)):
      assert np.array_equal(a, b)
    changed = [
      not np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(broken.model), jax.tree.leaves(good.model))
    ]
    assert sum(changed) == 1  # the one that was broken
    mended = broken._replace(model=jax.device_put(good.model, shardings(good.model, mesh)))
    mended, metrics = step(mended, _batch(mesh, 1))
  assert np.isfinite(metrics["loss"])
  assert [int(x) for x in (mended.step, mended.skipped, mended.bad_in_a_row)] == [4, 2, 0]
  assert not np.array_equal(mended.model.norm.scale[...], good.model.norm.scale[...])


def test_bfloat16_parameters_have_a_float32_master():
  """Updates far below the last bit of a bfloat16 parameter add up in the master."""
  config = _changed("model", param_dtype="bfloat16", dtype="bfloat16")
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, learning_rate=1e-6, weight_decay=0.0)
  )
  mesh = _mesh((1, 2, 1, 1))
  first = jax.device_get(_start(config, mesh).master)
  _, state = _run(config, mesh, 4)
  master = jax.device_get(state.master)
  assert {x.dtype for x in master.values()} == {np.dtype("float32")}
  for (name, x), parameter in zip(master.items(), jax.tree.leaves(state.model), strict=True):
    moved = np.max(np.abs(x - first[name]))
    assert 1e-6 < moved < 4e-6, name
    assert np.array_equal(x.astype(jnp.bfloat16), parameter), name


def test_names_that_have_no_place_on_the_mesh():
  mesh = _mesh((1, 2, 1, 4))
  assert dimensions("opt_state/1/0/mu/groups/0/1/attention/value/value", 4) == (
    None,
    "embed",
    "kv_heads",
    None,
  )
  with pytest.raises(ValueError, match=r"groups/0/0/mlp/gates/value of rank 3 is no parameter"):
    dimensions("groups/0/0/mlp/gates/value", 3)
  with pytest.raises(ValueError, match=r"'batch', 'embed'.* claim mesh axes .*'fsdp'.* one twice"):
    spec("batch", "embed", mesh=mesh)
  with pytest.raises(ValueError, match=r"mesh\.tensor=4 does not divide the 6 of dimension 'mlp'"):
    shardings({"mlp": {"down": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}, mesh)
