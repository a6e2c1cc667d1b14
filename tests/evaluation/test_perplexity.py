"""Losses read in pieces against one pass over the row, what is compared, what is kept."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import MODEL, TTT, mesh_of, random_model, random_rows, relative_error

from ttt_jax.config import TTTConfig
from ttt_jax.evaluation import perplexity
from ttt_jax.evaluation.paired import bootstrap
from ttt_jax.evaluation.perplexity import (
  PerplexityConfig,
  evaluate_perplexity,
  read_losses,
  settings,
  tokens_to_read,
)
from ttt_jax.evaluation.plots import plot_perplexity
from ttt_jax.evaluation.result_file import ResultFile
from ttt_jax.generation import pieces
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import model_losses
from ttt_jax.parallel.parameters import shardings

LEARNS = dataclasses.replace(TTT, inner_lr=3.0)  # so that updates change the losses
CONFIG = PerplexityConfig(lengths=(24, 9), block=5, documents=3, buckets=4)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
  monkeypatch.setattr(pieces, "_PIECE", 8)


@pytest.fixture(scope="module")
def model():
  return random_model(dataclasses.replace(MODEL, vocab_size=18), ttt=LEARNS)  # splits over tensor


@pytest.fixture(scope="module")
def reader(model):
  return Reader.of(model)


def _rows(count=3, length=29):
  return random_rows(count, length)[0]


def _at_once(model, rows, *, update=True):
  """The losses of one pass over the rows, filled up to whole chunks."""
  width = rows.shape[1] + -rows.shape[1] % LEARNS.chunk_size
  labels = np.full((len(rows), width), IGNORE, np.int32)
  labels[:, : rows.shape[1] - 1] = rows[:, 1:]
  tokens = np.zeros_like(labels)
  tokens[:, : rows.shape[1]] = rows
  losses = jax.jit(lambda m: model_losses(m, tokens, labels, update=update)[0])(model)
  return np.asarray(losses)[:, : rows.shape[1] - 1]


@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize(
  "mesh", [None, {"data": 2, "context": 4}, {"data": 1, "context": 2, "fsdp": 2, "tensor": 2}]
)
def test_pieces_give_the_losses_of_one_pass(model, mesh, update):
  """Three rows, which a mesh with two places for rows fills up; 29 tokens, a last chunk of one."""
  rows = _rows()
  here = model
  if mesh is not None:
    here = jax.device_put(model, shardings(model, mesh_of(**mesh)))
  losses = read_losses(Reader.of(here), rows, update=update)
  assert losses.shape == (3, 28)
  assert relative_error(losses, _at_once(model, rows, update=update)) < 1e-5


@pytest.mark.parametrize("start", [0, 7, 8, 23, 27])
def test_losses_from_a_token_on(reader, start):
  rows = _rows()
  whole = read_losses(reader, rows)
  # Programs of other shapes may add in another order.
  np.testing.assert_allclose(read_losses(reader, rows, start=start), whole[:, start:], rtol=1e-6)


def test_fast_weights_that_start_again(reader):
  rows = _rows()
  updating, frozen = read_losses(reader, rows), read_losses(reader, rows, update=False)
  assert relative_error(updating, frozen) > 1e-3
  # Never: as if there were no such thing. At every chunk's end: nothing learned is ever read.
  np.testing.assert_allclose(read_losses(reader, rows, reset_every=32), updating, rtol=1e-6)
  np.testing.assert_allclose(read_losses(reader, rows, reset_every=4), frozen, rtol=1e-5, atol=1e-6)
  some = read_losses(reader, rows, reset_every=12)
  np.testing.assert_allclose(some[:, :12], updating[:, :12], rtol=1e-6)
  np.testing.assert_allclose(some[:, 12:16], _after(reader, rows, 12, 16), rtol=1e-5)
  assert relative_error(some[:, 16:24], updating[:, 16:24]) > 1e-3
  assert relative_error(some[:, 16:24], frozen[:, 16:24]) > 1e-3


def _after(reader, rows, first, stop):
  """The losses of tokens first to stop - 1 after `first` were read with what they taught dropped."""
  state = generate(reader, rows[:, :first], max_new_tokens=0).state
  layers = tuple(
    layer._replace(fast=jax.tree.map(lambda x: 0 * x, layer.fast)) for layer in state.cache.layers
  )
  state = dataclasses.replace(state, cache=state.cache._replace(layers=layers))
  losses = []
  for t in range(first, stop):
    state = generate(reader, rows[:, t : t + 1], max_new_tokens=0, state=state).state
    logits = np.asarray(state.logits, np.float64)
    picked = np.take_along_axis(logits, rows[:, t + 1 : t + 2], axis=1)[:, 0]
    losses.append(np.log(np.exp(logits).sum(axis=1)) - picked)
  return np.stack(losses, axis=1)


def test_the_block_is_the_same_and_the_context_before_it_grows(model, reader, tmp_path):
  rows = _rows()
  heard = []
  config = dataclasses.replace(CONFIG, reset_every=(8,))
  cells = ResultFile(tmp_path / "cells", settings(reader, rows, config))
  report = evaluate_perplexity(reader, rows, config, cells, on_read=heard.append)
  assert sum(heard) == tokens_to_read(reader, 3, config) == 3 * 3 * (29 + 14)
  assert report["modes"] == ["updating", "frozen", "reset 8"]
  by = {(row["context"], row["mode"]): row for row in report["by_context"]}
  assert len(by) == len(report["by_context"]) == 6
  for context in (9, 24):
    each = {
      mode: _at_once(model, rows[:, 24 - context :], update=mode == "updating")[:, -5:].mean(axis=1)
      for mode in ("updating", "frozen")
    }
    for mode, losses in each.items():
      row = by[context, mode]
      assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5)
      assert row["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-5)
      assert row["low"] < row["loss"] < row["high"]
    gain = each["frozen"] - each["updating"]
    assert by[context, "updating"]["gain"] == pytest.approx(gain.mean(), abs=1e-6)
    assert "gain" not in by[context, "frozen"]
  whole = _at_once(model, rows)
  assert [row["from"] for row in report["by_position"]] == [0, 7, 14, 21]
  for row in report["by_position"]:
    expected = whole[:, row["from"] : row["to"]].mean()
    assert row["updating"]["loss"] == pytest.approx(expected, rel=1e-5)
  plot_perplexity(report, tmp_path / "perplexity.png")
  assert (tmp_path / "perplexity.png").stat().st_size > 10_000


def test_a_model_without_fast_weights_is_read_one_way(tmp_path):
  reader = Reader.of(random_model(ttt=TTTConfig()))
  rows = _rows()
  cells = ResultFile(tmp_path / "cells", settings(reader, rows, CONFIG))
  report = evaluate_perplexity(reader, rows, CONFIG, cells)
  assert report["modes"] == ["plain"]
  assert all("gain" not in row for row in report["by_context"])


def test_interrupted_it_goes_on_and_counts_nothing_twice(reader, tmp_path, monkeypatch):
  rows, path = _rows(), tmp_path / "cells"
  whole = evaluate_perplexity(
    reader, rows, CONFIG, ResultFile(tmp_path / "other", settings(reader, rows, CONFIG))
  )
  reads = []

  def read(reader, rows, **how):
    if len(reads) == 5:
      raise KeyboardInterrupt
    reads.append(rows)
    return read_losses(reader, rows, **how)

  monkeypatch.setattr(perplexity, "read_losses", read)
  with pytest.raises(KeyboardInterrupt):
    evaluate_perplexity(reader, rows, CONFIG, ResultFile(path, settings(reader, rows, CONFIG)))
  with path.open("a") as file:
    file.write('{"key": ["updating", 9, 2], "resu')  # killed while it wrote
  del reads[:]
  cells = ResultFile(path, settings(reader, rows, CONFIG))
  assert len(cells) == 5
  monkeypatch.setattr(perplexity, "read_losses", read_losses)
  assert evaluate_perplexity(reader, rows, CONFIG, cells) == whole
  keys = [json.loads(line).get("key") for line in path.read_text().splitlines()[1:]]
  assert len(keys) == len({json.dumps(key) for key in keys}) == 12


def test_results_of_other_settings_are_refused_and_kept(reader, tmp_path):
  rows, path = _rows(), tmp_path / "cells"
  ResultFile(path, settings(reader, rows, CONFIG)).add(("frozen", 9, 0), {"block": 1.5})
  before = path.read_text()
  other = settings(reader, _rows(length=30), CONFIG)
  with pytest.raises(ValueError, match=r"other settings: documents was .*--out"):
    ResultFile(path, other)
  assert path.read_text() == before
  (tmp_path / "text").write_text("hello\nworld\n")
  with pytest.raises(ValueError, match="no file of results"):
    ResultFile(tmp_path / "text", other)
  with pytest.raises(ValueError, match="has a result for"):
    ResultFile(path, settings(reader, rows, CONFIG)).add(("frozen", 9, 0), {"block": 2.5})


def test_intervals_hold_the_mean_as_often_as_they_say():
  rng = np.random.default_rng(0)
  held = [
    low < 3.0 < high
    for low, high in (bootstrap(rng.normal(3.0, 1.0, 40), seed=i) for i in range(150))
  ]
  assert 0.87 < np.mean(held) < 0.99
  assert bootstrap(np.array([2.0]), seed=0) == (None, None)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"block": 0}, "block=0"),
    ({"lengths": ()}, r"lengths=\[\]"),
    ({"lengths": (8, 8)}, r"lengths=\[8, 8\]"),
    ({"reset_every": (-4,)}, r"reset_every=\[-4\]"),
  ],
)
def test_mistakes(change, message):
  with pytest.raises(ValueError, match=message):
    PerplexityConfig(**change)


def test_a_reset_within_a_chunk_is_refused(reader):
  config = dataclasses.replace(CONFIG, reset_every=(6,))
  with pytest.raises(ValueError, match=r"reset_every=6 .* ttt.chunk_size=4"):
    tokens_to_read(reader, 3, config)
