"""Tests the one rule for opening a model: a given field counts, or an error names it."""

import argparse
import dataclasses
import warnings

import jax
import numpy as np
import pytest
from helpers import random_model

from ttt_jax import UserError, load_pretrained, save_pretrained
from ttt_jax.checkpoints.hf import open_checkpoint, resolve_sections
from ttt_jax.checkpoints.open import open_model
from ttt_jax.checkpoints.resolve import resolve, resolve_run, run_sections
from ttt_jax.checkpoints.sections import Sections, with_given_fields
from ttt_jax.cli import main
from ttt_jax.cli.shared import evaluated
from ttt_jax.config import AttentionConfig, Config, ModelConfig, RopeScaling, TTTConfig
from ttt_jax.config.recorded import record_config
from ttt_jax.config.yaml import dump_config, load_config, load_fields

# As few fields as can be have their default.
MODEL = ModelConfig(
  vocab_size=19,
  num_layers=3,
  d_model=12,
  d_ff=20,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  rope_theta=5e5,
  rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=64),
  max_positions=256,
  norm_eps=1e-5,
  qk_norm=True,
  tie_embeddings=False,
  bos_id=1,
  eos_ids=(2, 3),
)
ATTENTION = AttentionConfig(window=9, full_layers=(1,))
TTT = TTTConfig(
  layers=(0, 2),
  chunk_size=8,
  target="hidden_states",
  normalize_target=False,
  conv_width=3,
  init="identity",
  inner_lr=0.3,
  inner_lr_scale="fixed",
  decay=0.9,
  clip_norm=2.0,
)
LEAST_SQUARES = TTTConfig(
  layers=(0, 2),
  chunk_size=8,
  target="hidden_states",
  conv_width=3,
  init="next_token",
  half_life=40.0,
  learn_half_life=True,
  rule="least_squares",
  ridge=0.3,
  read_scale=2.0,
  learn_read_scale=False,
  read_gate="key",
  gate_threshold=0.5,
  gate_sharpness=9.0,
  learn_gate=False,
  key_rank=6,
)
MEMORIES = {"sum": TTT, "least_squares": LEAST_SQUARES}
# A legal value of every field, neither its default nor that of a model above.
OTHER = {
  "model": {
    "vocab_size": 23,
    "num_layers": 2,
    "d_model": 24,
    "d_ff": 28,
    "num_heads": 1,
    "num_kv_heads": 2,
    "head_dim": 16,
    "rope_theta": 3e4,
    "rope_scaling": {"kind": "llama3", "factor": 2.0, "original_max_positions": 32},
    "max_positions": 512,
    "norm_eps": 3e-5,
    "qk_norm": False,
    "attention_bias": "qkv",
    "tie_embeddings": True,
    "bos_id": 4,
    "eos_ids": [5],
    "param_dtype": "bfloat16",
    "dtype": "bfloat16",
    "state_dtype": "float64",
    "remat": "minimal",
  },
  "attention": {
    "window": 7,
    "full_layers": [0],
    "implementation": "xla",
    "balance": False,
    "mixer": "gla",
    "mixer_layers": [0],
    "short_conv": 3,
  },
  "ttt": {
    "layers": [1],
    "chunk_size": 16,
    "target": "input_embed",
    "normalize_target": True,
    "conv_width": 7,
    "projection": False,
    "init": "current_token",
    "inner_lr": 0.7,
    "inner_lr_scale": "fixed",
    "learn_inner_lr": False,
    "decay": 0.8,
    "half_life": 80.0,
    "learn_half_life": True,
    "clip_norm": 3.0,
    "implementation": "dual",
    "merge": False,
    "collective": "ring",
    "wire_dtype": "bfloat16",
    "ridge": 0.7,
    "read_scale": 3.0,
    "learn_read_scale": False,
    "read_gate": "leverage",
    "gate_threshold": 0.7,
    "gate_sharpness": 5.0,
    "learn_gate": False,
    "key_rank": 4,
    "rule": "least_squares",
  },
}
# Fields that a checkpoint fixes: another value is an error.
FIXED = {
  "model": OTHER["model"].keys()
  - {
    "rope_theta",
    "rope_scaling",
    "max_positions",
    "param_dtype",
    "dtype",
    "state_dtype",
    "remat",
  },
  "attention": OTHER["attention"].keys() - {"implementation", "balance"},
  "ttt": set(),
}
_LEAST_SQUARES_ONLY = {
  "ridge",
  "read_scale",
  "learn_read_scale",
  "read_gate",
  "gate_threshold",
  "gate_sharpness",
  "learn_gate",
  "key_rank",
}
# Given fields of `ttt` that contradict what the model has, by memory: the error names them.
CONTRARY = {
  "sum": {"init", "learn_half_life", *_LEAST_SQUARES_ONLY},
  "least_squares": {"init", "inner_lr", "inner_lr_scale", "learn_inner_lr", "clip_norm", "merge"},
}
# Fields that end with a given value: they belong to what it replaces.
ENDED = {
  ("sum", "half_life", 80.0): {"decay"},
  ("sum", "rule", "least_squares"): {"inner_lr", "inner_lr_scale", "clip_norm"},
  ("least_squares", "decay", 0.8): {"half_life", "learn_half_life"},
  ("least_squares", "half_life", None): {"learn_half_life"},
  ("least_squares", "read_gate", "none"): {"gate_threshold", "gate_sharpness", "learn_gate"},
  ("least_squares", "rule", "sum"): _LEAST_SQUARES_ONLY,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
  """Makes a Hugging Face directory for each memory, whose models have fast weights."""
  root = tmp_path_factory.mktemp("models")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the published keys cannot express all of it
    for name, ttt in MEMORIES.items():
      save_pretrained(random_model(MODEL, ATTENTION, ttt), root / name)
  return root


@pytest.fixture
def checkpoint(checkpoints):
  return checkpoints / "sum"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "plain"
  save_pretrained(random_model(MODEL, ATTENTION, TTTConfig()), path)
  return path


def _cases():
  """Yields (section, field, value): every field with its default and with another value."""
  for section, cls in (("model", ModelConfig), ("attention", AttentionConfig), ("ttt", TTTConfig)):
    assert OTHER[section].keys() == {field.name for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
      default = field.default
      yield section, field.name, list(default) if isinstance(default, tuple) else default
      yield section, field.name, OTHER[section][field.name]


CASES = list(_cases())


def _own(memory: str) -> Sections:
  return Sections(MODEL, ATTENTION, MEMORIES[memory])


def _stored(memory: str, section: str, field: str):
  value = getattr(getattr(_own(memory), section), field)
  return list(value) if isinstance(value, tuple) else value


def _contradicts(memory: str, section: str, field: str, value) -> bool:
  """Tells whether a given value must be an error that names it."""
  if section == "ttt":
    default = type(MEMORIES[memory]).__dataclass_fields__[field].default
    return field in CONTRARY[memory] and value != default
  if field == "head_dim" and value is None:
    return MODEL.d_model // MODEL.num_heads != MODEL.head_dim
  return field in FIXED[section] and value != _stored(memory, section, field)


def _check_counts(sections: Sections, memory: str, section: str, field: str, value) -> None:
  """Checks that the given value is in the sections, and that all else is the model's own."""
  own = {name: dataclasses.asdict(x) for name, x in _own(memory)._asdict().items()}
  if field == "rope_scaling" and value is not None:
    value = dataclasses.asdict(RopeScaling(**value))
  if field == "init" and value is None:
    value = "identity"  # null leaves it to the kind of model
  if value is None or isinstance(value, str | float):
    for ended in ENDED.get((memory, field, value), ()):
      own["ttt"][ended] = TTTConfig.__dataclass_fields__[ended].default
  own[section][field] = tuple(value) if isinstance(value, list) else value
  found = {name: dataclasses.asdict(x) for name, x in sections._asdict().items()}
  for name in own:
    assert found[name] == own[name]


def _yaml(value) -> str:
  if isinstance(value, dict):
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
  return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("section", "field", "value"), CASES)
def test_a_given_field_counts_or_is_named(checkpoints, memory, section, field, value):
  """Checks `train`, `eval` and `plan`, which resolve a config, and `generate`, `convert`, `eval ruler`."""
  words = [f"--{section}.{field}", _yaml(value)]
  row = ["--data.seq_len", "1536", "--init_from", str(checkpoints / memory)]
  opened = open_checkpoint(checkpoints / memory)
  for read in (
    lambda: resolve(load_config(None, [*row, *words])),
    lambda: resolve_sections(opened, load_fields(None, words)),
  ):
    if _contradicts(memory, section, field, value):
      with pytest.raises(UserError, match=rf"{section}\.{field}"):
        read()
    else:
      resolved = read()
      sections = Sections(resolved.model, resolved.attention, resolved.ttt)
      _check_counts(sections, memory, section, field, value)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("section", "field", "value"), CASES)
