"""Tests training as a whole: falling loss, counted collectives, stop and resume."""

import dataclasses
import signal
import sys
import time
from collections import Counter
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
  MESHES,
  MODEL,
  TTT,
  mesh_of,
  random_rows,
)
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from rich.console import Console

from ttt_jax.checkpoints.orbax import Checkpoints
from ttt_jax.config import AttentionConfig, CheckpointConfig, Config, DataConfig, TrainConfig
from ttt_jax.data import Corpus, Document, InMemory, Source, training_rows
from ttt_jax.extras.plan.hlo import count_collectives
from ttt_jax.ops.hardware import find_device
from ttt_jax.progress import TrainingProgress
from ttt_jax.training import loop as training
from ttt_jax.training.flops import training_flops
from ttt_jax.training.log import Profile
from ttt_jax.training.loop import Clock, metrics_record, train
from ttt_jax.training.optimizer import learning_rate
from ttt_jax.training.rundir import load_metrics
from ttt_jax.training.step import init_state, jit_train_step, put_batch

pytestmark = pytest.mark.usefixtures("standard_promotion")


CONFIG = Config(
  model=dataclasses.replace(MODEL, vocab_size=256, num_layers=2),
  attention=AttentionConfig(window=5, full_layers=(1,)),
  ttt=dataclasses.replace(TTT, layers=(0,)),
  data=DataConfig(seq_len=64),
  train=TrainConfig(steps=8, batch_size=2, warmup_steps=2, learning_rate=1e-2, log_every=1),
  checkpoint=CheckpointConfig(every=3, keep=2),
)


def _corpus() -> Corpus:
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, 4).astype(np.uint8)) for _ in range(8)]
  documents = tuple(
    Document(name=f"{i}.txt", tokens=np.frombuffer(b" ".join(rng.choice(words, 60)), np.uint8))
    for i in range(12)
  )
  source = Source("made up", InMemory(documents[:10]), InMemory(documents[10:]))
  return Corpus((source,))


def _rows():
  """Makes the corpus of all runs here."""
  return training_rows(_corpus().sources, seq_len=64, batch_size=2, seed=CONFIG.seed)


def _losses(path):
  names = ("step", "loss", "grad_norm", "tokens", "learning_rate")
  return [tuple(r[name] for name in names) for r in load_metrics(path / "metrics.jsonl")]


def test_loss_falls(tmp_path, capsys):
  config = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, steps=20), mesh=CONFIG.mesh
  )
  train(config, _corpus(), mesh_of(1, 1), tmp_path, console=Console(quiet=True))
  assert capsys.readouterr().out == ""
  records = load_metrics(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in records] == list(range(1, 21))
  assert np.mean([r["loss"] for r in records[-3:]]) < records[0]["loss"] - 1
  read = [np.count_nonzero(rows["segment_ids"]) for rows in islice(_rows(), 20)]
  assert [r["tokens"] for r in records] == np.cumsum(read).tolist()
  slots = 20 * 2 * 64
  assert records[-1]["tokens"] < slots
  assert records[-1]["padding"] == pytest.approx(1 - sum(read) / slots)
  assert records[0]["learning_rate"] == 0.0
  assert records[2]["learning_rate"] == pytest.approx(1e-2)
  assert set(records[-1]["ttt"]) == {"0"}
  for layer in records[-1]["ttt"].values():
    assert layer["update_ratio"] > 0
    assert layer["output_ratio"] > 0


def test_speed_and_mfu_count_no_padding(monkeypatch):
  """Checks the rates against the clock's own seconds: 30 of 2 * 64 slots hold tokens."""
  seconds = iter([10.0, 14.0])
  monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
  clock = Clock(CONFIG, 4)
  assert clock.lap(100)["tokens_per_second"] is None
  values = clock.lap(130)
  assert values["tokens_per_second"] == 30 / 4
  flops = training_flops(CONFIG) * 30 / (2 * 64)
  assert values["mfu"] == pytest.approx(flops / 4 / (4 * find_device().peak))


