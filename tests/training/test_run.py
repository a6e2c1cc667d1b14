"""Tests a whole run: its checks before the first step, and its memory after the last."""

import dataclasses
import gc
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, TTT, random_model
from rich.console import Console

from ttt_jax.config import (
  CheckpointConfig,
  Config,
  DataConfig,
  EvalConfig,
  TrainConfig,
)
from ttt_jax.data import Corpus
from ttt_jax.errors import UnsupportedError
from ttt_jax.evaluation import heldout as evaluation
from ttt_jax.generation.decoder import Reader
from ttt_jax.progress import TrainingProgress
from ttt_jax.training import run
from ttt_jax.training.loop import Clock
from ttt_jax.training.run import run_evaluation, run_training
from ttt_jax.training.rundir import load_metrics

pytestmark = pytest.mark.usefixtures("standard_promotion")

QUIET = Console(quiet=True)


@pytest.fixture
def config(tmp_path):
  """Makes a corpus of documents of 90 bytes."""
  rng = np.random.default_rng(0)
  (tmp_path / "text").mkdir()
  for i in range(8):
    (tmp_path / "text" / f"{i}.txt").write_bytes(rng.integers(97, 120, 90, np.uint8).tobytes())
  return Config(
    run_dir=str(tmp_path / "run"),
    model=dataclasses.replace(MODEL, vocab_size=264, num_layers=2, tie_embeddings=False),
    ttt=dataclasses.replace(TTT, layers=(0,)),
    data=DataConfig(path=str(tmp_path / "text"), seq_len=32, heldout_fraction=0.3),
    train=TrainConfig(steps=2, batch_size=2, warmup_steps=1, log_every=1),
    checkpoint=CheckpointConfig(every=5),
    eval=EvalConfig(documents=2, buckets=2, prompt_tokens=8, sample_tokens=3),
  )


def with_fields(config, **sections):
  """Returns the config with fields of sections replaced."""
  changed = {
    name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()
  }
  return dataclasses.replace(config, **changed)


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    ({"eval": {"seq_len": 96}}, r"eval\.seq_len=96 is longer than each of the .* 90 tokens"),
    ({"train": {"profile": (2, 3)}}, r"train\.profile=\[2, 3\] ends after the last step"),
    ({"train": {"writers": ("tensorboard",)}}, r"pip install 'ttt_jax\[tensorboard\]'"),
  ],
)
def test_what_would_fail_after_training_is_asked_before(
  config, tmp_path, monkeypatch, sections, message
):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ValueError, match=message):
    run_training(with_fields(config, **sections), QUIET)
  assert not (tmp_path / "run").exists()


def test_a_resumed_run_that_is_refused_keeps_its_config(config, tmp_path):
  assert run_training(config, QUIET) is not None
  recorded = (tmp_path / "run" / "config.yaml").read_bytes()
  with pytest.raises(ValueError, match=r"eval\.seq_len=96"):
    run_training(with_fields(config, eval={"seq_len": 96}, train={"steps": 4}), QUIET)
  assert (tmp_path / "run" / "config.yaml").read_bytes() == recorded


def test_longer_documents_are_traced_before(config, monkeypatch):
  """A length is refused if only its evaluation is impossible, for instance in a kernel of fixed blocks."""
  losses = evaluation.model_losses

  def refuse(model, tokens, *args, **kwargs):
    if tokens.shape[1] == 64:
      raise NotImplementedError("not in rows of 64")
    return losses(model, tokens, *args, **kwargs)

  monkeypatch.setattr(evaluation, "model_losses", refuse)
  monkeypatch.setattr(run, "train", lambda *args, **kwargs: pytest.fail("was trained"))
  with pytest.raises(NotImplementedError, match="not in rows of 64"):
    run_training(with_fields(config, eval={"seq_len": 64}), QUIET)


@pytest.mark.parametrize("refused", ["model, updates on", "model, updates off", "twin"])
def test_a_model_that_cannot_be_evaluated_is_not_trained(config, tmp_path, refused, monkeypatch):
  """The model with its updates on and off and the twin are traced, each before the first step."""
  jax.clear_caches()  # another test may have traced them
  losses, traced = evaluation.model_losses, []

  def refuse(model, tokens, *args, update, **kwargs):
    name = f"model, updates {'on' if update else 'off'}" if model.ttt.layers else "twin"
    traced.append(name)
    if name == refused:
      raise UnsupportedError(f"no {name}")
    return losses(model, tokens, *args, update=update, **kwargs)

  monkeypatch.setattr(evaluation, "model_losses", refuse)
  monkeypatch.setattr(run, "train", lambda *args, **kwargs: pytest.fail("was trained"))
  with pytest.raises(UnsupportedError, match=f"no {refused}"):
    run_training(with_fields(config, eval={"baseline": True}), QUIET)
  assert traced[-1] == refused
  assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_written_to(config, monkeypatch):
  def refuse(**_):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  with pytest.raises(ValueError, match=r"run_dir=.* cannot be written to: Permission denied"):
    run_training(config, QUIET)


