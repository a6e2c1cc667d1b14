"""Files and overrides become the right `Config`; every mistake is named."""

import dataclasses
from pathlib import Path

import pytest

from ttt_jax.config import Config, DataConfig, TrainConfig, TTTConfig, WeightedSource
from ttt_jax.load_config import config_difference, dump_config, load_config

CONFIGS = [
  path
  for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
  if not path.name.startswith("ablation_")  # a grid of configs
]


@pytest.fixture
def load(tmp_path):
  def load(text: str, *overrides: str) -> Config:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_config(path, overrides)

  return load


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_loads_and_round_trips(path, tmp_path):
  config = load_config(path)
  copy = tmp_path / "copy.yaml"
  copy.write_text(dump_config(config))
  assert load_config(copy) == config


def test_what_a_file_does_not_name_keeps_its_default(load):
  assert load("") == Config()
  assert load("ttt:\ntrain:\n") == Config()
  assert load("ttt: {layers: [2]}") == Config(ttt=TTTConfig(layers=(2,)))


def test_mixtures(load, tmp_path):
  text = "data:\n  mixture:\n  - {path: books, weight: 3}\n  - {path: null, weight: 0.5}\n  - {path: c.d}"
  sources = (WeightedSource("books", 3.0), WeightedSource(None, 0.5), WeightedSource("c.d", 1.0))
  want = Config(data=DataConfig(mixture=sources))
  assert load(text) == load(dump_config(want)) == want
  other = load(text, "--data.mixture", "[{path: a}, {path: b, weight: 2}]")
  assert other.data.mixture == (WeightedSource("a", 1.0), WeightedSource("b", 2.0))
  difference = config_difference(dataclasses.asdict(want), dataclasses.asdict(other))
  assert [line.split(":")[0] for line in difference] == ["data.mixture"]


@pytest.mark.parametrize(
  ("value", "problem"),
  [
    (
      "[{path: a, wieght: 1}]",
      r"unknown field data\.mixture\[0\]\.wieght .*: there are path, weight",
    ),
    ("[{path: a}, {weight: 1}]", r"data\.mixture\[1\] lacks path"),
    ("[{path: a, weight: much}]", r"data\.mixture\[0\]\.weight='much' is not a number"),
    ("[a, b]", r"data\.mixture\[0\]='a' is not a mapping of path, weight"),
    ("{a: 1}", r"data\.mixture=.* is not a list, each item a mapping of path, weight"),
  ],
)
def test_mistakes_in_mixtures(load, value, problem):
  with pytest.raises(ValueError, match=problem):
    load("", "--data.mixture", value)


def test_overrides_win_and_leave_their_neighbours(load):
  text = "train: {steps: 50, batch_size: 4}"
  want = Config(train=TrainConfig(steps=70, batch_size=4))
  assert load(text, "--train.steps", "70") == want
  assert load(text, "--train.steps=70") == want
  assert load(text, "--train.steps", "60", "--train.steps=70") == want
  assert load(text, "--train", "{steps: 70}") == want


@pytest.mark.parametrize(
  ("words", "name", "value"),
  [
    (["--ttt.layers", "[2, 3]"], "ttt.layers", (2, 3)),
    (["--ttt.layers=[]"], "ttt.layers", ()),
    (["--ttt.decay", "null"], "ttt.decay", None),
    (["--ttt.decay", "1"], "ttt.decay", 1.0),
    (["--train.learning_rate", "4e-3"], "train.learning_rate", 4e-3),
    (["--train.learning_rate=1E-2"], "train.learning_rate", 1e-2),
    (["--train.steps", "1_000"], "train.steps", 1000),
    (["--seed", "-3"], "seed", -3),
    (["--seed", "010"], "seed", 10),
    (["--eval.baseline", "true"], "eval.baseline", True),
    (["--name", "123"], "name", "123"),
    (["--run_dir", "runs/a=b"], "run_dir", "runs/a=b"),
    (["--run_dir=runs/a=b"], "run_dir", "runs/a=b"),
    (["--run_dir", "null"], "run_dir", None),
    (["--data.path", "*.txt"], "data.path", "*.txt"),
  ],
)
def test_override_values(load, words, name, value):
  got = load("ttt: {layers: [1], decay: 0.5}\nrun_dir: x", *words)
  for part in name.split("."):
    got = getattr(got, part)
  assert got == value
  assert type(got) is type(value)


def test_numbers_of_a_file(load):
  train = load("train: {learning_rate: 4e-3, weight_decay: 0, beta1: .5}").train
  assert (train.learning_rate, train.weight_decay, train.beta1) == (4e-3, 0.0, 0.5)
  assert type(train.weight_decay) is float