def test_mfu_is_not_given_of_a_device_whose_peak_is_unknown():
  device = AbstractDevice(device_kind="TPU v4", num_cores=2, platform="tpu")
  with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
    clock = Clock(CONFIG, 1)
    clock.lap(0)
    values = clock.lap(10)
  assert values["tokens_per_second"] > 0
  assert values["mfu"] is None


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
  """An old checkpoint has no count of tokens: all slots so far count, and a warning says so."""
  with monkeypatch.context() as patch:
    patch.setattr(training, "_TOKENS", "not known yet")
    half = dataclasses.replace(CONFIG.train, steps=4)
    train(dataclasses.replace(CONFIG, train=half), _corpus(), mesh_of(1, 1), tmp_path)
  with pytest.warns(
    UserWarning, match=r"step 4 .* did not count tokens: 'tokens' goes on from 512"
  ):
    train(CONFIG, _corpus(), mesh_of(1, 1), tmp_path)
  read = [np.count_nonzero(rows["segment_ids"]) for rows in islice(_rows(), 8)]
  records = load_metrics(tmp_path / "metrics.jsonl")
  assert records[-1]["tokens"] == 4 * 2 * 64 + sum(read[4:])


def test_the_rate_logged_is_the_one_used(monkeypatch):
  """Skipped steps do not advance the schedule. Adam's first update is the rate, whatever the gradient."""
  plain = dataclasses.replace(
    CONFIG.train, warmup_steps=0, weight_decay=0.0, clip_grad_norm=1e9, learning_rate=0.01
  )
  config, mesh = dataclasses.replace(CONFIG, train=plain), mesh_of(1, 1)
  step, batch = jit_train_step(config, mesh), put_batch(next(_rows()), mesh)
  state = init_state(config, mesh)
  good = jax.device_get(state.model)
  with jax.set_mesh(mesh):
    for skipped in (1, 2):
      poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good)
      state, metrics = step(state._replace(model=jax.device_put(poisoned)), batch)
      assert int(metrics["skipped"]) == skipped
    state, metrics = step(state._replace(model=jax.device_put(good)), batch)
  assert int(metrics["skipped"]) == 2
  record = metrics_record(config, 3, metrics, 1)
  moved = [np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (state.model, good)))]
  assert record["learning_rate"] == pytest.approx(float(max(moved)), rel=1e-4)
  assert record["learning_rate"] == pytest.approx(float(learning_rate(plain)(0)))
  assert record["learning_rate"] != pytest.approx(float(learning_rate(plain)(2)), rel=1e-3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """Returns a run on four devices from its first step to its last, and its directory."""
  path = tmp_path_factory.mktemp("undisturbed")
  return train(CONFIG, _corpus(), mesh_of(2, 2), path), path


def test_stopped_and_resumed_equals_undisturbed(tmp_path, monkeypatch, undisturbed):
  """Stops after step 5 by Ctrl-C; the same call resumes, with every step once and the same numbers."""
  corpus, mesh, (whole, path) = _corpus(), mesh_of(2, 2), undisturbed
  assert whole.finished

  update = TrainingProgress.show

  def interrupt(self, done, record):
    update(self, done, record)
    if done == 5:
      signal.raise_signal(signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(TrainingProgress, "show", interrupt)
    stopped = train(CONFIG, corpus, mesh, tmp_path / "parts")
  assert not stopped.finished
  assert len(_losses(tmp_path / "parts")) == 5

  resumed = train(CONFIG, corpus, mesh, tmp_path / "parts")
  assert resumed.finished
  assert _losses(tmp_path / "parts") == _losses(path)
  for a, b in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state)):
    assert np.array_equal(a, b)


def test_steps_after_the_last_checkpoint_are_logged_once(tmp_path, monkeypatch, undisturbed):
  """A run that dies without saving goes on from its last checkpoint, and the log follows."""
  corpus, mesh = _corpus(), mesh_of(2, 2)
  update = TrainingProgress.show

  def die(self, done, record):
    update(self, done, record)
    if done == 5:
      raise RuntimeError("power failure")

  with monkeypatch.context() as patch:
    patch.setattr(TrainingProgress, "show", die)
    with pytest.raises(RuntimeError, match="power failure"):
      train(CONFIG, corpus, mesh, tmp_path)
  assert [step for step, *_ in _losses(tmp_path)] == [1, 2, 3, 4, 5]
  assert train(CONFIG, corpus, mesh, tmp_path).finished
  assert [step for step, *_ in _losses(tmp_path)] == list(range(1, 9))
  assert _losses(tmp_path) == _losses(undisturbed[1])


