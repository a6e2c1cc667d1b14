"""Tests training a part of the parameters: which change, which stay, which optimiser state exists."""

import dataclasses
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, TTT, mesh_of, random_model, random_rows, randomized, relative_error
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from ttt_jax.config import (
  AttentionConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  TrainConfig,
)
from ttt_jax.data import Corpus, Document, InMemory, Source
from ttt_jax.parallel.mesh import sharding
from ttt_jax.training.loop import train
from ttt_jax.training.step import (
  Batch,
  abstract_state,
  init_state,
  jit_train_step,
  put_batch,
  train_step,
)
from ttt_jax.training.trainable import trained_parameters, with_parameters

pytestmark = pytest.mark.usefixtures("standard_promotion")


CONFIG = Config(
  model=dataclasses.replace(MODEL, vocab_size=256, num_layers=2),
  attention=AttentionConfig(window=5),
  ttt=dataclasses.replace(TTT, layers=(1,), target="hidden_states"),
  data=DataConfig(seq_len=32),
  train=TrainConfig(
    trainable="ttt+down",
    steps=3,
    batch_size=2,
    warmup_steps=0,
    learning_rate=1e-2,
    weight_decay=0.5,
    log_every=1,
  ),
  checkpoint=CheckpointConfig(every=1),
)
MLP = "groups/0/1/mlp"
TRAINED = {
  "ttt": {f"{MLP}/{name}/value" for name in ("conv", "projection", "log_rate")},
  "ttt+down": {f"{MLP}/{name}/value" for name in ("conv", "projection", "log_rate", "down")},
}


def _with(trainable):
  return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, trainable=trainable))


def _one_step(trainable, mesh):
  """Returns the model before and the state after a step from random parameters."""
  config = _with(trainable)
  state = init_state(config, mesh)
  state = state._replace(model=jax.device_put(randomized(state.model, 7), sharding(mesh)))
  before = jax.device_get(state.model)
  tokens, segment_ids, labels = random_rows(2, 32, vocab=256)
  batch = put_batch({"tokens": tokens, "segment_ids": segment_ids, "labels": labels}, mesh)
  with jax.set_mesh(mesh):
    state, _ = jit_train_step(config, mesh)(state, batch)
  return before, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device(standard_promotion):
  return {trainable: _one_step(trainable, mesh_of(1, 1)) for trainable in TRAINED}


@pytest.mark.parametrize("trainable", TRAINED)
def test_what_trains_moves_and_the_rest_stays_bit_for_bit(trainable, one_device):
  before, state = one_device[trainable]
  old, new = (trained_parameters(model, "all") for model in (before, state.model))
  moved = {name for name in old if not np.array_equal(old[name], new[name])}
  assert moved == TRAINED[trainable]


