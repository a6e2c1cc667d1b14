"""Draws: their frequencies, and what is never drawn."""

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.generation.sampling import sample

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 0.0, 1.9], np.float32)
ROWS = 20000


def frequencies(*, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0):
  logits = jnp.broadcast_to(jnp.asarray(LOGITS), (ROWS, 6))
  position = jnp.zeros(ROWS, jnp.int32)
  how = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
  drawn = sample(logits, jnp.int32(seed), position, jnp.float32(temperature), **how)
  return np.bincount(np.asarray(drawn), minlength=6) / ROWS


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies(temperature):
  expected = softmax(LOGITS / temperature)
  np.testing.assert_allclose(frequencies(temperature=temperature), expected, atol=0.015)


def test_temperature_0_takes_the_likeliest():
  assert frequencies(temperature=0.0)[1] == 1


def test_top_k():
  kept = np.where(np.isin(np.arange(6), [1, 5, 3]), softmax(LOGITS), 0)
  np.testing.assert_allclose(frequencies(top_k=3), kept / kept.sum(), atol=0.015)
  assert frequencies(top_k=1)[1] == 1


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
  p = softmax(LOGITS)
  two = p[1] + p[5]
  for top_p, kept in ((two - 1e-3, [1, 5]), (two + 1e-3, [1, 5, 3]), (1e-6, [1])):
    expected = np.where(np.isin(np.arange(6), kept), p, 0)
    np.testing.assert_allclose(
      frequencies(top_p=float(top_p)), expected / expected.sum(), atol=0.015
    )


@pytest.mark.parametrize(
  ("how", "kept"),
  [
    ({"min_p": 0.0}, [0, 1, 2, 3, 4, 5]),
    ({"min_p": 0.12}, [0, 1, 3, 4, 5]),
    ({"min_p": 0.3}, [1, 3, 5]),
    ({"min_p": 1.0}, [1]),
    ({"min_p": 0.3, "top_k": 2}, [1, 5]),
    ({"min_p": 0.3, "temperature": 3.0}, [0, 1, 2, 3, 4, 5]),  # flatter, so all are likely enough
    ({"min_p": 0.2, "top_p": 0.5}, [1, 5]),
  ],
)
def test_min_p(how, kept):
  p = softmax(LOGITS / how.get("temperature", 1.0))
  if set(how) <= {"min_p", "temperature"}:
    assert np.flatnonzero(p >= how["min_p"] * p.max()).tolist() == kept
  expected = np.where(np.isin(np.arange(6), kept), p, 0)
  np.testing.assert_allclose(frequencies(**how), expected / expected.sum(), atol=0.015)


def test_rows_have_a_threshold_each():
  logits = jnp.tile(jnp.array([[0.0, -1.0, -5.0], [9.0, 4.0, 8.0]]), (200, 1))
  how = {"top_k": None, "top_p": None, "min_p": 0.2}
  drawn = sample(logits, jnp.int32(0), jnp.zeros(400, jnp.int32), jnp.float32(1.0), **how)
  drawn = np.asarray(drawn).reshape(200, 2)
  assert [set(column.tolist()) for column in drawn.T] == [{0, 1}, {0, 2}]


def test_draws_depend_on_seed_row_and_position():
  logits = jnp.zeros((64, 50))

  def draw(seed, position):
    positions = jnp.full(64, position, jnp.int32)
    how = {"top_k": None, "top_p": None}
    return np.asarray(sample(logits, jnp.int32(seed), positions, jnp.float32(1.0), **how))

  first = draw(0, 0)
  assert len(set(first.tolist())) > 20
  assert np.array_equal(first, draw(0, 0))
  assert np.mean(first == draw(1, 0)) < 0.2
  assert np.mean(first == draw(0, 1)) < 0.2
