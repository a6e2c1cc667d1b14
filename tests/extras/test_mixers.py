"""Tests models whose layers have gated linear attention or DeltaNet in the place of attention."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import MODEL, TTT, mesh_of, random_model, random_rows, relative_error

from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.checkpoints.save import save_pretrained
from ttt_jax.config import (
  AttentionConfig,
  Config,
  DataConfig,
  MeshConfig,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.config.yaml import load_config
from ttt_jax.extras.baselines.layers import linear_sizes
from ttt_jax.generation import pieces
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.generation.state import load_state
from ttt_jax.nn.loss import mean_loss, model_losses
from ttt_jax.nn.stacking import LayerKind, layer_kinds
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.trees import named_leaves
from ttt_jax.training.flops import token_flops
from ttt_jax.training.step import init_state, jit_train_step, put_batch

CONFIGS = Path(__file__).parents[2] / "configs"
MIXERS = ("gla", "delta_net")
EACH = pytest.mark.parametrize("mixer", MIXERS)
# A layer with linear attention and, where TTT is given, fast weights; one with a window. Four query heads
# of 6 and two of keys and values make values of 9, and keys of 4 (GLA) or 9.
SMALL = dataclasses.replace(MODEL, num_layers=2, vocab_size=18)
SOME = {mixer: AttentionConfig(window=5, mixer=mixer, mixer_layers=(0,)) for mixer in MIXERS}
FAST = dataclasses.replace(TTT, layers=(0,), inner_lr=3.0)
# Each as published, and the other way round: gla with a short convolution, delta_net without.
SWAPPED = {"gla": 3, "delta_net": 1}
EACH_CONV = pytest.mark.parametrize(
  ("mixer", "short_conv"), [*((m, None) for m in MIXERS), *SWAPPED.items()]
)


def test_layers_are_chosen_by_name_or_all_but_those_with_full_attention():
  window, gla = LayerKind(False, 5), LayerKind(False, None, "gla")
  full = LayerKind(False, None)

  def kinds(**fields):
    return layer_kinds(MODEL, AttentionConfig(window=5, **fields), TTTConfig())

  assert kinds(mixer="gla", mixer_layers=(0, 3)) == (gla, window, window, gla)
  assert kinds(mixer="gla", mixer_layers=(0,), full_layers=(2,)) == (gla, window, full, window)
  assert kinds(mixer="gla") == (gla,) * 4
  assert kinds(mixer="gla", full_layers=(1,)) == (gla, full, gla, gla)
  assert layer_kinds(SMALL, SOME["gla"], FAST) == (LayerKind(True, None, "gla"), window)


@pytest.mark.parametrize(
  ("name", "changes"),
  [
    ("quickstart", []),
    ("pretrain_500m_32k", []),
    ("pretrain_500m_32k", ["--model.num_kv_heads", "2"]),
    ("pretrain_500m_32k", ["--model.num_kv_heads=3", "--model.num_heads=9", "--model.head_dim=64"]),
  ],
)
@EACH
def test_parameters_are_those_of_the_plain_model_within_two_percent(mixer, name, changes):
  config = load_config(CONFIGS / f"{name}.yaml", ["--mesh.context", "1", *changes])

  def count(**fields):
    attention = dataclasses.replace(config.attention, **fields)
    changed = dataclasses.replace(config, attention=attention)
    return count_parameters(jax.eval_shape(lambda: make_model(changed)))

  plain = count()
  assert abs(count(mixer=mixer) / plain - 1) < 0.02
  assert abs(count(mixer=mixer, mixer_layers=(1, 3)) / plain - 1) < 0.02


LENGTH = 32
# Every token has a vocabulary entry of its own, so that a gradient in the table of embeddings is one in the
# token; the untied head keeps the table out of the logits otherwise.
SPELLED = dataclasses.replace(SMALL, vocab_size=LENGTH, tie_embeddings=False)


@EACH_CONV
def test_no_logit_depends_on_a_later_token_or_another_document(mixer, short_conv):
  attention = AttentionConfig(mixer=mixer, short_conv=short_conv)
  model = random_model(SPELLED, attention, TTTConfig())
  document = np.repeat([1, 2, 3, 0], [9, 12, 8, 3])
  probe = jax.random.normal(jax.random.key(2), (LENGTH,))
  tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None]

  @jax.jit
  def reach(model, t):
    def logit(model):
      return jnp.vdot(model(tokens, jnp.asarray(document[None], jnp.int32))[0, t], probe)

    return jnp.sum(jnp.abs(jax.grad(logit)(model).embed.table[...]), axis=1)

  seen = np.stack([reach(model, jnp.int32(t)) for t in range(LENGTH)])
  position = np.arange(LENGTH)
  later = position[None, :] > position[:, None]
  elsewhere = document[None, :] != document[:, None]
  elsewhere[-3:, -3:] &= False  # padding is nobody's document
  assert not seen[later | elsewhere].any()
  # The test can fail: everything that may depend does.
  assert (seen[~later & ~elsewhere & (document != 0)[:, None]] > 0).all()


@EACH
def test_loss_and_gradients_do_not_depend_on_the_mesh(mixer):
  one_layer = dataclasses.replace(SMALL, num_layers=1)
  model = random_model(one_layer, AttentionConfig(mixer=mixer), TTTConfig())
  rows = random_rows(4, 24, vocab=18)

  @jax.jit
  def loss_and_gradients(model, tokens, segment_ids, labels):
    def loss(model):
      losses = model_losses(model, tokens, labels, segment_ids)[0]
      return mean_loss(losses, (labels != -1).astype(losses.dtype))

    return jax.value_and_grad(loss)(model)

  expected, expected_gradients = loss_and_gradients(model, *rows)
  for size in ({"data": 2}, {"data": 1, "fsdp": 2}, {"data": 1, "tensor": 2}):
    mesh = mesh_of(**{"context": 1} | size)
    there = jax.device_put(model, shardings(model, mesh))
    with jax.set_mesh(mesh):
      where = sharding(mesh, "batch", "sequence")
      loss, gradients = loss_and_gradients(there, *(jax.device_put(x, where) for x in rows))
    assert abs(loss / expected - 1) < 1e-5, size
    for (name, a), b in zip(named_leaves(gradients).items(), jax.tree.leaves(expected_gradients)):
      assert relative_error(a, b) < 1e-4, (size, name)


@EACH
def test_training_learns_a_batch(mixer):
  """Training changes every initial parameter."""
  config = Config(
    model=SMALL,
    attention=SOME[mixer],
    data=DataConfig(seq_len=24),
    train=TrainConfig(steps=25, batch_size=2, warmup_steps=2, learning_rate=2e-2),
  )
  mesh = mesh_of(1, 1)
  tokens, segment_ids, labels = random_rows(2, 24, vocab=18)
  with jax.numpy_dtype_promotion("standard"), jax.set_mesh(mesh):  # of optax
    state, step = init_state(config, mesh), jit_train_step(config, mesh)
    start = jax.device_get(state.model)
    batch = put_batch({"tokens": tokens, "segment_ids": segment_ids, "labels": labels}, mesh)
    losses = []
    for _ in range(25):
      state, metrics = step(state, batch)
      losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
  for (name, a), b in zip(named_leaves(state.model).items(), jax.tree.leaves(start)):
    assert np.max(np.abs(a - b)) > 1e-3, name


@EACH
def test_remat_changes_nothing(mixer):
  tokens, segment_ids, _ = random_rows(2, 20)

  def gradient(remat):
    model = random_model(
      dataclasses.replace(SMALL, remat=remat), AttentionConfig(mixer=mixer), TTTConfig()
    )
    return jax.jit(jax.grad(lambda m: jnp.mean(m(tokens, segment_ids) ** 2)))(model)

  for a, b in zip(*map(jax.tree.leaves, (gradient("minimal"), gradient("layer")))):
    assert relative_error(a, b) < 1e-5


PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [2], [1, 8, 2, 8, 1]]
NEW = 7


def learner(mixer, short_conv=None):
  """Makes a model whose fast weights change its output."""
  attention = dataclasses.replace(SOME[mixer], short_conv=short_conv)
  return random_model(SMALL, attention, FAST, seed=1)


_logits = jax.jit(lambda model, tokens: model(tokens))


def read_whole(model, row):
  filled = np.zeros((1, 40), np.int32)
  filled[0, : len(row)] = row
  return np.asarray(_logits(model, filled))[0, len(row) - 1]


@pytest.mark.parametrize("size", [{}, {"fsdp": 2, "tensor": 2}], ids=str)
@EACH_CONV
def test_writing_token_by_token_is_reading_at_once(mixer, short_conv, size, monkeypatch, tmp_path):
  """Generation equals the full pass, also from a saved state and with prompts in several pieces."""
  monkeypatch.setattr(pieces, "_PIECE", 8)
  model = whole = learner(mixer, short_conv)
  if size:
    model = jax.device_put(model, shardings(model, mesh_of(**{"data": 1, "context": 1} | size)))
  first = generate(model, PROMPTS, max_new_tokens=3)
  first.state.save(tmp_path / "state")
  state = load_state(tmp_path / "state", model)
  for a, b in zip(jax.tree.leaves(state.cache), jax.tree.leaves(first.state.cache)):
    assert a.dtype == b.dtype
  result = generate(model, [[]] * 3, max_new_tokens=NEW - 3, state=state)
  for row, prompt in enumerate(PROMPTS):
    text = [*prompt, *first.new_tokens[row], *result.new_tokens[row]]
    assert relative_error(result.state.logits[row], read_whole(whole, text)) < 1e-4
    for end in range(len(prompt), len(text)):
      assert text[end] == np.argmax(read_whole(whole, text[:end]))


@pytest.mark.parametrize(
  ("mixer", "short_conv", "before"),
  [("gla", None, 0), ("gla", 3, 2), ("delta_net", None, 3), ("delta_net", 1, 0)],
)
def test_a_state_has_one_size_for_any_text(mixer, short_conv, before):
  heads, key, value, _ = linear_sizes(SMALL, mixer)
  reader = Reader.of(learner(mixer, short_conv))
  few, many = (reader.empty_cache(3, capacity).layers[0].attention for capacity in (1, 1000))
  assert jax.tree.map(jnp.shape, few) == jax.tree.map(jnp.shape, many)
  assert few.state.shape == (3, heads, key, value)
  assert few.recent is None if before == 0 else few.recent.shape[:2] == (3, before)


@EACH
def test_the_state_goes_with_the_text(mixer):
  """Without the text, only what the fast weights learned remains."""
  model = learner(mixer)
  learned = generate(model, PROMPTS[:1], max_new_tokens=0).state.fast_weights_only()
  linear, fast = learned.cache.layers[0]
  assert not any(x.any() for x in jax.tree.leaves(linear))
  assert fast.s.any()
  again = generate(model, PROMPTS[:1], max_new_tokens=0, state=learned).state
  assert all(x.any() for x in jax.tree.leaves(again.cache.layers[0].attention))


@EACH
def test_bfloat16_keeps_its_state_in_float32(mixer):
  config = dataclasses.replace(SMALL, dtype="bfloat16", num_layers=1)
  model = random_model(config, AttentionConfig(mixer=mixer), TTTConfig(), seed=1)
  result = generate(model, PROMPTS, max_new_tokens=4)
  cache = result.state.cache.layers[0].attention
  assert cache.state.dtype == jnp.float32
  assert cache.recent is None or cache.recent.dtype == jnp.bfloat16
  for row, (prompt, new) in enumerate(zip(PROMPTS, result.new_tokens)):
    assert relative_error(result.state.logits[row], read_whole(model, [*prompt, *new])) < 0.1


@EACH_CONV
def test_two_flops_for_every_parameter_a_token_meets(mixer, short_conv):
  ttt = TTTConfig()
  attention = dataclasses.replace(SOME[mixer], short_conv=short_conv)
  shapes = jax.eval_shape(lambda: Transformer(SMALL, attention, ttt, rngs=nnx.Rngs(0)))
  sizes = {
    name: leaf.size
    for name, leaf in named_leaves(shapes).items()
    if name.startswith("groups") and not {"scale", "decay_bias"} & set(name.split("/"))
  }
  flops = token_flops(SMALL, attention, ttt, 20)
  assert flops.projections == 2 * sum(sizes.values())
  # One layer sees 5 tokens; in the other every product with the state counts.
  heads, key, value, _ = linear_sizes(SMALL, mixer)
  products = {"gla": 2, "delta_net": 3}[mixer]
  window = dataclasses.replace(SOME[mixer], mixer="attention", mixer_layers=None)
  windows = token_flops(SMALL, window, ttt, 20).attention / 2
  assert math.isclose(flops.attention, windows + 2 * products * heads * key * value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mixer": "mamba"}, r"attention\.mixer='mamba' is not one of 'attention', 'gla', 'delta_net'"),
    ({"mixer_layers": (1,)}, r"attention\.mixer_layers=\[1\] needs a baseline: .* leave"),
    (
      {"short_conv": 4},
      r"attention\.short_conv=4 needs attention\.mixer 'gla' or 'delta_net'",
    ),
    ({"mixer": "gla", "short_conv": 0}, r"attention\.short_conv=0 .*positive"),
    (
      {"mixer": "gla", "mixer_layers": (1, 2), "full_layers": (2,)},
      r"mixer_layers=\[1, 2\] and attention\.full_layers=\[2\] both name \[2\]",
    ),
  ],
)
def test_fields_that_contradict_each_other(fields, message):
  with pytest.raises(ValueError, match=message):
    AttentionConfig(**fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mixer_layers": (4,)}, r"attention\.mixer_layers=\[4\] names layer 4.*use 0 to 3"),
    ({"mixer_layers": (1, 1)}, r"attention\.mixer_layers=\[1, 1\] names a layer twice"),
    ({"mixer_layers": ()}, r"attention\.mixer='gla' is in no layer"),
    ({"full_layers": (0, 1, 2, 3)}, r"attention\.mixer='gla' is in no layer"),
  ],
)
def test_layers_that_are_not_there(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(attention=AttentionConfig(mixer="gla", **fields))


@EACH
def test_a_sequence_on_several_devices_is_refused(mixer):
  attention = AttentionConfig(mixer=mixer)
  message = rf"attention\.mixer='{mixer}' with mesh\.context=2: .* set mesh\.context=1"
  with pytest.raises(ValueError, match=message):
    Config(attention=attention, mesh=MeshConfig(context=2))
  model = random_model(SMALL, attention, TTTConfig())
  refused = pytest.raises(NotImplementedError, match=rf"'{mixer}' on 2 shards of the sequence")
  with jax.set_mesh(mesh_of(1, 2)), refused:
    jax.eval_shape(lambda: model(jnp.zeros((1, 8), jnp.int32)))


@EACH
def test_there_is_no_checkpoint_of_transformers_for_it(mixer, tmp_path):
  with pytest.raises(
    NotImplementedError,
    match=rf"attention\.mixer='{mixer}' cannot be saved in a format of transformers",
  ):
    save_pretrained(random_model(SMALL, SOME[mixer], FAST), tmp_path / "model")
  assert not (tmp_path / "model").exists()
