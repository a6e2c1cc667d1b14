"""The step of `notebooks/guides/one_step.py`, plain JAX on arrays, is the library's step."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import relative_error
from jax.sharding import AxisType

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.nn.loss import mean_loss, model_losses
from ttt_jax.nn.transformer import Transformer

PATH = Path(__file__).parents[1] / "notebooks/guides/one_step.py"
_spec = importlib.util.spec_from_file_location("one_step", PATH)
one_step = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(one_step)

SMALL = one_step.Config(
  vocab=17,
  layers=2,
  ttt_layer=1,
  d=12,
  f=20,
  heads=2,
  head_dim=4,
  window=6,
  chunk=4,
  inner_lr=0.7,  # large: the fast weight is a visible part of the output
  decay=0.8,
)
ROWS, LENGTH = 4, 48
SECTIONS = (
  ModelConfig(
    vocab_size=SMALL.vocab,
    num_layers=SMALL.layers,
    d_model=SMALL.d,
    d_ff=SMALL.f,
    num_heads=SMALL.heads,
    num_kv_heads=SMALL.heads,
    head_dim=SMALL.head_dim,
    rope_theta=SMALL.theta,
    norm_eps=SMALL.eps,
  ),
  AttentionConfig(window=SMALL.window),
  TTTConfig(
    layers=(SMALL.ttt_layer,),
    chunk_size=SMALL.chunk,
    conv_width=SMALL.conv_width,
    inner_lr=SMALL.inner_lr,
    decay=SMALL.decay,
  ),
)
# The library's name of each parameter of a layer.
LAYER = {
  "attention_norm": ("attention_norm", "scale"),
  "query": ("attention", "query"),
  "key": ("attention", "key"),
  "value": ("attention", "value"),
  "out": ("attention", "out"),
  "mlp_norm": ("mlp_norm", "scale"),
} | {name: ("mlp", name) for name in ("gate", "up", "down", "conv", "projection", "log_rate")}


@pytest.fixture(scope="module", autouse=True)
def standard_rules():
  """Those of a reader's own JAX: the file is written for them."""
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def random_parameters():
  rng = np.random.default_rng(0)
  params = one_step.init(jax.random.key(0), SMALL)
  return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def random_batch():
  return np.random.default_rng(1).integers(0, SMALL.vocab, (2, ROWS, LENGTH)).astype(np.int32)


def places(model):
  """Every parameter of the library's model: its path in the file's tree, the variable, its index."""
  yield ("table",), model.embed.table, ...
  yield ("norm",), model.norm.scale, ...
  for layer, (group, run, index) in enumerate(model.layers()):
    stack = model.groups[group][run]
    for name, (module, parameter) in LAYER.items():
      if hasattr(getattr(stack, module), parameter):
        yield ("layers", layer, name), getattr(getattr(stack, module), parameter), index


def to_library(params):
  model = Transformer(*SECTIONS, rngs=nnx.Rngs(7))
  for path, variable, index in places(model):
    value = params
    for key in path:
      value = value[key]
    variable[...] = variable[...].at[index].set(value)
  return model


def from_library(model):
  tree = {"layers": [{} for _ in range(SMALL.layers)]}
  for (*parents, name), variable, index in places(model):
    node = tree
    for key in parents:
      node = node[key]
    node[name] = variable[...][index]
  return tree


@pytest.fixture(scope="module")
def case():
  """Parameters, a batch, and the library's loss and gradients."""
  params, (tokens, labels) = random_parameters(), random_batch()

  @jax.jit
  @jax.value_and_grad
  def loss(model):
    losses, valid, _ = model_losses(model, tokens, labels)
    return mean_loss(losses, valid)

  value, gradients = loss(to_library(params))
  return params, tokens, labels, value, from_library(gradients)


def zero_moments(params):
  return tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(2))


def largest_error(actual, expected):
  """The largest relative error of a leaf, and the leaf."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  errors = jax.tree.map(relative_error, actual, expected)
  paths = jax.tree_util.tree_leaves_with_path(errors)
  return max((error, jax.tree_util.keystr(path)) for path, error in paths)


def test_the_file_is_short():
  assert len(PATH.read_text().splitlines()) <= 250


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=["1 device", "data 2 x context 4"])
def test_loss_and_every_gradient_are_the_librarys(case, shape):
  params, tokens, labels, expected_loss, expected = case
  mesh = jax.make_mesh(shape, ("data", "context"), axis_types=(AxisType.Auto,) * 2)
  rows, whole = jax.P("data", "context"), jax.P()
  mapped = jax.shard_map(
    partial(one_step.loss_and_gradients, c=SMALL),
    mesh=mesh,
    in_specs=(whole, rows, rows),
    out_specs=whole,
  )
  loss, gradients = jax.jit(mapped)(params, tokens, labels)
  assert relative_error(loss, expected_loss) < 1e-6
  assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(expected))
  error, path = largest_error(gradients, expected)
  assert error < 1e-5, path


def test_the_update_is_adams(case):
  params, *_, gradients = case
  optimizer = optax.adam(SMALL.learning_rate)
  state, expected = optimizer.init(params), params
  actual, moments = params, zero_moments(params)
  for step in (1, 2):
    updates, state = optimizer.update(gradients, state, expected)
    expected = optax.apply_updates(expected, updates)
    actual, moments = one_step.adam(actual, gradients, moments, step, SMALL)
  error, path = largest_error(actual, expected)
  assert error < 1e-5, path


def test_states_are_exchanged_once():
  """Also with the layer computed once more backward: its all-gather and the transpose of that."""
  mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
  params, (tokens, labels) = random_parameters(), random_batch()
  step = one_step.make_step(mesh, SMALL)
  text = step.lower(params, zero_moments(params), 1, tokens, labels).compile().as_text()
  calls = {
    name: len(re.findall(rf" {name}(?:-start)?\(", text))
    for name in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")
  }
  halos = 3 * SMALL.layers  # forward, once more backward, and its transpose
  assert calls == {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 0,
    "collective-permute": halos,
  }


def test_it_learns_its_own_text(capsys):
  losses = one_step.main(steps=6, rows=2, length=128)
  assert losses[-1] < losses[0] - 1
  assert f"step  6  loss {losses[-1]:.3f}" in capsys.readouterr().out
