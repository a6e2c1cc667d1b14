"""A model whose fast weights are least squares: on meshes, reading on, saved; two kinds of document."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ATTENTION, MODEL, mesh_of, random_model, random_rows, relative_error

import ttt_jax
from ttt_jax.checkpoints.sections import Sections
from ttt_jax.config import Config, TTTConfig, check_layers
from ttt_jax.evaluation.perplexity import read_losses
from ttt_jax.generation.decoder import Reader
from ttt_jax.nn.fast_mlp import TttMlp
from ttt_jax.nn.loss import model_losses
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.trees import named_leaves

TTT = TTTConfig(
  layers=(0, 2),
  chunk_size=4,
  rule="least_squares",
  ridge=0.1,
  read_scale=2.0,
  read_gate="key",
  gate_threshold=0.5,
  gate_sharpness=4.0,
  half_life=30.0,
  learn_half_life=True,
)


def loss(model, tokens, segment_ids, labels):
  losses, valid, _ = model_losses(model, tokens, labels, segment_ids)
  return jnp.sum(losses) / jnp.sum(valid)


PROJECTED = dataclasses.replace(TTT, key_rank=8)


@pytest.mark.parametrize(
  ("mesh", "ttt"),
  [
    ((1, 8), TTT),
    ((1, 2, {"fsdp": 2, "tensor": 2}), TTT),
    ((1, 2, {"fsdp": 2, "tensor": 2}), PROJECTED),
  ],
  ids=["context", "fsdp and tensor", "projected keys"],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(mesh, ttt):
  rows, model = random_rows(4, 32), random_model(dataclasses.replace(MODEL, vocab_size=18), ttt=ttt)
  expected, want = jax.jit(jax.value_and_grad(loss))(model, *rows)
  sizes, more = mesh[:2], mesh[2] if len(mesh) > 2 else {}
  mesh = mesh_of(*sizes, **more)
  placed = [jax.device_put(x, sharding(mesh, "batch", "sequence")) for x in rows]
  with jax.set_mesh(mesh):
    spread = jax.device_put(model, shardings(model, mesh))
    actual, got = jax.jit(jax.value_and_grad(loss))(spread, *placed)
  assert relative_error(actual, expected) < 1e-5
  names = named_leaves(want)
  assert ttt is TTT or any("key_projection" in name for name in names)
  assert {"log_read_scale", "log_gate", "gate_key", "log_half_life"} <= {
    name.split("/")[-2] for name in names
  }
  for name, gradient in names.items():
    assert np.any(gradient), name
    assert relative_error(named_leaves(got)[name], gradient) < 2e-3, name


@pytest.mark.parametrize("ttt", [TTT, PROJECTED], ids=["all of F", "projected keys"])
def test_generation_is_the_forward_pass(ttt):
  """Rows of their own lengths; each token is the likeliest of the forward pass; states are saved."""
  model = random_model(ttt=ttt)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 17, n).tolist() for n in (9, 3, 14)]
  result = ttt_jax.generate(model, prompts, max_new_tokens=7)
  for row, length in zip(result.tokens, result.lengths, strict=True):
    likeliest = jnp.argmax(
      jax.jit(type(model).__call__)(model, jnp.asarray(row[None, :length])), -1
    )
    np.testing.assert_array_equal(likeliest[0, length - 8 : -1], row[length - 7 : length])


def test_a_saved_state_reads_on(tmp_path):
  model = random_model(ttt=TTT)
  tokens = random_rows(2, 10)[0]
  state = ttt_jax.generate(model, tokens, max_new_tokens=0).state
  state.save(tmp_path / "state.safetensors")
  loaded = ttt_jax.load_state(tmp_path / "state.safetensors", model)
  ways = [
    ttt_jax.generate(model, tokens[:, :3], max_new_tokens=5, state=s) for s in (state, loaded)
  ]
  np.testing.assert_array_equal(*(way.tokens for way in ways))
  learned = state.fast_weights_only()
  with_memory = ttt_jax.generate(model, tokens[:, :3], max_new_tokens=0, state=learned)
  without = ttt_jax.generate(model, tokens[:, :3], max_new_tokens=0)
  assert relative_error(with_memory.state.logits, without.state.logits) > 1e-3


def test_reading_in_pieces_is_reading_at_once():
  model, tokens = random_model(ttt=TTT), random_rows(2, 30)[0]
  at_once = -jnp.take_along_axis(
    jax.nn.log_softmax(model(tokens)[:, :-1]), jnp.asarray(tokens)[:, 1:, None], axis=2
  )[..., 0]
  assert relative_error(read_losses(Reader.of(model), tokens), at_once) < 1e-4


@pytest.mark.parametrize("ttt", [TTT, PROJECTED], ids=["all of F", "projected keys"])
def test_a_checkpoint_keeps_all_that_is_learned(ttt, tmp_path):
  model = random_model(dataclasses.replace(MODEL, qk_norm=False), None, ttt)
  with pytest.warns(UserWarning, match=r"ttt\.rule='least_squares' \(there it is the sum\)"):
    ttt_jax.save_pretrained(model, tmp_path / "model")
  loaded = ttt_jax.load_pretrained(tmp_path / "model")
  assert dataclasses.replace(loaded.ttt, init=None) == ttt
  for (name, a), b in zip(named_leaves(model).items(), jax.tree.leaves(loaded), strict=True):
    np.testing.assert_array_equal(a, b, err_msg=name)


def test_a_projection_that_is_not_stored_is_random(tmp_path):
  """A pretrained model gets keys of fewer dimensions, different from layer to layer."""
  ttt_jax.save_pretrained(random_model(ttt=None), tmp_path / "plain")
  model = ttt_jax.load_pretrained(tmp_path / "plain", ttt=PROJECTED)
  found = [x for name, x in named_leaves(model).items() if "key_projection" in name]
  layers = np.concatenate([np.asarray(x) for x in found])
  assert layers.shape == (2, 20, 8)
  assert (layers.std(axis=(1, 2)) > 0.1).all()
  assert relative_error(layers[0], layers[1]) > 0.1


def test_attention_has_documents_of_its_own():
  """Cut in attention alone, what comes behind the cut is the model on it alone, plus its memory."""
  tokens = random_rows(2, 16)[0]
  one, cut = np.ones_like(tokens), np.ones_like(tokens)
  cut[:, 8:] = 2
  plain = random_model(ttt=None)
  alone = plain(tokens[:, 8:])
  assert relative_error(plain(tokens, one, cut)[:, 8:], alone) < 1e-5
  model = random_model(ttt=TTT)
  restarted, carried = model(tokens, cut), model(tokens, one, cut)
  assert relative_error(restarted[:, 8:], model(tokens[:, 8:])) < 1e-5
  np.testing.assert_allclose(carried[:, :8], restarted[:, :8], rtol=1e-5, atol=1e-6)
  assert relative_error(carried[:, 8:], restarted[:, 8:]) > 1e-3
  # On shards of the sequence, too.
  mesh = mesh_of(1, 2)
  rows = sharding(mesh, "batch", "sequence")
  with jax.set_mesh(mesh):
    spread = jax.device_put(model, sharding(mesh))
    split = jax.jit(lambda m, *x: m(*x))(
      spread, *(jax.device_put(x, rows) for x in (tokens, one, cut))
    )
  assert relative_error(split, carried) < 1e-5


@pytest.mark.usefixtures("unchecked_types")
def test_attention_needs_one_document_a_token():
  tokens = random_rows(2, 16)[0]
  with pytest.raises(ttt_jax.UserError, match=r"attention_segment_ids has shape \(2, 8\)"):
    random_model(ttt=TTT)(tokens, np.ones_like(tokens), np.ones_like(tokens[:, :8]))


def test_statistics():
  stats = random_model(ttt=TTT)(random_rows(2, 32)[0], return_stats=True)[1]
  assert ((stats.leverage > 0) & (stats.leverage < 1)).all()
  assert (stats.condition > 1).all()
  assert (stats.read_scale > 0).all()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"rule": "squares"}, r"ttt\.rule='squares' is not one of"),
    ({"rule": "least_squares", "ridge": 0.0}, r"ttt\.ridge=0\.0 must be positive"),
    ({"rule": "least_squares", "clip_norm": 1.0}, r"ttt\.clip_norm=1\.0 does not belong to"),
    ({"rule": "least_squares", "inner_lr": 0.5}, r"ttt\.inner_lr=0\.5 does not belong to"),
    (
      {"rule": "sum", "read_gate": "leverage"},
      r"ttt\.read_gate='leverage' does not belong to ttt\.rule='sum'",
    ),
    (
      {"rule": "least_squares", "read_gate": "none", "learn_gate": False},
      r"ttt\.learn_gate=False does not belong to ttt\.read_gate='none'",
    ),
    ({"rule": "least_squares", "read_gate": "open"}, r"ttt\.read_gate='open' is not one of"),
    ({"rule": "least_squares", "gate_threshold": 1.0}, r"ttt\.gate_threshold=1\.0 must be in"),
  ],
)
def test_bad_configs(fields, message):
  with pytest.raises(ttt_jax.UserError, match=message):
    TTTConfig(layers=(0,), **fields)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"read_gate": "leverage"}, r"ttt\.read_gate='leverage' does not belong to ttt\.rule='sum'"),
    ({"gate_threshold": 0.5}, r"ttt\.gate_threshold=0\.5 does not belong to ttt\.rule='sum'"),
    ({"learn_half_life": True}, r"ttt\.learn_half_life=true needs a ttt\.half_life"),
  ],
)
def test_a_part_of_a_section_is_checked_when_it_is_complete(fields, message):
  """Checks that fields may come without the rule, which a checkpoint may set, but not into a model."""
  part = TTTConfig(layers=(0,), **fields)
  with pytest.raises(ttt_jax.UserError, match=message):
    Config(model=MODEL, ttt=part)
  with pytest.raises(ttt_jax.UserError, match=message):
    TttMlp(MODEL, part, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_sums_need_float32():
  model = dataclasses.replace(MODEL, state_dtype="bfloat16")
  with pytest.raises(ttt_jax.UserError, match=r"model\.state_dtype='bfloat16' cannot hold"):
    check_layers(*Sections(model, ATTENTION, TTT))
  with pytest.raises(ttt_jax.UserError, match=r"model\.state_dtype='bfloat16' cannot hold"):
    Config(model=model, attention=ATTENTION, ttt=TTT)