def test_tokens_that_only_the_model_has_are_no_text():
  """The sample is drawn from all of a padded vocabulary."""
  assert evaluation._text(Corpus(()), np.array([97, 260, 98])) == "a\ufffdb"
  assert evaluation._text(Corpus(()), np.array([], np.int32)) == ""


def test_every_bucket_holds_a_loss(config):
  with pytest.raises(ValueError, match=r"eval\.buckets=32 is more than the 31 losses"):
    with_fields(config, eval={"buckets": 32})


def live_bytes():
  return sum(x.nbytes for x in jax.live_arrays())


def test_one_model_and_no_optimizer_in_memory_after_training(config, monkeypatch):
  """Counts arrays in all evaluations, during the sample, and when the twin begins to train."""
  gc.collect()
  before, seen = live_bytes(), []
  abstract = jax.eval_shape(lambda: random_model(config.model, config.attention, config.ttt))
  model = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))

  def look(module, name):
    function = getattr(module, name)

    def looking(*args, **kwargs):
      seen.append((name, (live_bytes() - before) / model))
      return function(*args, **kwargs)

    monkeypatch.setattr(module, name, looking)

  look(run, "train")
  look(evaluation, "losses_by_token")
  look(evaluation, "continue_row")
  asked = with_fields(config, eval={"baseline": True, "before": True})
  summary = run_training(asked, QUIET)
  assert [name for name, _ in seen] == [
    *("train", "train"),
    *("losses_by_token", "losses_by_token", "continue_row"),
    *("losses_by_token", "losses_by_token", "losses_by_token"),
  ]
  held = [round(share, 1) for _, share in seen]
  assert held[:2] == [0, 0]
  assert all(share <= 1.0 for share in held[2:]), seen
  again = run_evaluation(asked, console=QUIET)
  assert again["heldout_by_position"] == summary["heldout_by_position"]
  assert again["sample"] == summary["sample"]
  assert (
    summary["heldout_loss_baseline"] != summary["heldout_loss"] != summary["heldout_loss_before"]
  )


def test_models_that_stay_the_callers(config):
  """`evaluate` also takes models themselves, and leaves them as they are."""
  corpus = run.load_data(config)
  model = random_model(config.model, config.attention, config.ttt)
  mesh = run.make_mesh(config.mesh)
  given = evaluation.evaluate(config, model, None, model, corpus, mesh)
  assert given["heldout_loss_before"] == given["heldout_loss"]
  copied = jax.tree.map(jnp.copy, model)
  assert evaluation.evaluate(config, [copied].pop, None, None, corpus, mesh) == given | {
    name: None for name in given if "before" in name
  } | {
    "heldout_by_position": [
      part | {name: None for name in part if "before" in name}
      for part in given["heldout_by_position"]
    ]
  }
  assert Reader.of(model).fingerprint() == Reader.of(jax.tree.map(jnp.copy, model)).fingerprint()


def test_heldout_loss_during_training(config, tmp_path, monkeypatch):
  """Evaluated steps are always logged, also after a stop; the last loss equals the summary's."""
  asked = with_fields(
    config,
    train={"steps": 6, "log_every": 5},
    eval={"every": 2, "baseline": True},
    checkpoint={"every": 3},
  )
  summary = run_training(asked, QUIET)
  whole, twin = (load_metrics(tmp_path / "run" / d / "metrics.jsonl") for d in (".", "baseline"))
  for records, name in ((whole, "heldout_loss"), (twin, "heldout_loss_baseline")):
    assert [(r["step"], "heldout_loss" in r) for r in records] == [
      *((2, True), (4, True), (5, False), (6, True))
    ]
    assert records[-1]["heldout_loss"] == pytest.approx(summary[name], rel=1e-5)
    assert len({r.get("heldout_loss") for r in records}) == 4

  update = TrainingProgress.show

  def die(self, done, record):
    update(self, done, record)
    if done == 4:
      raise RuntimeError("power failure")

  other = dataclasses.replace(asked, run_dir=str(tmp_path / "other"))
  with monkeypatch.context() as patch:
    patch.setattr(TrainingProgress, "show", die)
    with pytest.raises(RuntimeError, match="power failure"):
      run_training(other, QUIET)
  run_training(other, QUIET)
  again = load_metrics(tmp_path / "other" / "metrics.jsonl")
  assert [r.get("heldout_loss") for r in again] == [r.get("heldout_loss") for r in whole]
  assert [r["tokens"] for r in again] == [r["tokens"] for r in whole]


def test_time_of_an_evaluation_is_no_training_time(config, monkeypatch):
  seconds = iter([10.0, 12.0, 20.0, 21.0])
  monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
  clock = Clock(config, 1)
  clock.lap(0)
  assert clock.lap(8)["tokens_per_second"] == 4
  clock.restart()
  assert clock.lap(11)["tokens_per_second"] == 3
