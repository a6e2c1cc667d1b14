"""Held-out loss by position and the sample of text."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import MESHES, MODEL, mesh_of, random_model, random_rows, relative_error

from ttt_jax.config import Config, DataConfig, EvalConfig
from ttt_jax.evaluation.heldout import (
  by_position,
  continue_row,
  heldout_by_position,
  losses_by_token,
  mean_of_buckets,
)


def _rows(count=3, length=32):
  return random_rows(count, length)[0]


def test_by_position_covers_the_document_in_equal_parts():
  losses = np.arange(2 * 31, dtype=np.float32).reshape(2, 31)
  parts = by_position(losses, 8)
  assert [low for low, _, _ in parts] + [31] == [0] + [high for _, high, _ in parts]
  assert {high - low for low, high, _ in parts} <= {3, 4}
  for low, high, loss in parts:
    assert loss == pytest.approx(losses[:, low:high].mean())


@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_the_logits(mesh):
  """Three rows on a mesh with two places for rows: the filled-up last batch adds nothing."""
  model, rows = random_model(), _rows()
  logits = np.asarray(jax.jit(lambda m: m(rows))(model), np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  picked = np.take_along_axis(logits[:, :-1], rows[:, 1:, None], -1)[..., 0]
  losses = losses_by_token(model, rows, mesh_of(*MESHES[mesh]))
  assert losses.shape == (3, 31)
  assert relative_error(losses, log_z[:, :-1] - picked) < 1e-5


def test_table_has_the_three_ways_of_reading():
  config = Config(
    model=MODEL, data=DataConfig(seq_len=32), eval=EvalConfig(buckets=4, prompt_tokens=8)
  )
  model, twin, rows, mesh = random_model(), random_model(seed=5), _rows(), mesh_of(1, 1)
  alone = heldout_by_position(config, model, None, rows, mesh)
  assert [row["loss_baseline"] for row in alone] == [None] * 4
  assert mean_of_buckets(alone, "loss_baseline") is None
  table = heldout_by_position(config, model, twin, rows, mesh)
  # A chunk of 4 tokens: in the first of 4 parts, 7 of 8 tokens are read by an updated weight or none.
  assert all(row["loss"] != row["loss_updates_off"] for row in table)
  assert all(row["loss_baseline"] != row["loss"] for row in table)
  before = heldout_by_position(config, twin, None, rows, mesh, before=model)
  for old, new in zip(alone, before):
    assert (new["loss_before"], new["loss_before_updates_off"]) == (
      old["loss"],
      old["loss_updates_off"],
    )
    assert old["loss_before"] is None
  losses = losses_by_token(model, rows, mesh)
  assert mean_of_buckets(table, "loss") == pytest.approx(losses.mean(), rel=1e-5)


def test_greedy_continuation_is_the_argmax_of_the_whole_row():
  model, prompt = random_model(), _rows(1, 9)[0]
  new = continue_row(model, prompt, new_tokens=7, temperature=0.0, seed=0)
  row = np.concatenate([prompt, new])[None]
  logits = np.asarray(jax.jit(lambda m: m(row))(model))[0]
  assert np.array_equal(logits[8:-1].argmax(-1), new)


def test_sampling_follows_the_seed():
  model, prompt = random_model(), _rows(1, 9)[0]

  def draw(seed):
    return continue_row(model, prompt, new_tokens=7, temperature=1.0, seed=seed).tolist()

  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


def test_eval_length_is_checked_like_the_training_length():
  config = Config(data=DataConfig(seq_len=1024), ttt=dataclasses.replace(Config().ttt, layers=(0,)))
  with pytest.raises(ValueError, match=r"eval\.seq_len=700 is not a multiple of .* 512"):
    dataclasses.replace(config, eval=EvalConfig(seq_len=700))
