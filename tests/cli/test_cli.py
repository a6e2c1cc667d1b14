"""Tests the command line as a new user meets it: as a process, from config to pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ttt_jax
from ttt_jax import cli
from ttt_jax.cli import main, parse, runs
from ttt_jax.cli.shared import evaluated
from ttt_jax.config import TTTConfig
from ttt_jax.config.recorded import record_config
from ttt_jax.config.yaml import load_config, make_config
from ttt_jax.errors import UserError
from ttt_jax.training.rundir import load_metrics, open_run

CONFIG = """# ttt-jax train {path}
name: tiny
runtime: {{cpu_devices: 4}}
mesh: {{data: 2, context: 2}}
model: {{num_layers: 2, d_model: 16, d_ff: 24, num_heads: 2, num_kv_heads: 1}}
attention: {{window: 8}}
ttt: {{layers: [1], chunk_size: 16}}
data: {{seq_len: 128, path: {data}, heldout_fraction: 0.3}}
train: {{steps: 6, batch_size: 2, warmup_steps: 2, log_every: 2}}
checkpoint: {{every: 2}}
eval: {{documents: 3, prompt_tokens: 32, sample_tokens: 8, baseline: true}}
"""

# A command run in the process of the tests takes the eight devices that are there.
IN_PROCESS = ["--runtime.cpu_devices", "null", "--mesh.fsdp", "2", "--train.batch_size", "4"]


@pytest.fixture
def config(tmp_path) -> Path:
  data = tmp_path / "text"
  data.mkdir()
  rng = np.random.default_rng(0)
  for i in range(12):
    words = rng.choice(["to", "learn", "while", "reading", "is", "fast"], 60)
    (data / f"{i}.txt").write_text(" ".join(words))
  path = tmp_path / "tiny.yaml"
  path.write_text(CONFIG.format(path=path, data=data))
  return path


def _run(*words, **kwargs):
  return subprocess.run(
    [sys.executable, "-m", "ttt_jax.cli", *map(str, words)],
    capture_output=True,
    text=True,
    timeout=300,
    **kwargs,
  )


@pytest.mark.slow
def test_train_resume_and_eval(config, tmp_path):
  run_dir = tmp_path / "run"
  result = _run("train", config, "--run_dir", run_dir)
  assert result.returncode == 0, result.stderr
  assert "step 6/6" in result.stdout
  assert "updates off" in result.stdout

  summary = json.loads((run_dir / "summary.json").read_text())
  assert summary["devices"] == 4
  assert summary["steps"] == 6
  assert summary["tokens_per_second"] > 0
  assert summary["params"] > summary["params_baseline"] > 1000
  table = summary["heldout_by_position"]
  assert len(table) == 8
  columns = {"from", "to", "loss", "loss_updates_off", "loss_baseline"}
  assert all(np.isfinite([row[column] for column in columns]).all() for row in table)
  assert {column for column in table[0] if table[0][column] is None} == {
    "loss_before",
    "loss_before_updates_off",
  }
  for name in ("config.yaml", "loss_by_position.png", "training_loss.png"):
    assert (run_dir / name).stat().st_size > 100
  assert [r["step"] for r in load_metrics(run_dir / "metrics.jsonl")] == [2, 4, 6]

  # The same command again has nothing left to train; `eval` reads the checkpoint again.
  again = _run("train", config, "--run_dir", run_dir)
  assert again.returncode == 0, again.stderr
  assert [r["step"] for r in load_metrics(run_dir / "metrics.jsonl")] == [2, 4, 6]
  assert json.loads((run_dir / "summary.json").read_text())["heldout_by_position"] == table
  evaluated = _run("eval", config, "--run_dir", run_dir, "--eval.buckets", "16")
  assert evaluated.returncode == 0, evaluated.stderr
  assert len(json.loads((run_dir / "summary.json").read_text())["heldout_by_position"]) == 16

  # Another config may not go on in there, and touches nothing.
  before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")}
  other = _run("train", config, "--run_dir", run_dir, "--model.d_ff", "32")
  assert other.returncode == 2
  assert "model.d_ff" in other.stderr
  assert "--run_dir" in other.stderr
  assert "Traceback" not in other.stderr
  assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*")} == before


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(config, tmp_path):
  run_dir = tmp_path / "run"
  words = ["train", config, "--run_dir", run_dir, "--train.steps", "4000", "--train.log_every", "1"]
  words += ["--eval.baseline", "false", "--checkpoint.every", "100000"]
  process = subprocess.Popen(
    [sys.executable, "-m", "ttt_jax.cli", *map(str, words)],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"PYTHONUNBUFFERED": "1"},
  )
  metrics = run_dir / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while not (metrics.exists() and len(load_metrics(metrics)) >= 3):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0, output
  assert "the same command goes on from there" in output
  done = len(load_metrics(metrics))
  assert 3 <= done < 4000
  saved = [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()]
  assert saved == [str(done)]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--data.seqlen", "128"], "did you mean data.seq_len"),
    (["--train.steps", "many"], "train.steps"),
    (["--mesh.context", "3"], "mesh.context=3"),
    (["--ttt.layers", "[7]"], "ttt.layers=[7]"),
    (["--data.path", "/nowhere"], "data.path"),
    (["--mesh.context", "1024"], "mesh.context"),
    (["--attention.window", "129"], "attention.window=129"),
  ],
)
def test_a_mistake_is_one_line(config, tmp_path, capsys, words, message):
  run_dir = tmp_path / "run"
  assert main(["train", str(config), *IN_PROCESS, "--run_dir", str(run_dir), *words]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("ttt-jax train: ")
  assert not run_dir.exists()


def test_eval_without_a_run(config, tmp_path, capsys):
  assert main(["eval", str(config), *IN_PROCESS, "--run_dir", str(tmp_path / "no")]) == 2
  assert "has no checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "shown"),
  [
    (["--help"], ["train", "eval perplexity", "generate"]),
    (["train", "--help"], ["--ttt.chunk_size", "--train.learning_rate", "default: 0.004"]),
    (["eval", "--help"], ["ttt-jax eval runs/quickstart", "eval perplexity", "--eval.seq_len"]),
    (["eval", "ruler", "--help"], ["--strict", "--ttt.layers"]),
    (["generate", "--help"], ["--prompt", "--ttt.layers", "[--section.field value ...]"]),
    (["data", "prepare", "--help"], ["--tokenizer"]),
    (["--version"], [f"ttt-jax {ttt_jax.__version__}"]),
  ],
)
def test_help(words, shown, capsys):
  with pytest.raises(SystemExit) as stop:
    main(words)
  assert stop.value.code == 0
  output = capsys.readouterr().out
  assert [text for text in shown if text not in output] == []
  assert ("--train.steps" in output) == (words[0] == "train")


def test_options_stand_where_they_like():
  words = ["--train.steps", "3", "configs/test_tiny.yaml", "--seed=-4", "--ttt.layers", "[1]"]
  parsed = parse(["train", *words])
  assert parsed.config == "configs/test_tiny.yaml"
  assert parsed.overrides == ["--train.steps", "3", "--seed=-4", "--ttt.layers", "[1]"]
  words = ["--ttt.chunk_size", "8", "model", "--prompt", "x y", "--temperature=0.5"]
  parsed = parse(["generate", *words])
  assert (parsed.model, parsed.prompt, parsed.temperature) == ("model", ["x y"], 0.5)
  assert parsed.overrides == ["--ttt.chunk_size", "8"]
  # A flag of the command's own is not taken for a field of the same name.
  parsed = parse(["eval", "perplexity", "runs/x", "--seed", "3", "--run_dir", "y"])
  assert (parsed.seed, parsed.overrides) == (3, ["--run_dir", "y"])


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["train", "configs/test_tiny.yaml", "--train.lr", "1"], "did you mean train.learning_rate?"),
    (
      ["train", "configs/test_tiny.yaml", "--steps", "1"],
      "unknown field steps on the command line: did you mean",
    ),
    (["generate", "x", "--tempature", "1"], "--tempature: did you mean --temperature?"),
    (["generate", "x", "--prompt", "y", "--seed_", "1"], "unknown option --seed_: did you mean"),
    (["eval", "ruler", "x", "--lenghts", "1"], "did you mean --lengths?"),
    (["eval", "ruler", "x", "--train.steps", "1"], "only fields of model, attention, ttt"),
  ],
)
def test_misspelled_options_are_named(words, message, capsys):
  assert main(words) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith(
    "ttt-jax eval ruler: " if words[1] == "ruler" else f"ttt-jax {words[0]}: "
  )


@pytest.mark.parametrize(
  ("command", "field", "value"),
  [
    (["train", "configs/test_tiny.yaml"], "plan.topology", "v5e:2x2"),
    (["eval", "x"], "train.steps", "3"),
    (["eval", "x"], "data.attend.block", "[8, 8]"),
    (["eval", "x"], "eval.every", "3"),
    (["eval", "perplexity", "x"], "eval.documents", "3"),
    (["eval", "recall", "x"], "eval.temperature", "0.5"),
  ],
)
def test_a_field_without_effect_on_the_command_is_refused(command, field, value, capsys):
  section, name = field.split(".", 1)
  for words in (
    [f"--{field}", value],
    [f"--{field}={value}"],
    [f"--{section}", f"{{{name}: {value}}}"],
  ):
    if "." in name and len(words) == 2 and words[0] == f"--{section}":
      continue
    assert main([*command, *words]) == 2
    assert f"--{field} has no effect on this command: leave it out" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    main([*command[:-1], "--help"])
  text = capsys.readouterr().out
  assert f"--{field} " not in text
  assert "--data.heldout_fraction " in text


def test_no_check_asks_for_a_field_that_the_command_refuses(tmp_path):
  """Checks that other chunks than a run's need no other `data.attend` or `eval.seq_len`."""
  recorded = make_config(
    {
      "ttt": {"layers": [1], "chunk_size": 16},
      "data": {"seq_len": 64, "attend": {"block": [16, 48]}},
      "eval": {"seq_len": 32, "buckets": 2},
      "train": {"trainable": "ttt", "batch_size": 2},
    }
  )
  record_config(tmp_path, recorded)
  words = ["perplexity", str(tmp_path), "--ttt.chunk_size", "64"]
  config, is_run = evaluated(parse(["eval", *words]))
  assert (is_run, config.ttt.chunk_size, config.train.batch_size) == (True, 64, 2)
  assert (config.data.attend, config.eval.seq_len) == ("document", None)