@pytest.mark.parametrize("trainable", TRAINED)
def test_optimizer_state_is_that_of_what_trains(trainable, one_device):
  """The optimiser keeps two moments of each trained parameter, and counters."""
  before, state = one_device[trainable]
  sizes = [x.size for x in trained_parameters(before, trainable).values()]
  kept = [x.size for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert sorted(kept) == sorted(2 * sizes)
  assert all(np.any(x) for x in jax.tree.leaves(state.opt_state))


def test_eight_devices_take_the_step_of_one(one_device):
  _, expected = one_device["ttt+down"]
  _, state = _one_step("ttt+down", mesh_of(2, 4))
  for name, value in trained_parameters(state.model, "all").items():
    assert relative_error(value, trained_parameters(expected.model, "all")[name]) < 1e-4, name


def test_no_gradient_of_what_does_not_train():
  """No product as large as the embedding table or a gate projection is computed in a step."""
  tokens, segment_ids, labels = random_rows(2, 32, vocab=256)
  batch = Batch(*map(jnp.asarray, (tokens, labels, segment_ids)))

  def computed(trainable):
    config = _with(trainable)
    step = partial(train_step, batch=batch, config=config)
    jaxpr = jax.make_jaxpr(step)(abstract_state(config, mesh_of(1, 1))).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as XLA would
    return set(_shapes(used))

  table, gate = (256, 12), (12, 20)
  assert {table, gate} <= computed("all")
  assert not {table, gate} & computed("ttt")


def _shapes(jaxpr):
  """Returns the shapes of all products and scattered sums of a program, inner ones too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "scatter-add"):
      yield from (v.aval.shape for v in equation.outvars)
    for inner in jaxprs_in_params(equation.params):
      yield from _shapes(inner)


def test_no_backward_pass_below_what_trains():
  """Three layers below the TTT layer and one above: only these two have a backward pass."""
  tokens, segment_ids, labels = random_rows(2, 32, vocab=256)
  batch = Batch(*map(jnp.asarray, (tokens, labels, segment_ids)))

  def loops_backwards(trainable):
    base = _with(trainable)
    config = dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, num_layers=5),
      ttt=dataclasses.replace(base.ttt, layers=(3,)),
    )
    step = partial(train_step, batch=batch, config=config)
    jaxpr = jax.make_jaxpr(step)(abstract_state(config, mesh_of(1, 1))).jaxpr
    return str(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]).count("reverse=True")

  assert loops_backwards("ttt") < loops_backwards(
    "all"
  )  # the loop over the three layers is not run backwards
  assert loops_backwards("ttt+above") == loops_backwards("ttt")


def test_the_layers_above():
  model = jax.eval_shape(
    lambda: random_model(
      dataclasses.replace(MODEL, num_layers=5),
      attention=AttentionConfig(),
      ttt=dataclasses.replace(TTT, layers=(2,)),
    )
  )
  names = set(trained_parameters(model, "all"))
  chosen = set(trained_parameters(model, "ttt+above"))
  below = {name for name in names if name.startswith("groups/0/0/")}
  assert below
  assert names - chosen == below | {"embed/table/value"}


def test_layers_that_alternate_are_told_apart():
  """Makes four layers in one group of two places, with TTT layers in the second place."""
  model = jax.eval_shape(
    lambda: random_model(attention=AttentionConfig(), ttt=dataclasses.replace(TTT, layers=(1, 3)))
  )
  chosen = trained_parameters(model, "ttt")
  assert set(chosen) == {
    f"groups/0/1/mlp/{name}/value" for name in ("conv", "projection", "log_rate")
  }
  after = trained_parameters(with_parameters(model, dict.fromkeys(chosen, "new")), "all")
  assert {name for name, value in after.items() if value == "new"} == set(chosen)


def test_resumed_from_a_checkpoint_equals_undisturbed(tmp_path):
  rng = np.random.default_rng(0)
  documents = tuple(
    Document(f"{i}.txt", rng.integers(0, 256, 100, dtype=np.uint8)) for i in range(6)
  )
  source = Source("made up", InMemory(documents[:5]), InMemory(documents[5:]))
  corpus, mesh = Corpus((source,)), mesh_of(1, 1)
  whole = train(CONFIG, corpus, mesh, tmp_path)
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  resumed = train(CONFIG, corpus, mesh, tmp_path)  # from step 2
  assert int(resumed.state.step) == 3
  for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state)):
    assert np.array_equal(a, b)


def test_what_cannot_train_is_refused():
  with pytest.raises(ValueError, match=r"train\.trainable='mlp' is not one of 'all', 'ttt'"):
    TrainConfig(trainable="mlp")
  with pytest.raises(ValueError, match=r"train\.trainable='ttt' .* ttt\.layers=\[\] names none"):
    Config(train=TrainConfig(trainable="ttt"))
  with pytest.raises(ValueError, match=r"eval\.baseline=true .* leave it false"):
    dataclasses.replace(CONFIG, eval=EvalConfig(baseline=True))
