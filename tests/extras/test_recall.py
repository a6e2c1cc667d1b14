"""The documents of the recall task, and what counts as remembered."""

import json
import re

import numpy as np
import pytest
from helpers import MESHES, mesh_of, random_model

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.extras.recall.task import (
  by_distance,
  distances,
  make_document,
  recalled,
  write_documents,
)


def _row(text: str) -> np.ndarray:
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def test_a_document_is_pairs_and_noise_and_a_key_keeps_its_value():
  text = make_document(4000, seed=3, index=5)
  words = [text[i : i + 2] for i in range(0, 4000, 2)]
  pairs = [word for word in words if re.fullmatch("[A-Z][a-z]", word)]
  assert all(re.fullmatch("[A-Z][a-z]|[0-9][0-9]", word) for word in words)
  assert 0.45 < len(pairs) / 2000 < 0.55
  assert len({pair[0] for pair in pairs}) == len(set(pairs)) > 20
  assert text == make_document(4000, seed=3, index=5)
  others = {make_document(4000, seed=3, index=4), make_document(4000, seed=2, index=5)}
  assert len({text, *others}) == 3
  gaps = distances(_row(text))
  assert np.sum((gaps > 0) & (gaps <= 64)) > 100
  assert np.sum(gaps > 256) > 10


def test_distances_are_to_the_last_time():
  text = "Ax12AxBb99Ax07Bb"
  expected = np.zeros(16, int)
  expected[4], expected[10], expected[14] = 4, 6, 8
  np.testing.assert_array_equal(distances(_row(text)), expected)
  with pytest.raises(ValueError, match=r"hold no pair twice.*ttt-jax data recall"):
    distances(_row("AxByCz1234"))


def test_by_distance_counts_the_values_of_keys_that_came_before():
  rows = np.stack([_row("Ax12AxBb99Ax07Bb"), _row("Cq123456789012Cq")])
  right = np.zeros((2, 15), bool)
  right[0, 4] = right[0, 14] = True
  right[:, [0, 1, 2, 3]] = True  # new keys, values and noise count nothing
  table = by_distance(right, rows, window=3, windows=2)
  assert [(row["from"], row["to"]) for row in table] == [(0, 3), (3, 6), (6, None)]
  assert [row["queries"] for row in table] == [0, 2, 2]
  assert [row["right"] for row in table] == [None, 0.5, 0.5]


@pytest.mark.parametrize("mesh", MESHES)
def test_recalled_is_the_argmax_of_the_logits(mesh):
  mesh = mesh_of(*MESHES[mesh])
  model = random_model(
    ModelConfig(vocab_size=256, num_layers=2, d_model=12, d_ff=20, num_heads=2, num_kv_heads=2),
    AttentionConfig(window=5),
    TTTConfig(layers=(1,), chunk_size=4, inner_lr=3.0),
  )
  rows = np.stack([_row(make_document(32, seed=0, index=i)) for i in range(3)])
  right = recalled(model, rows, mesh)
  guesses = np.argmax(np.asarray(model(rows)), axis=-1)
  np.testing.assert_array_equal(right, guesses[:, :-1] == rows[:, 1:])
  frozen = np.argmax(np.asarray(model(rows, update=False)), axis=-1)
  assert not np.array_equal(frozen, guesses)  # updates count
  right = recalled(model, rows, mesh, update=False)
  np.testing.assert_array_equal(right, frozen[:, :-1] == rows[:, 1:])


def test_documents_are_written_once(tmp_path):
  path = write_documents(tmp_path / "recall", documents=3, tokens=16, seed=7)
  texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
  assert texts == [make_document(16, seed=7, index=i) for i in range(3)]
  with pytest.raises(ValueError, match="is there already"):
    write_documents(tmp_path / "recall", documents=3, tokens=16, seed=8)
  with pytest.raises(ValueError, match="tokens=15 an even number"):
    write_documents(tmp_path / "other", documents=3, tokens=15, seed=8)
