"""Tests run directories: they belong to one config, and metrics have every step once after any kill."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from ttt_jax.config import (
  Config,
  DataConfig,
  EvalConfig,
  MeshConfig,
  ModelConfig,
  RopeScaling,
  RuntimeConfig,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.config.recorded import recorded_config
from ttt_jax.config.yaml import load_config
from ttt_jax.errors import UserError
from ttt_jax.files import write_json
from ttt_jax.training.rundir import MetricsLog, hold_run, load_metrics, open_run

CONFIG = Config(ttt=TTTConfig(layers=(1,)))


def contents(path):
  return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_new_run_records_its_config(tmp_path):
  run = open_run(tmp_path / "runs" / "x", CONFIG)
  assert run == tmp_path / "runs" / "x"
  assert load_config(run / "config.yaml") == CONFIG
  assert [p.name for p in run.iterdir()] == ["config.yaml"]


def test_same_config_resumes(tmp_path):
  run = open_run(tmp_path, CONFIG)
  (run / "metrics.jsonl").write_text("")
  before = contents(run)
  moved = dataclasses.replace(CONFIG, run_dir="else", runtime=RuntimeConfig(cpu_devices=4))
  for config in (CONFIG, moved, load_config(run / "config.yaml")):
    assert open_run(run, config) == run
    assert contents(run) == before


def test_a_run_of_an_older_version_resumes(tmp_path):
  """Null in `data` takes the run's value, and an infinite limit, which null replaces, stays one."""
  config = dataclasses.replace(CONFIG, train=TrainConfig(clip_grad_norm=None))
  run = open_run(tmp_path, config)
  text = (run / "config.yaml").read_text()
  older = text.replace("text_field: null", "text_field: text")
  older = older.replace("clip_grad_norm: null", "clip_grad_norm: .inf")
  assert older.count("text_field: text") == older.count(".inf") == 1
  (run / "config.yaml").write_text(older)
  assert recorded_config(run).train.clip_grad_norm is None
  before = contents(run)
  open_run(run, config)
  assert contents(run) == before
  with pytest.raises(UserError, match=r"data\.text_field: text -> body"):
    open_run(run, dataclasses.replace(config, data=DataConfig(text_field="body")))


def test_other_config_is_refused_and_nothing_changes(tmp_path):
  run = open_run(tmp_path, CONFIG)
  before = contents(run)
  other = dataclasses.replace(
    CONFIG, ttt=TTTConfig(layers=(2,)), train=TrainConfig(learning_rate=1e-3, steps=500)
  )
  with pytest.raises(ValueError, match="another config") as error:
    open_run(run, other)
  message = str(error.value)
  assert "ttt.layers: [1] -> [2]" in message
  assert "train.learning_rate: 0.004 -> 0.001" in message
  assert "train.steps" not in message
  assert str(run / "config.yaml") in message
  assert "--run_dir" in message
  assert contents(run) == before


def test_what_may_change_is_recorded(tmp_path):
  run = open_run(tmp_path, CONFIG)
  longer = dataclasses.replace(
    CONFIG,
    train=TrainConfig(steps=500),
    mesh=MeshConfig(context=2),
    eval=EvalConfig(documents=3),
  )
  with pytest.raises(ValueError, match=r"train\.steps: 400 -> 500"):
    open_run(run, longer, may_change=("mesh", "eval"))
  assert load_config(run / "config.yaml") == CONFIG
  open_run(run, longer)
  assert load_config(run / "config.yaml") == longer


def test_directory_of_something_else(tmp_path):
  (tmp_path / "thesis.tex").write_text("all of it")
  with pytest.raises(ValueError, match=r"not empty and not a run .*--run_dir"):
    open_run(tmp_path, CONFIG)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
  with pytest.raises(ValueError, match="is a file"):
    open_run(tmp_path / "thesis.tex", CONFIG)
  with pytest.raises(ValueError, match="cannot be made"):
    open_run(tmp_path / "thesis.tex" / "x", CONFIG)


def test_start_killed_while_writing_its_config(tmp_path):
  (tmp_path / ".config.yaml.tmp").write_text("name: r")
  open_run(tmp_path, CONFIG)
  assert load_config(tmp_path / "config.yaml") == CONFIG


