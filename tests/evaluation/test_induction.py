"""The paper's Theorem 1, measured: what an update does to the logits, against what the theorem says."""

import jax
import numpy as np
import pytest

from ttt_jax.evaluation.induction import induction


def _mean_and_error(x):
  x = np.asarray(x, np.float64)
  return x.mean(axis=0), x.std(axis=0, ddof=1) / len(x) ** 0.5


@pytest.mark.parametrize("align", [0.3, 0.9])
def test_the_right_tokens_logit_rises_as_predicted_and_no_other(align):
  changes = induction(jax.random.key(0), align=align, inner_lr=0.7)
  surplus, error = _mean_and_error(changes.right - changes.predicted)
  assert np.asarray(changes.predicted).mean() == pytest.approx(0.7 * align, rel=0.02)
  assert abs(surplus) < 4 * error  # in the mean; a draw has the cross-talk of the other tokens
  assert error < 0.05 * 0.7
  others, error = _mean_and_error(changes.others)
  assert np.all(np.abs(others) < 5 * error)
  assert np.max(np.abs(others)) < 0.25 * 0.7 * align
  key, error = _mean_and_error(changes.key)
  assert abs(key) < 4 * error


def test_reconstruction_raises_the_key_and_not_what_followed_it():
  changes = induction(jax.random.key(1), align=0.9, inner_lr=0.7, look_ahead=False)
  right, error = _mean_and_error(changes.right)
  assert abs(right) < 4 * error
  assert error < 0.05
  key, _ = _mean_and_error(changes.key)
  assert key == pytest.approx(0.7 * 0.9, rel=0.1)