def test_a_flag_ends_fields_of_the_file_that_it_replaces(tmp_path):
  file = tmp_path / "a.yaml"
  file.write_text("ttt: {layers: [1], half_life: 40, learn_half_life: true, inner_lr: 0.3}")
  ttt = load_config(file, ["--ttt.decay", "0.9"]).ttt
  assert (ttt.decay, ttt.half_life, ttt.learn_half_life, ttt.inner_lr) == (0.9, None, False, 0.3)
  ttt = load_config(file, ["--ttt.rule", "least_squares"]).ttt
  assert (ttt.rule, ttt.half_life, ttt.inner_lr) == ("least_squares", 40, TTTConfig().inner_lr)
  with pytest.raises(
    UserError, match=r"ttt\.half_life=40.* and ttt\.decay=0\.9 both set the decay"
  ):
    load_config(file, ["--ttt.decay", "0.9", "--ttt.half_life", "40"])


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["data", "prepare", "a", "b", "--tokeniser", "x"], "--tokeniser: did you mean --tokenizer?"),
    (
      ["data", "prepare", "--max_bad_records=3"],
      "--max_bad_records: did you mean --max-bad-records",
    ),
    (["data", "prepare", "a", "b", "--sequence_length", "3"], "--sequence_length: there are --"),
    (["data", "facts", "x", "--charakters", "3"], "did you mean --characters?"),
    (["data", "--foo"], "unknown option --foo: there are --help"),
    (["calibrate", "x", "--chunk_size", "3"], "did you mean --chunk-size?"),
    (["calibrate", "x", "--train.steps", "3"], "unknown option --train.steps: "),
    (["bench", "fast-weights", "--d_model", "3"], "did you mean --d-model?"),
    (["eval", "compare", "a", "b", "--off", "facts"], "unknown option --off: did you mean --of?"),
    (["eval", "compare", "a", "b", "--of", "facts --rosw 3"], "did you mean --rows?"),
  ],
)
def test_misspelled_options_of_commands_without_fields_are_named(words, message, capsys):
  assert main(words) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith(f"ttt-jax {words[0]}")