@pytest.mark.parametrize(
  "damage", ["", "name: run\nseed: 0\nru", "\x00\x01", "- 1", "name: [", "half"]
)
def test_damaged_config_is_named(tmp_path, damage):
  file = open_run(tmp_path, CONFIG) / "config.yaml"
  text = file.read_text()
  file.write_text(text[: len(text) // 2] if damage == "half" else damage)
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=r"config\.yaml"):
    open_run(tmp_path, CONFIG)
  assert contents(tmp_path) == before


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
  """A field that an old config lacks has its default; an unknown field is refused."""
  config = dataclasses.replace(
    CONFIG, model=ModelConfig(rope_theta=5e5, rope_scaling=RopeScaling("linear", 2.0))
  )
  file = open_run(tmp_path, config) / "config.yaml"
  text = file.read_text()
  earlier = text.replace("  short_conv: null\n", "").replace("    mscale: null\n", "")
  assert len(earlier.splitlines()) == len(text.splitlines()) - 2
  file.write_text(earlier)
  open_run(tmp_path, config)
  assert load_config(file) == config
  file.write_text(earlier.replace("  rope_theta: 500000.0\n", ""))
  with pytest.raises(ValueError, match=r"model\.rope_theta: 10000\.0 -> 500000\.0"):
    open_run(tmp_path, config)
  file.write_text(earlier.replace("attention:\n", "attention:\n  sinks: 4\n"))
  with pytest.raises(ValueError, match=r"unknown field attention\.sinks in .*config\.yaml"):
    open_run(tmp_path, config)


HOLDS = """
import sys
from ttt_jax.config.recorded import recorded_config
from ttt_jax.config.yaml import load_config
from ttt_jax.errors import UserError
from ttt_jax.training.rundir import hold_run
with hold_run(sys.argv[1], load_config(sys.argv[2])):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
  """A killed process also releases the lock; a second process records nothing."""
  file = open_run(tmp_path / "run", CONFIG) / "config.yaml"
  longer = dataclasses.replace(CONFIG, train=TrainConfig(steps=500))
  with subprocess.Popen(
    [sys.executable, "-c", HOLDS, str(file.parent), str(file)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as first:
    assert first.stdout.readline() == "held\n"
    before = contents(tmp_path)
    with (
      pytest.raises(ValueError, match=r"run' is in use.*--run_dir"),
      hold_run(file.parent, longer),
    ):
      raise AssertionError("two hold it")
    assert contents(tmp_path) == before
    first.kill()
  with hold_run(file.parent, longer):
    assert load_config(file) == longer


def test_a_run_is_held_where_files_cannot_be_locked(tmp_path, monkeypatch):
  def no_locks(self, *args):
    raise OSError("no locks here")

  monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
  with (
    pytest.warns(UserWarning, match=r"cannot be locked \(no locks here\)"),
    hold_run(tmp_path / "run", CONFIG),
  ):
    assert load_config(tmp_path / "run" / "config.yaml") == CONFIG
  assert not (tmp_path / "run" / ".lock").exists()


def write_steps(path, steps, resume_step=0):
  with MetricsLog.open(path, resume_step) as log:
    for step in steps:
      log.write({"step": step, "loss": 1 / step})


def steps_of(path):
  return [record["step"] for record in load_metrics(path)]


def test_metrics_are_there_at_once(tmp_path):
  path = tmp_path / "deep" / "metrics.jsonl"
  with MetricsLog.open(path, 0) as log:
    log.write({"step": 1, "loss": 2.5})
    assert load_metrics(path) == [{"step": 1, "loss": 2.5}]


def test_resuming_leaves_every_step_once(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [10, 20, 30])
  write_steps(path, [30, 40], resume_step=20)
  assert steps_of(path) == [10, 20, 30, 40]
  write_steps(path, [10], resume_step=0)
  assert steps_of(path) == [10]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_nothing_to_drop_rewrites_nothing(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [10, 20])
  inode = path.stat().st_ino
  write_steps(path, [30], resume_step=20)
  assert path.stat().st_ino == inode
  assert steps_of(path) == [10, 20, 30]


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 30, "loss": 2}', "\udcff", '{"st'])
def test_torn_last_line(tmp_path, torn):
  path = tmp_path / "metrics.jsonl"
  write_steps(path, [10, 20])
  with path.open("a", errors="surrogateescape") as file:
    file.write(torn)
  load_metrics(path)
  write_steps(path, [30], resume_step=20)
  assert steps_of(path) == [10, 20, 30]


def test_whole_record_without_its_newline_counts(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 10}\n{"step": 20}')
  write_steps(path, [30], resume_step=20)
  assert steps_of(path) == [10, 20, 30]


def test_damage_in_the_middle_is_named_and_left(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 10}\n{"st\n{"step": 30}\n')
  before = contents(tmp_path)
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
    MetricsLog.open(path, 30)
  assert contents(tmp_path) == before


def test_not_finite_and_numpy_values_are_json(tmp_path):
  path = tmp_path / "metrics.jsonl"
  record = {
    "step": 1,
    "loss": math.nan,
    "norms": [np.float32(0.5), np.float32("inf")],
    "by_layer": {3: np.array([1.0, -math.inf])},
    "count": np.int64(4),
  }
  with MetricsLog(path) as log:
    log.write(record)
  want = {"step": 1, "loss": None, "norms": [0.5, None], "by_layer": {"3": [1.0, None]}, "count": 4}
  assert load_metrics(path) == [want]
  write_json(tmp_path / "summary.json", record)
  assert json.loads((tmp_path / "summary.json").read_text()) == want


def test_write_json_keeps_the_old_file_if_it_fails(tmp_path):
  path = tmp_path / "summary.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})
  assert json.loads(path.read_text()) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
