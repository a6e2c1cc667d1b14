"""Tests `data.attend`: attention starts again within a row, on every mesh, after a stop, and in a plan."""

import dataclasses
from itertools import islice

import jax
import numpy as np
import pytest
from helpers import MODEL, TTT, mesh_of

from ttt_jax.config import (
  AttendBlocks,
  AttentionConfig,
  CheckpointConfig,
  Config,
  DataConfig,
  TrainConfig,
)
from ttt_jax.config.yaml import dump_config, load_config
from ttt_jax.data import Corpus, Document, InMemory, Source, training_rows
from ttt_jax.extras.plan.programs import trace_training
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import model_losses
from ttt_jax.training.loop import train
from ttt_jax.training.run import check_ready
from ttt_jax.training.rundir import load_metrics
from ttt_jax.training.step import init_state, jit_train_step, put_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")

CONFIG = Config(
  model=dataclasses.replace(MODEL, vocab_size=256, num_layers=3),
  attention=AttentionConfig(window=5, full_layers=(1,)),
  ttt=dataclasses.replace(TTT, layers=(0, 2)),
  data=DataConfig(seq_len=64, attend=AttendBlocks((8, 20)), attend_fraction=0.7),
  train=TrainConfig(steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-2, log_every=1),
  checkpoint=CheckpointConfig(every=3, keep=2),
)


def corpus() -> Corpus:
  rng = np.random.default_rng(0)
  documents = [
    Document(f"{i}.txt", rng.integers(97, 110, n).astype(np.uint8))
    for i, n in enumerate([200, 64, 31, 40, 12, 300, 64, 64])
  ]
  return Corpus((Source("made up", InMemory(documents[:6]), InMemory(documents[6:])),))


def batches(count, **attend):
  rows = training_rows(corpus().sources, seq_len=64, batch_size=4, seed=0, **attend)
  taken = list(islice(rows, count))
  rows.close()
  return taken


ATTEND = {"attend": AttendBlocks((8, 20)), "attend_fraction": 0.7, "chunk_size": 4}


def test_attention_is_cut_and_fast_weights_are_not():
  """A token before a cut changes what comes after it through the fast weights alone."""
  model = init_state(CONFIG, mesh_of(1, 1)).model
  tokens = np.random.default_rng(0).integers(0, 256, (1, 32)).astype(np.int32)
  labels = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
  documents = np.ones_like(tokens)
  blocks = np.repeat([[1, 2]], 16, axis=1)

  def after_cut(first, update):
    changed = tokens.copy()
    changed[0, :4] = first
    losses = model_losses(model, changed, labels, documents, blocks, update=update)[0]
    return np.asarray(losses)[0, 16:]

  np.testing.assert_array_equal(after_cut(3, False), after_cut(9, False))
  assert np.abs(after_cut(3, True) - after_cut(9, True)).max() > 1e-6


@pytest.mark.parametrize(
  ("mesh", "rule"),
  [
    ({"data": 1, "context": 8}, "sum"),
    ({"data": 2, "context": 2, "tensor": 2}, "least_squares"),
    ({"data": 1, "context": 4, "fsdp": 2}, "sum"),
  ],
  ids=str,
)
def test_every_mesh_trains_alike(mesh, rule):
  ttt = dataclasses.replace(CONFIG.ttt, rule=rule, inner_lr=type(CONFIG.ttt).inner_lr)
  config = dataclasses.replace(CONFIG, ttt=ttt)

  def trained(mesh):
    step, state, losses = jit_train_step(config, mesh), init_state(config, mesh), []
    with jax.set_mesh(mesh):
      for batch in batches(3, **ATTEND):
        state, metrics = step(state, put_batch(batch, mesh))
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return losses

  one = trained(mesh_of(1, 1))
  np.testing.assert_allclose(trained(mesh_of(**mesh)), one, rtol=2e-4)


def test_stopped_and_resumed(tmp_path):
  """Six steps at once, and three and three, are the same steps."""
  whole = train(CONFIG, corpus(), mesh_of(2, 2), tmp_path / "whole")
  half = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=3))
  cosine = {"learning_rate", "update_norm", "tokens_per_second", "mfu", "waiting_for_data"}
  train(half, corpus(), mesh_of(2, 2), tmp_path / "parts")
  train(CONFIG, corpus(), mesh_of(2, 2), tmp_path / "parts")
  assert whole.finished
  records = [load_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
  for a, b in zip(*records, strict=True):
    assert a["tokens"] == b["tokens"]
  first = [{k: v for k, v in record[0].items() if k not in cosine} for record in records]
  assert first[0] == first[1]


def test_a_plan_has_the_blocks():
  program = trace_training(CONFIG, mesh_of(1, 1)).program
  plain = trace_training(
    dataclasses.replace(CONFIG, data=DataConfig(seq_len=64)), mesh_of(1, 1)
  ).program
  inputs = [len(jax.tree.leaves(traced.args_info)) for traced in (program, plain)]
  assert inputs[0] == inputs[1] + 1


def test_in_a_file_and_on_the_command_line(tmp_path):
  path = tmp_path / "a.yaml"
  path.write_text("data: {seq_len: 4096, attend: {block: [512, 1024]}, attend_fraction: 0.5}\n")
  config = load_config(path)
  assert config.data.attend == AttendBlocks((512, 1024))
  path.write_text(dump_config(config))
  assert load_config(path).data == config.data
  assert (
    load_config(path, ["--data.attend", "document", "--data.attend_fraction", "1"]).data.attend
    == "document"
  )
  words = load_config(path, ["--data.attend", "{block: [1024, 2048]}"])
  assert words.data.attend == AttendBlocks((1024, 2048))
  other = load_config(path, ["--data.attend.block", "[1024, 2048]"])
  assert other.data.attend == AttendBlocks((1024, 2048))


def test_cuts_without_fast_weights_warn():
  config = dataclasses.replace(
    CONFIG,
    ttt=dataclasses.replace(CONFIG.ttt, layers=()),
    eval=dataclasses.replace(CONFIG.eval, seq_len=64),
  )
  with pytest.warns(UserWarning, match=r"data\.attend\.block=\[8, 20\], but ttt\.layers=\[\]"):
    check_ready(config, corpus(), mesh_of(1, 1))