def test_a_value_may_look_like_an_option():
  parsed = parse(["data", "facts", "out", "--text=--x", "--facts", "1", "2", "--seed", "-3"])
  assert (str(parsed.text), parsed.facts, parsed.seed) == ("--x", [1, 2], -3)
  assert parse(["data", "facts", "--", "--out"]).destination == "--out"


def test_a_bug_keeps_its_traceback(config, tmp_path, monkeypatch):
  """A ValueError that ttt_jax did not raise as a user's mistake is a bug, wherever it comes from."""
  code = compile("def broken(*_): a, b = 1, 2, 3", cli.__file__, "exec")
  namespace = {}
  exec(code, namespace)
  monkeypatch.setattr(runs, "make_config", namespace["broken"])
  with pytest.raises(ValueError, match="too many values"):
    main(["train", str(config)])


def test_eval_of_two_models_is_refused(config, tmp_path, capsys):
  """The path and a field must not name different models."""
  run = tmp_path / "run"
  open_run(run, load_config(config))
  for words, name in (
    ([str(run), "--run_dir", "other"], "run_dir other"),
    ([str(run), "--init_from", "other"], "init_from other"),
    (["models/a", "--init_from", "models/b"], "init_from models/b"),
  ):
    assert main(["eval", *words]) == 2
    assert f"--{name} is given, but {words[0]} is what is evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
  "words", [("eval", "facts", "MODEL"), ("calibrate", "MODEL"), ("data", "facts", "OUT")], ids=str
)
def test_a_text_that_cannot_be_read_is_the_users_mistake(words, tmp_path, capsys):
  """A missing file and one in another encoding are named before anything else is done."""
  other = tmp_path / "other.txt"
  other.write_bytes("prose".encode("utf-16"))
  for path, message in ((tmp_path / "none.txt", "cannot read"), (other, "is not UTF-8 text")):
    assert main([*words, "--text", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_byte_order_mark_is_no_text(tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("\ufeffone line of prose\n", encoding="utf-8")
  words = ["--documents", "3", "--facts", "1", "1", "--characters", "5", "--parts", "1"]
  assert main(["data", "facts", str(tmp_path / "out"), "--text", str(text), *words]) == 0
  written = (tmp_path / "out" / "facts.jsonl").read_text()
  assert "one line of prose" in written
  assert "ufeff" not in written


def test_a_state_that_could_not_be_saved_is_refused_before_anything_is_read(tmp_path, capsys):
  words = ["--prompt", "x", "--save-state", str(tmp_path / "none" / "state")]
  assert main(["generate", str(tmp_path / "no model"), *words]) == 2
  assert "none does not exist, make it" in capsys.readouterr().err