@pytest.mark.parametrize("log_every", [1, 4])
def test_steps_that_are_not_finite_are_skipped_and_stop_the_run(tmp_path, log_every):
  """The run stops however seldom the loop looks; the checkpoint from before can train on."""
  broken = dataclasses.replace(
    CONFIG.train, learning_rate=1e30, warmup_steps=0, max_bad_steps=2, log_every=log_every
  )
  config = dataclasses.replace(
    CONFIG, train=broken, checkpoint=CheckpointConfig(every=100 if log_every == 4 else 1)
  )
  with pytest.raises(ValueError, match=r"4 is the last of 3 in a row .*train\.max_bad_steps=2"):
    train(config, _corpus(), mesh_of(1, 1), tmp_path)
  records = load_metrics(tmp_path / "metrics.jsonl")
  assert records[-1]["skipped"] == 3
  assert records[-1]["loss"] is None
  assert records[-1]["update_norm"] == 0
  with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
    assert checkpoints.steps == ([2, 3] if log_every == 1 else [])


def test_other_writers_and_a_trace(tmp_path):
  steps = dataclasses.replace(CONFIG.train, steps=4, writers=("tensorboard",), profile=(2, 3))
  config = dataclasses.replace(CONFIG, train=steps)
  train(config, _corpus(), mesh_of(1, 1), tmp_path)
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"ttt/0/state_ratio" in events.read_bytes()
  (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
  planes = jax.profiler.ProfileData.from_file(str(trace)).planes
  events = [event for plane in planes for line in plane.lines for event in line.events]
  ops = Counter(
    event.name for event in events if "train_step" in dict(event.stats).get("hlo_module", "")
  )
  assert len(ops) > 10
  assert all(count % 2 == 0 for count in ops.values())  # two whole steps


def test_a_trace_is_stopped_when_its_last_step_is_done(tmp_path, monkeypatch):
  """The loop only dispatches a step; the profile waits for the state that the step returns."""
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  monkeypatch.setattr(jax, "block_until_ready", calls.append)
  with Profile((2, 3), tmp_path) as profile:
    for step in range(1, 6):
      profile.before(step, f"state {step - 1}")
      profile.after(step, f"state {step}")
  assert calls == ["state 1", "start", "state 3", "stop"]
  calls.clear()
  with Profile((2, 9), tmp_path) as profile:  # stopped after step 3
    for step in range(1, 4):
      profile.before(step, f"state {step - 1}")
      profile.after(step, f"state {step}")
  assert calls == ["state 1", "start", "state 3", "stop"]


def test_a_writer_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  config = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, writers=("tensorboard",))
  )
  with pytest.raises(ValueError, match=r"pip install 'ttt_jax\[tensorboard\]'"):
    train(config, _corpus(), mesh_of(1, 1), tmp_path)


# One TTT layer with documents: 2 all-to-all and a gather of keeps, forward and backward; the rematerialised
# layer keeps the state that came in and exchanges nothing again. Windowed attention: keys, values and
# segment ids forward, again for the rematerialised layer, and their gradient back. Full attention: one
# gather of keys, values and of ids, forward and rematerialised, and a reduce-scatter back; queries and
# outputs swapped with the mirror shard, each forward, rematerialised, and back. Documents: one
# neighbour's id, one gather of counts. All-reduce: gradients, loss, its weight and statistics.
# Newer compilers (seen with jax 0.12) send the integers again for the rematerialised layers.
COLLECTIVES = {
  "all-to-all": {4},
  "all-gather": {6, 7},
  "reduce-scatter": {1},
  "collective-permute": {12, 14},
}
ALL_REDUCES = {"context 8": {3}, "data 2 x context 4": {7}}


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_collectives_of_a_training_step(mesh):
  """Counts collectives in the compiled step, loop bodies once: a new one must be deliberate."""
  mesh_name, mesh = mesh, mesh_of(*MESHES[mesh])
  config = dataclasses.replace(CONFIG, ttt=dataclasses.replace(CONFIG.ttt, collective="all_to_all"))
  state = init_state(config, mesh)
  tokens, segment_ids, labels = random_rows(2, 64, vocab=256)
  batch = put_batch({"tokens": tokens, "segment_ids": segment_ids, "labels": labels}, mesh)
  with jax.set_mesh(mesh):
    compiled = jit_train_step(config, mesh).lower(state, batch).compile()
  counts = count_collectives(compiled.as_text())
  allowed = COLLECTIVES | {"all-reduce": ALL_REDUCES[mesh_name]}
  assert set(counts) == set(allowed)
  assert all(counts[name] in allowed[name] for name in counts), counts
