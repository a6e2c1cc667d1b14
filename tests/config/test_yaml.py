"""Tests that files and overrides become the right `Config` and that errors name every mistake."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from ttt_jax.config import Config, DataConfig, ModelConfig, TrainConfig, TTTConfig, WeightedSource
from ttt_jax.config.given import given_fields
from ttt_jax.config.yaml import (
  config_difference,
  dump_config,
  fields_help,
  flatten,
  load_config,
  load_fields,
  make_config,
)
from ttt_jax.errors import UserError

CONFIGS = [
  path
  for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
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
      r"data\.mixture: .*Option 'wieght' is not accepted",
    ),
    ("[{path: a}, {weight: 1}]", r"data\.mixture\[1\] lacks path"),
    (
      "[{path: a, weight: much}]",
      r"data\.mixture: .*\"weight\": Expected a float. Got value: much",
    ),
    ("[a, b]", r"data\.mixture: Expected a .* a \(on the command line\)"),
    ("{a: 1}", r"data\.mixture: Expected a tuple. Got value: \{'a': 1\}"),
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
    ("data.seq_len: 4", [], "data.seq_len in .* put seq_len under the section data"),
    ("", ["--train.step", "3"], r"unknown field train.step on the command line: .* train.steps\?"),
    ("", ["--batch-size=3"], "unknown field batch-size .* did you mean train.batch_size"),
    ("", ["--train.lr", "3"], r"unknown field train.lr .*: did you mean train.learning_rate\?"),
    ("", ["--ttt.hl", "3"], r"unknown field ttt.hl .*: did you mean ttt.half_life\?"),
    ("train: {steps: abc}", [], "train.steps: Expected a int. Got value: abc"),
    ("train: {steps: 1.5}", [], "train.steps: Expected a int. Got value: 1.5"),
    ("train: {steps: 1e3}", [], "train.steps: Expected a int. Got value: 1000.0"),
    ("train: {steps: true}", [], "train.steps: Expected a int. Got value: True"),
    ("train: {steps: null}", [], r"train.steps=null \(in .*x.yaml\): train.steps cannot be null"),
    ("train: {learning_rate: one}", [], "train.learning_rate: Expected a float. Got value: one"),
    ("train: {learning_rate: true}", [], "train.learning_rate: Expected a float. Got value: True"),
    ("eval: {baseline: maybe}", [], "eval.baseline: Expected a bool. Got value: maybe"),
    ("eval: {baseline: 1}", [], "eval.baseline: Expected a bool. Got value: 1"),
    ("name: 3", [], "name: Expected a str. Got value: 3"),
    ("ttt: {layers: 2}", [], "ttt.layers: Expected a tuple. Got value: 2"),
    ("ttt: {layers: [1.5]}", [], "ttt.layers: Expected a int. Got value: 1.5"),
    ("ttt: {decay: x}", [], "ttt.decay: .* Expected a float .* Given value: x"),
    ("ttt: 3", [], "ttt=3 is not a section"),
    (
      "",
      ["--train.steps", "abc"],
      r"train.steps: Expected a int. Got value: abc \(on the command line\)",
    ),
    ("", ["--train.steps", "0"], "train.steps=0 must be positive"),
    ("ttt: {layers: [9]}", [], "model.num_layers=4"),
    ("", ["--train.steps"], "--train.steps has no value"),
    ("", ["--train.steps", "--seed", "3"], "--train.steps has no value"),
    ("", ["train.steps", "3"], "unexpected 'train.steps' on the command line"),
    ("", ["--ttt.layers", "[2"], r"ttt.layers: Expected a tuple. Got value: \[2"),
    ("seed: 1\nseed: 2", [], "line 2: found duplicate key .seed."),
    ("train: {steps: 1, steps: 2}", [], "found duplicate key .steps."),
    ("- 1", [], "must hold sections, but holds list"),
    ("train: [", [], "x.yaml is not valid YAML: line 1"),
    ("name: !!python/name:os.system x", [], "x.yaml is not valid YAML"),
  ],
)
def test_mistakes_are_named(load, text, overrides, message):
  with pytest.raises(ValueError, match=message):
    load(text, *overrides)


def _float_fields(cls: type, path: tuple = ()):
  """Yields the path of every float field of all sections; 0 stands for an item of a list."""
  for name, hint in typing.get_type_hints(cls).items():
    kinds = {hint, *typing.get_args(hint)}
    here = (*path, name, 0) if typing.get_origin(hint) is tuple else (*path, name)
    if float in kinds:
      yield here
    for kind in filter(dataclasses.is_dataclass, kinds):
      yield from _float_fields(kind, here)


FLOAT_FIELDS = list(_float_fields(Config))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("path", FLOAT_FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_no_number_is_infinite_or_nan(path, value):
  """Refuses it in a section made in Python, and in a config."""
  fields, section = value, typing.get_type_hints(Config)[path[0]]
  for key in reversed(path):
    fields = [{"path": "a"} | fields] if key == 0 else {key: fields}
  message = re.escape(".".join(map(str, path)).replace(".0", "[0]") + f"={value} is not finite")
  with pytest.raises(UserError, match=f"^{message}"):
    make_config(fields)
  if len(path) == 2:
    with pytest.raises(UserError, match=f"^{message}"):
      section(**{path[1]: value})


def test_the_float_fields_of_all_sections_are_found():
  assert len(FLOAT_FIELDS) > 25
  paths = [("train", "learning_rate"), ("model", "rope_scaling", "factor")]
  assert {*paths, ("data", "mixture", 0, "weight"), ("ttt", "half_life")} <= set(FLOAT_FIELDS)


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
  directory = (
    None if text == "null" else text
  )  # `null` is none where a text may be none, quoted too
  config = dataclasses.replace(Config(), name=text, run_dir=directory)
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


def test_a_default_that_is_written_down_is_given(load):
  """Checks a file, the command line and a constructor."""
  config = load("ttt: {layers: []}\ntrain:\nmodel: {d_model: 96}", "--model.rope_theta", "10000")
  assert config == Config()
  assert given_fields(config.ttt) == {"layers": ()}
  assert given_fields(config.model) == {"d_model": 96, "rope_theta": 10000.0}
  assert given_fields(config.train) == given_fields(config.mesh) == {}
  assert given_fields(ModelConfig(96, d_ff=288)) == {"vocab_size": 96, "d_ff": 288}
  assert given_fields(ModelConfig()) == {}
  assert load_fields(None, ["--ttt.layers", "[]"]) == {"ttt": {"layers": []}}
  assert make_config({"ttt": {"layers": [1]}}) == Config(ttt=TTTConfig(layers=(1,)))


def test_every_field_has_a_meaning_in_the_help():
  text = fields_help()
  names = [name for name, _ in flatten(dataclasses.asdict(Config()))]
  assert len(names) > 80
  for name in names:
    entry = re.search(rf"--{re.escape(name)}(?: \S+)?\s+(.*?)\(type: ", text, re.S)
    assert entry, name
    assert len(entry.group(1).split()) >= 2, name
  part = fields_help(["ttt"])
  assert "--ttt.chunk_size" in part
  assert "--train.steps" not in part


def test_the_help_lists_the_fields_of_sections_within_sections():
  """By default such a section is null or a word, so that no default config holds its fields."""
  names = ["model.rope_scaling.factor", "model.rope_scaling.truncate", "data.attend.block"]
  for text in (fields_help(), fields_help(["model"]) + fields_help(["data"])):
    for name in names:
      entry = re.search(rf"--{re.escape(name)}(?: \S+)?\s+(.*?)type: ", text, re.S)
      assert entry, name
      assert len(entry.group(1).split()) >= 2, name
    assert text.count("--data.attend ") == text.count("--model.rope_scaling ") == 1
    assert ".help" not in text  # jsonargparse has such options, our commands do not
  assert "rope_scaling" not in fields_help(["ttt"])
  words = ["--model.rope_scaling.factor", "2", "--data.attend.block", "[512, 1024]"]
  config = load_config(None, words)
  assert (config.model.rope_scaling.factor, config.data.attend.block) == (2.0, (512, 1024))
