"""Tests that sums of least squares which do not fit a device are refused before anything is compiled."""

import dataclasses

import pytest
from helpers import mesh_of

import ttt_jax
from ttt_jax.config import Config, ModelConfig, TrainConfig, TTTConfig
from ttt_jax.training.run import _check_memory

CONFIG = Config(
  model=ModelConfig(d_model=64, d_ff=1000),
  ttt=TTTConfig(layers=(1,), rule="least_squares"),
  train=TrainConfig(batch_size=8, accumulate=2),
)


def test_sums_that_do_not_fit():
  """Two devices have two rows of a microbatch each, each row `1000 (2000 + 64) 4` bytes."""
  needed = 2 * 1000 * 2064 * 4
  mesh = mesh_of(2, 1)
  _check_memory(CONFIG, mesh, needed)
  _check_memory(CONFIG, mesh, None)
  with pytest.raises(ttt_jax.UserError, match=r"2 rows with keys of 1000 .* ttt\.key_rank"):
    _check_memory(CONFIG, mesh, needed - 1)
  smaller = dataclasses.replace(CONFIG, ttt=dataclasses.replace(CONFIG.ttt, key_rank=900))
  _check_memory(smaller, mesh, needed - 1)
  _check_memory(Config(ttt=TTTConfig(layers=(1,))), mesh, 1)
