"""What is forgotten, in tokens: fixed, learned, over chunks of other sizes, on a mesh, while reading on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, mesh_of, random_model, random_rows, relative_error

from ttt_jax.config import TTTConfig
from ttt_jax.evaluation.perplexity import read_losses
from ttt_jax.generation.decoder import Reader
from ttt_jax.nn.loss import model_losses
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.trees import named_leaves

TTT = TTTConfig(layers=(1,), chunk_size=4, inner_lr=3.0, half_life=9.0)
LEARNED = dataclasses.replace(TTT, learn_half_life=True)
_FLOAT64 = {"dtype": "float64", "param_dtype": "float64", "state_dtype": "float64"}


def _made(ttt):
  """Models whose other parameters are equal, whatever is learned of the half-life."""
  model = random_model(MODEL, ttt=LEARNED)
  if not ttt.learn_half_life:
    leaves = [x for name, x in named_leaves(model).items() if "log_half_life" not in name]
    model = jax.tree.unflatten(jax.tree.structure(random_model(MODEL, ttt=ttt)), leaves)
  return model


def _loss(model, tokens, segment_ids, labels):
  losses, valid, _ = model_losses(model, tokens, labels, segment_ids)
  return jnp.sum(losses) / jnp.sum(valid)


def _learned(model) -> float:
  (s,) = (x for name, x in named_leaves(model).items() if "log_half_life" in name)
  return 9.0 * float(jnp.exp(10 * s.reshape(())))


def test_it_is_a_decay_of_half_in_so_many_tokens():
  for chunk in (4, 8):
    ttt = dataclasses.replace(TTT, chunk_size=chunk)
    assert ttt.chunk_decay ** (9.0 / chunk) == pytest.approx(0.5)
  tokens = random_rows(2, 32)[0]
  decay = dataclasses.replace(TTT, half_life=None, decay=0.5 ** (4 / 9))
  np.testing.assert_array_equal(_made(TTT)(tokens), _made(decay)(tokens))


def test_a_learned_one_acts_as_a_fixed_one_of_its_value():
  """In training, and with rows read on in pieces, where the rows' lengths count."""
  model = _made(LEARNED)
  half_life = _learned(model)
  assert abs(half_life - 9.0) > 0.3
  fixed = _made(dataclasses.replace(TTT, half_life=half_life))
  rows = random_rows(2, 32)
  assert relative_error(_loss(model, *rows), _loss(fixed, *rows)) < 1e-6
  assert relative_error(_loss(model, *rows), _loss(_made(TTT), *rows)) > 1e-5
  tokens = rows[0][:, :30]
  read, expected = (read_losses(Reader.of(m), tokens) for m in (model, fixed))
  assert relative_error(read, expected) < 1e-6
  assert float(model(tokens[:, :28], return_stats=True)[1].decay[0]) == pytest.approx(
    0.5 ** (4 / half_life)
  )


def test_its_gradient():
  """Against a difference of losses in float64, and the same on eight devices."""
  rows = random_rows(2, 32)
  model = _made(LEARNED)
  start = next(x for name, x in named_leaves(model).items() if "log_half_life" in name)

  def loss(s, model, rows):
    leaves = {
      name: s if "log_half_life" in name else x.astype(s.dtype)
      for name, x in named_leaves(model).items()
    }
    return _loss(jax.tree.unflatten(jax.tree.structure(model), list(leaves.values())), *rows)

  with jax.enable_x64(True):
    exact = random_model(dataclasses.replace(MODEL, **_FLOAT64), ttt=LEARNED)
    exact = jax.tree.unflatten(jax.tree.structure(exact), jax.tree.leaves(model))
    s = start.astype(jnp.float64)
    of = jax.jit(lambda s: loss(s, exact, rows))
    expected = float((of(s + 1e-4) - of(s - 1e-4)) / 2e-4)
    assert float(jax.grad(of)(s).reshape(())) == pytest.approx(expected, rel=1e-4)
  mesh = mesh_of(1, 8)
  placed = [jax.device_put(x, sharding(mesh, "batch", "sequence")) for x in rows]
  with jax.set_mesh(mesh):
    where = jax.device_put(model, sharding(mesh))
    actual = jax.jit(jax.grad(loss))(start, where, placed)
  assert float(actual.reshape(())) == pytest.approx(expected, rel=1e-2)
