"""Losses of a model whose logits are read in pieces: the same numbers in less memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, mesh_of, random_model, random_rows, relative_error

from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import mean_loss, model_losses, token_losses
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.parameters import shardings


def _value_and_grad(model, rows, mesh, at_once):
  def loss(model, tokens, segment_ids, labels):
    losses, valid, _ = model_losses(model, tokens, labels, segment_ids, at_once=at_once)
    return mean_loss(losses, valid), (losses, valid)

  where = sharding(mesh, "batch", "sequence")
  with jax.set_mesh(mesh):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(
      jax.device_put(model, shardings(model, mesh)), *(jax.device_put(row, where) for row in rows)
    )


@pytest.mark.parametrize(
  ("mesh", "tied"),
  [
    ({}, True),
    ({"data": 2, "context": 4}, False),
    ({"fsdp": 2, "context": 2, "tensor": 2}, True),
    ({"fsdp": 2, "context": 2, "tensor": 2}, False),
  ],
  ids=str,
)
def test_pieces_are_the_whole(mesh, tied):
  """Five tokens at a time, of 64 on one device or of 8 on each: the last piece is never full."""
  model = random_model(
    dataclasses.replace(MODEL, vocab_size=18, num_layers=1, tie_embeddings=tied),
    AttentionConfig(window=4),
    TTTConfig(),
  )
  rows = random_rows(2, 32)
  (expected, (all_losses, all_valid)), grads = _value_and_grad(model, rows, mesh_of(1, 1), 2**30)
  tokens, segment_ids, labels = rows
  losses, valid = token_losses(
    jax.jit(lambda m: m(tokens, segment_ids))(model), jnp.asarray(labels)
  )
  assert relative_error(all_losses, losses) < 1e-6
  assert np.array_equal(all_valid, valid)

  (value, (losses, valid)), in_pieces = _value_and_grad(
    model, rows, mesh_of(**{"data": 1, "context": 1} | mesh), 5 * (18 // mesh.get("tensor", 1)) + 3
  )
  assert float(value) == pytest.approx(float(expected), rel=1e-6)
  assert relative_error(losses, all_losses) < 1e-5
  assert np.array_equal(valid, all_valid)
  for (path, a), b in zip(jax.tree.leaves_with_path(in_pieces), jax.tree.leaves(grads)):
    assert relative_error(a, b) < 2e-5, jax.tree_util.keystr(path)


def test_z_loss_is_the_square_of_the_logsumexp():
  model = random_model(
    dataclasses.replace(MODEL, num_layers=1), AttentionConfig(window=4), TTTConfig()
  )
  tokens, segment_ids, labels = random_rows(2, 32)

  @partial(jax.jit, static_argnums=1)
  def losses(model, z_loss):
    return model_losses(model, tokens, labels, segment_ids, z_loss=z_loss)[0]

  logits = jax.jit(lambda m: m(tokens, segment_ids))(model)
  squares = jnp.where(labels != IGNORE, jax.nn.logsumexp(logits, axis=-1) ** 2, 0.0)
  assert relative_error(losses(model, 0.5) - losses(model, 0.0), 0.5 * squares) < 1e-5


def test_pieces_take_the_memory_of_a_piece():
  """Forward and backward, with a vocabulary 340 times the model's width."""
  config = dataclasses.replace(MODEL, num_layers=1, vocab_size=4096)
  model = random_model(config, AttentionConfig(window=4), TTTConfig())
  tokens = np.zeros((16, 32), np.int32)

  def temporary_bytes(at_once):
    def loss(parameters):
      changed = jax.tree.unflatten(jax.tree.structure(model), parameters)
      return mean_loss(*model_losses(changed, tokens, tokens, at_once=at_once)[:2])

    compiled = jax.jit(jax.grad(loss)).lower(jax.tree.leaves(model)).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * tokens.size * config.vocab_size
  assert temporary_bytes(2**30) > 2 * logits
  assert temporary_bytes(16 * config.vocab_size) < logits / 2