@pytest.mark.parametrize(
  ("text", "overrides", "message"),
  [
    (
      "data: {seqlen: 4}",
      [],
      r"unknown field data.seqlen in .*x.yaml: did you mean data.seq_len\?",
    ),
    ("modle: {}", [], r"unknown field modle in .*: did you mean model\?"),
    ("seq_len: 4", [], r"unknown field seq_len in .*: did you mean data.seq_len or eval.seq_len\?"),
    ("zzz: 4", [], r"unknown field zzz in .*: there are name, run_dir"),
    ("1: 4", [], r"unknown field 1 in"),
    ("data.seq_len: 4", [], "data.seq_len in .* put it under its section data"),
    ("", ["--train.step", "3"], r"unknown field train.step on the command line: .* train.steps\?"),
    ("", ["--batch-size=3"], "unknown field batch-size on the command line"),
    ("train: {steps: abc}", [], "train.steps='abc' is not an int"),
    ("train: {steps: 1.5}", [], "train.steps=1.5 is not an int"),
    ("train: {steps: 1e3}", [], "train.steps=1000.0 is not an int"),
    ("train: {steps: true}", [], "train.steps=True is not an int"),
    ("train: {steps: null}", [], "train.steps=None is not an int"),
    ("train: {learning_rate: '1'}", [], "train.learning_rate='1' is not a number"),
    ("train: {learning_rate: true}", [], "train.learning_rate=True is not a number"),
    ("eval: {baseline: yes}", [], "eval.baseline='yes' is not true or false"),
    ("eval: {baseline: 1}", [], "eval.baseline=1 is not true or false"),
    ("name: 3", [], "name=3 is not a text"),
    ("ttt: {layers: 2}", [], "ttt.layers=2 is not a list of int"),
    ("ttt: {layers: [1.5]}", [], r"ttt.layers=\[1.5\] is not a list of int"),
    ("ttt: {decay: x}", [], "ttt.decay='x' is not a number or null"),
    ("ttt: 3", [], "ttt=3 is not a section"),
    ("", ["--train.steps", "abc"], r"train.steps='abc' is not an int \(on the command line\)"),
    ("", ["--train.steps", "0"], "train.steps=0 must be positive"),
    ("ttt: {layers: [9]}", [], "model.num_layers=4"),
    ("", ["--train.steps"], "--train.steps has no value"),
    ("", ["--train.steps", "--seed", "3"], "--train.steps has no value"),
    ("", ["train.steps", "3"], "unexpected 'train.steps' on the command line"),
    ("", ["--ttt.layers", "[2"], r"--ttt.layers '\[2' is not valid YAML"),
    ("seed: 1\nseed: 2", [], "line 2: seed is given twice"),
    ("train: {steps: 1, steps: 2}", [], "steps is given twice"),
    ("- 1", [], "holds no sections but list"),
    ("train: [", [], "x.yaml is not valid YAML: line 1"),
    ("name: !!python/name:os.system x", [], "x.yaml is not valid YAML"),
  ],
)
def test_mistakes_are_named(load, text, overrides, message):
  with pytest.raises(ValueError, match=message):
    load(text, *overrides)


def test_missing_file_lists_its_neighbours(tmp_path):
  (tmp_path / "small.yaml").write_text("")
  with pytest.raises(ValueError, match=r"no config file .*nope.yaml: there are .*small.yaml"):
    load_config(tmp_path / "nope.yaml")
  with pytest.raises(ValueError, match=r"no config file .*nope.yaml$"):
    load_config(tmp_path / "empty" / "nope.yaml")


def test_binary_file(tmp_path):
  (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match=r"x.yaml is not a text file"):
    load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize("text", ["4e-3", "yes", "null", "010", "a: b", "1:30", "*", "ä #1", " x"])
def test_strings_survive_the_round_trip(load, text):
  config = dataclasses.replace(Config(), name=text, run_dir=text)
  assert load(dump_config(config)) == config


def test_config_difference():
  old = {"name": "a", "train": {"steps": 400, "beta1": 0.9}, "ttt": {"layers": [2]}}
  new = {"name": "a", "train": {"steps": 500}, "ttt": {"layers": (2,), "decay": None}}
  assert config_difference(old, old) == []
  assert config_difference(old, new) == [
    "train.steps: 400 -> 500",
    "train.beta1: 0.9 -> (absent)",
    "ttt.decay: (absent) -> null",
  ]
