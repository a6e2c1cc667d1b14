"""Tokens and labels outside of the vocabulary: an error where they are known, NaN where they are traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, mesh_of, random_model, random_rows, relative_error

from ttt_jax import UserError
from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import model_losses, token_losses
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.parameters import shardings

VOCAB = 18  # two devices of a tensor axis share it
MESHES = [
  {"data": 2, "context": 2},
  {"fsdp": 2, "context": 1, "tensor": 2},
  {"fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.fixture(scope="module")
def model():
  config = dataclasses.replace(MODEL, vocab_size=VOCAB, num_layers=2)
  return random_model(config, AttentionConfig(window=5), TTTConfig(layers=(0,), chunk_size=4))


def _with(rows, place, value):
  rows = rows.copy()
  rows[place] = value
  return rows


@pytest.mark.parametrize("unknown", [VOCAB, -1, 4000])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_a_known_token_is_named(kind, unknown, model):
  tokens, segment_ids, labels = random_rows(2, 16)
  wrong = kind(_with(tokens, ([1, 1], [4, 7]), unknown))
  message = (
    rf"tokens\[1, 4\]={unknown} is not in the vocabulary of 18: ids are 0 to 17; padding may"
  )
  for call in (
    lambda: model(wrong),
    lambda: model(wrong, segment_ids),
    lambda: model_losses(model, wrong, labels, segment_ids),
    lambda: jax.jit(lambda m: m(wrong))(model),
  ):
    with pytest.raises(UserError, match=message):
      call()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_dtypes_of_tokens(dtype, model, unchecked_types):
  tokens, segment_ids, _ = random_rows(2, 16)
  run = jax.jit(lambda m, t: m(t, segment_ids))
  assert np.array_equal(run(model, tokens.astype(dtype)), run(model, tokens))
  unknown = run(model, _with(tokens.astype(dtype), (0, 3), 120))
  assert np.isnan(unknown[0, 3]).all()


def _everywhere(function, model, rows, mesh):
  """`function(model, *rows)` of traced rows on a mesh; {} is one device."""
  mesh = mesh_of(**{"data": 1, "context": 1} | mesh)
  where = sharding(mesh, "batch", "sequence")
  with jax.set_mesh(mesh):
    arguments = [jax.device_put(row, where) for row in rows]
    return np.asarray(jax.jit(function)(jax.device_put(model, shardings(model, mesh)), *arguments))


@pytest.mark.parametrize("mesh", [{}, *MESHES], ids=str)
@pytest.mark.parametrize("unknown", [VOCAB, -1, 4000])
def test_the_embedding_of_a_traced_one_is_nan_on_every_mesh(unknown, mesh, model):
  tokens, _, _ = random_rows(4, 16)
  place = ([1, 2], [4, 7])
  expected = np.asarray(model.embed.table[...])[tokens]
  expected[place] = np.nan
  rows = (_with(tokens, place, unknown),)
  actual = _everywhere(lambda m, t: m.embed(t), model, rows, mesh)
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("mesh", [{}, MESHES[2]], ids=str)
def test_its_row_shows_it_and_no_other(mesh, model):
  tokens, _, labels = random_rows(4, 16)

  def losses(model, *rows):
    return model_losses(model, *rows)[0]

  expected = _everywhere(losses, model, (tokens, labels), {})
  rows = (_with(tokens, (1, 4), -1), labels)
  actual = _everywhere(losses, model, rows, mesh)
  later = np.zeros(tokens.shape, bool)
  later[1, 4:] = True
  assert np.isnan(actual[later & (labels != IGNORE)]).all()
  others = np.arange(4) != 1
  assert relative_error(actual[others], expected[others]) < 1e-5


@pytest.mark.parametrize("mesh", [{}, MESHES[2]], ids=str)
def test_padding_may_have_any_token(mesh, model):
  """Known or traced: nothing but padding's own output depends on it."""
  tokens, segment_ids, _ = random_rows(4, 16)
  segment_ids[0, :2] = 0
  real = segment_ids != 0

  def logits(model, *rows):
    return model(*rows)

  expected = _everywhere(logits, model, (tokens, segment_ids), {})
  for padding in (-1, VOCAB, 4000):
    wrong = np.where(real, tokens, padding).astype(np.int32)
    assert np.array_equal(np.isfinite(model(wrong, segment_ids)), np.isfinite(expected))
    actual = _everywhere(logits, model, (wrong, segment_ids), mesh)
    assert relative_error(actual[real], expected[real]) < 1e-5


@pytest.mark.parametrize("unknown", [VOCAB, -2])
def test_labels(unknown, model):
  tokens, segment_ids, labels = random_rows(4, 16)
  logits = model(tokens, segment_ids)
  place = tuple(np.argwhere(labels != IGNORE)[5])
  wrong = _with(labels, place, unknown)
  message = (
    rf"labels\[{place[0]}, {place[1]}\]={unknown} is not in the vocabulary of 18: .*, and -1 for"
  )
  with pytest.raises(UserError, match=message):
    token_losses(logits, jnp.asarray(wrong))
  with pytest.raises(UserError, match=message):
    model_losses(model, tokens, wrong, segment_ids)
  expected = np.array(token_losses(logits, jnp.asarray(labels))[0])
  expected[place] = np.nan
  np.testing.assert_allclose(jax.jit(token_losses)(logits, wrong)[0], expected, rtol=1e-5)

  def losses(model, tokens, labels, segment_ids):
    return model_losses(model, tokens, labels, segment_ids)[0]

  for mesh in ({}, MESHES[2]):
    actual = _everywhere(losses, model, (tokens, wrong, segment_ids), mesh)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