def test_a_run_is_a_checkpoint_like_others(tmp_path, memory, section, field, value):
  recorded = Config(model=MODEL, attention=ATTENTION, ttt=MEMORIES[memory])
  (tmp_path / "config.yaml").write_text(dump_config(recorded) + "# end of the config\n")
  words = [f"--{section}.{field}", _yaml(value)]

  def evaluated_config():
    config, is_run = evaluated(
      argparse.Namespace(
        config=str(tmp_path), overrides=[*words, "--data.seq_len", "1536"], unused=()
      )
    )
    assert is_run
    return resolve_run(config)

  for read in (evaluated_config, lambda: run_sections(tmp_path, load_fields(None, words))):
    try:
      resolved = read()
    except UserError as error:
      message = str(error)
      assert f"{section}.{field}" in message
      changes_parameters = "would change which parameters" in message
      assert changes_parameters or _contradicts(memory, section, field, value)
    else:
      assert not _contradicts(memory, section, field, value)
      sections = Sections(resolved.model, resolved.attention, resolved.ttt)
      if (section, field, value) == ("ttt", "init", None):
        assert sections.ttt.init in (None, MEMORIES[memory].init)
      else:
        _check_counts(sections, memory, section, field, value)


def test_a_dataclass_counts_by_what_it_was_given(checkpoint):
  config = Config(
    init_from=str(checkpoint), model=ModelConfig(num_layers=3), ttt=TTTConfig(decay=0.5)
  )
  resolved = resolve(config)
  assert resolved.model == MODEL
  assert resolved.ttt == dataclasses.replace(TTT, decay=0.5)
  assert resolve(resolved) == resolved
  with pytest.raises(UserError, match=r"model\.d_model=96, but .* has 12"):
    resolve(Config(init_from=str(checkpoint), model=ModelConfig(d_model=96)))


