"""Compares with the published code and `transformers`: logits, loss and every gradient.

`tests/golden/model` holds its checkpoints and float64 results. Gradients are compared under the names of
the checkpoint, through the same table that loads the weights.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error

from ttt_jax import load_pretrained, save_pretrained
from ttt_jax.checkpoints.files import open_tensors
from ttt_jax.checkpoints.tensors import named_parameters, tensor_table

CASES = sorted((Path(__file__).parent.parent / "golden" / "model").iterdir())
NAMES = [case.name for case in CASES]


def _load(case, **options):
  if case.name == "llama_c":  # its config names a layer that does not exist
    with pytest.warns(UserWarning, match=r"names \[5\], beyond num_hidden_layers=3: ignored"):
      return load_pretrained(case / "checkpoint", **options)
  return load_pretrained(case / "checkpoint", **options)


@cache
def _program():
  def loss(model, tokens, labels):
    logits = model(tokens)
    targets, counted = labels[:, 1:], labels[:, 1:] >= 0
    chosen = jnp.take_along_axis(logits[:, :-1], jnp.where(counted, targets, 0)[..., None], -1)
    losses = jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen[..., 0]
    return jnp.sum(losses, where=counted) / jnp.sum(counted).astype(losses.dtype), logits

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _compare(case, dtype, logits_tolerance, loss_tolerance, gradient_tolerance):
  model = _load(case, dtype=dtype)
  model.model = dataclasses.replace(model.model, remat="none")  # half the time to compile
  golden = np.load(case / "forward.npz")
  tokens, labels = (golden[name].astype(np.int32) for name in ("input_ids", "labels"))
  (loss, logits), gradients = _program()(model, tokens, labels)
  assert relative_error(logits, golden["logits_f64"]) < logits_tolerance
  assert abs(float(loss) - float(golden["loss_f64"])) < loss_tolerance

  expected = np.load(case / "grads.npz")
  rows = tensor_table(model)
  assert {row.name for row in rows} == set(expected)
  gradients = named_parameters(gradients)
  for row in rows:
    value = gradients[row.parameter]
    actual = np.asarray(row.to_tensor(value if row.repeat is None else value[row.repeat]))
    assert relative_error(actual, expected[row.name]) < gradient_tolerance, row.name


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_published_numbers(case):
  _compare(case, "float32", 2e-5, 2e-5, 1e-4)


@pytest.mark.parametrize("name", ["llama_b"])
def test_published_numbers_in_float64(name):
  """Rotary angles are float32 on both sides and gradients are stored so: the bounds are theirs."""
  with jax.enable_x64(True):
    _compare(CASES[NAMES.index(name)], "float64", 1e-6, 1e-6, 1e-5)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_written_again_it_is_the_same_checkpoint(case, tmp_path):
  """Tensor by tensor, bit by bit, in the dtype it was stored in; and it says the same of the model."""
  model = _load(case)
  save_pretrained(model, tmp_path / "again")
  before, after = open_tensors(case / "checkpoint"), open_tensors(tmp_path / "again")
  assert set(before) == set(after)
  for name, stored in before.items():
    assert after[name].dtype == stored.dtype
    assert np.array_equal(_bits(after[name].read()), _bits(stored.read())), name

  config, written = (
    json.loads((path / "config.json").read_text())
    for path in (case / "checkpoint", tmp_path / "again")
  )
  for key, value in config.items():
    if key.startswith("ttt_"):
      assert written[key] == ([0, 1] if (case.name, key) == ("llama_c", "ttt_layers") else value)
    elif key in written and key not in ("max_window_layers", "layer_types"):
      assert written[key] == value, key
  again = load_pretrained(tmp_path / "again")
  assert (again.model, again.attention, again.ttt) == (model.model, model.attention, model.ttt)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model)):
    assert np.array_equal(_bits(np.asarray(a)), _bits(np.asarray(b)))


def _bits(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def test_all_cases_are_here():
  assert len(CASES) == 10
