"""Tests the one rule for opening a model: a given field counts, or an error names it."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest
from helpers import random_model

from ttt_jax import UserError, load_pretrained, save_pretrained
from ttt_jax.checkpoints.hf import open_checkpoint, resolve_sections
from ttt_jax.checkpoints.open import open_model
from ttt_jax.checkpoints.resolve import resolve, resolve_run
from ttt_jax.checkpoints.sections import Sections, with_given_fields
from ttt_jax.cli import main
from ttt_jax.config import AttentionConfig, Config, ModelConfig, RopeScaling, TTTConfig
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
OTHER = {
  "num_layers": 2,
  "rope_scaling": {"kind": "llama3", "factor": 2.0, "original_max_positions": 32},
  "state_dtype": "bfloat16",
  "dtype": "bfloat16",
  "param_dtype": "bfloat16",
  "remat": "minimal",
  "attention_bias": "qkv",
  "mixer": "gla",
  "mixer_layers": [0],
  "implementation": "dual",
  "collective": "ring",
  "wire_dtype": "bfloat16",
  "init": "next_token",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Makes a Hugging Face directory whose model has fast weights."""
  path = tmp_path_factory.mktemp("models") / "fast"
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the published keys cannot express all of it
    save_pretrained(random_model(MODEL, ATTENTION, TTT), path)
  return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  path = tmp_path_factory.mktemp("models") / "plain"
  save_pretrained(random_model(MODEL, ATTENTION, TTTConfig()), path)
  return path


def _cases():
  """Yields (section, field, value): every field with its default and with another value."""
  for section, cls in (("model", ModelConfig), ("attention", AttentionConfig), ("ttt", TTTConfig)):
    for field in dataclasses.fields(cls):
      yield section, field.name, field.default
      yield section, field.name, OTHER.get(field.name, _other(field.default))


def _other(default):
  if isinstance(default, bool) or default is None:
    return not default
  if isinstance(default, int | float):
    return default * 3
  return [1] if default == () else f"no {default}"


CASES = [(s, f, list(v) if isinstance(v, tuple) else v) for s, f, v in _cases()]


def _counts(sections: Sections, section: str, field: str, value) -> bool:
  """Tells whether the sections have the given value."""
  got = getattr(getattr(sections, section), field)
  if field == "rope_scaling" and got is not None and value is not None:
    return all(getattr(got, name) == x for name, x in value.items())
  if field == "init" and value is None:
    return got in (None, TTT.init)  # null leaves it to the kind of model
  return (list(got) if isinstance(got, tuple) else got) == value


def _yaml(value) -> str:
  if isinstance(value, dict):
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
  return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _named(error: UserError, section: str, field: str) -> bool:
  return f"{section}.{field}" in str(error)


@pytest.mark.parametrize(("section", "field", "value"), CASES)
def test_a_given_field_counts_or_is_named(checkpoint, section, field, value):
  """Checks `train` and `eval`, which resolve a config, and `generate`, `convert` and `eval ruler`."""
  words = [f"--{section}.{field}", _yaml(value)]
  row = ["--data.seq_len", "1536", "--init_from", str(checkpoint)]
  opened = open_checkpoint(checkpoint)
  for read in (
    lambda: resolve(load_config(None, [*row, *words])),
    lambda: resolve_sections(opened, load_fields(None, words)),
  ):
    try:
      resolved = read()
    except UserError as error:
      named = _named(error, section, field)
      assert named
    else:
      sections = Sections(resolved.model, resolved.attention, resolved.ttt)
      assert _counts(sections, section, field, value), (field, value)
      # Nothing else of the model's own is lost.
      own = Sections(MODEL, ATTENTION, TTT)
      for name in ("model", "attention", "ttt"):
        ours, theirs = (dataclasses.asdict(getattr(x, name)) for x in (sections, own))
        if name == section:
          del ours[field], theirs[field]
        if field == "dtype":  # parameters follow it, unless they are given
          ours.pop("param_dtype", None), theirs.pop("param_dtype", None)
        assert ours == theirs


@pytest.mark.parametrize(("section", "field", "value"), CASES)
def test_a_run_is_a_checkpoint_like_others(tmp_path, section, field, value):
  recorded = Config(model=MODEL, attention=ATTENTION, ttt=TTT)
  (tmp_path / "config.yaml").write_text(dump_config(recorded) + "# end of the config\n")
  words = ["--run_dir", str(tmp_path), f"--{section}.{field}", _yaml(value)]
  try:
    # What a YAML file does not say is the run's.
    resolved = resolve_run(load_config(None, [*words, "--data.seq_len", "1536"]))
  except UserError as error:
    named = _named(error, section, field)
    assert named
  else:
    sections = Sections(resolved.model, resolved.attention, resolved.ttt)
    assert _counts(sections, section, field, value), (field, value)


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