def test_load_pretrained_takes_a_section_or_fields_over_it(checkpoint):
  assert load_pretrained(checkpoint, ttt={"chunk_size": 4}).ttt == dataclasses.replace(
    TTT, chunk_size=4
  )
  assert load_pretrained(checkpoint, ttt={}).ttt == TTT
  with pytest.warns(UserWarning, match="left out"):
    assert load_pretrained(checkpoint, ttt=TTTConfig(chunk_size=4)).ttt == TTTConfig(chunk_size=4)
  with pytest.raises(UserError, match="ttt has no field chunk, only "):
    load_pretrained(checkpoint, ttt={"chunk": 4})


def test_the_start_of_trained_parameters_cannot_be_given(checkpoint, tmp_path):
  for ttt in (
    {"init": "current_token"},
    TTTConfig(layers=(2,), conv_width=3, init="current_token"),
  ):
    with pytest.raises(
      UserError, match=r"ttt\.init='current_token' sets how parameters start, but"
    ):
      load_pretrained(checkpoint, ttt=ttt)
  with pytest.warns(UserWarning, match="left out"):
    load_pretrained(checkpoint, ttt=TTTConfig(layers=(2,), conv_width=3, init="identity"))
  # In a run that began with a new model, null is "next_token".
  scratch = dataclasses.replace(TTT, init=None)
  record_config(tmp_path, Config(model=MODEL, attention=ATTENTION, ttt=scratch))
  run_sections(tmp_path, {"ttt": {"init": "next_token"}})
  with pytest.raises(
    UserError, match=r"ttt\.init='identity' sets how parameters start, but the run"
  ):
    run_sections(tmp_path, {"ttt": {"init": "identity"}})


def test_fields_inside_a_field_are_merged():
  own = Sections(MODEL, ATTENTION, TTT)
  given = load_config(None, ["--init_from", "x", "--model.rope_scaling.factor", "8"]).model
  for scaling in (given.rope_scaling, {"factor": 8.0}):
    merged = with_given_fields(
      own, {"model": {"rope_scaling": scaling}}, source="it"
    ).model.rope_scaling
    assert merged == dataclasses.replace(MODEL.rope_scaling, factor=8.0)


@pytest.mark.parametrize("words", [["--ttt.collective", "ring"], ["--ttt.chunk_size", "512"]])
def test_a_field_of_fast_weights_without_any_is_refused(plain, words, capsys, tmp_path):
  name = words[0][2:]
  for command in (
    ["eval", str(plain)],
    ["convert", str(plain), str(tmp_path / "x")],
  ):
    assert main([*command, *words]) == 2
    assert f"{name}=" in (error := capsys.readouterr().err)
    assert "has no fast weights: give ttt.layers too" in error
  with pytest.raises(UserError, match=f"{name}=.* has no fast weights"):
    open_model(plain, fields=load_fields(None, words))  # as `generate` and `eval ruler` do


def test_without_fast_weights_is_without(checkpoint, plain):
  """`--ttt.layers "[]"` gives the logits of the model that has none, `--ttt.collective` changes nothing."""
  tokens = np.arange(2 * 24, dtype=np.int32).reshape(2, 24) % MODEL.vocab_size
  with pytest.warns(UserWarning, match="left out"):
    without = open_model(checkpoint, fields={"ttt": {"layers": []}})
  fast = open_model(checkpoint)
  assert without.ttt.layers == ()
  same = open_model(checkpoint, fields=load_fields(None, ["--ttt.collective", "ring"]))
  logits = jax.jit(lambda model: model(tokens))
  assert np.array_equal(logits(same), logits(fast))
  assert not np.allclose(logits(without), logits(fast))


def test_only_fields_of_the_model_may_be_given_to_a_model(checkpoint, capsys):
  assert main(["generate", str(checkpoint), "--prompt", "x", "--train.steps", "3"]) == 2
  assert "--train.steps cannot be given here, only fields of model" in capsys.readouterr().err
