"""Tests saving: other libraries load it, we load it exactly, no partial files, nothing overwritten."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, mesh_of, random_model
from safetensors.numpy import load_file

from ttt_jax import load_pretrained, save_pretrained
from ttt_jax.checkpoints import files
from ttt_jax.config import AttentionConfig, RopeScaling, TTTConfig
from ttt_jax.parallel.mesh import sharding

PLAIN = dataclasses.replace(MODEL, qk_norm=False)
PUBLISHED = TTTConfig(
  layers=(0, 2),
  chunk_size=4,
  inner_lr=0.1,
  inner_lr_scale="fixed",
  learn_inner_lr=False,
  normalize_target=False,
)


def config_of(path):
  return json.loads((path / "config.json").read_text())


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    assert np.array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
  ("model", "attention", "architecture"),
  [
    (PLAIN, AttentionConfig(), "LlamaForCausalLM"),
    (
      dataclasses.replace(
        PLAIN,
        attention_bias="qkvo",
        tie_embeddings=False,
        eos_ids=(1, 2),
        bos_id=0,
        max_positions=64,
        param_dtype="bfloat16",
        dtype="bfloat16",
        rope_scaling=RopeScaling("yarn", 4.0, original_max_positions=16),
      ),
      AttentionConfig(),
      "LlamaForCausalLM",
    ),
    (PLAIN, AttentionConfig(window=5), "MistralForCausalLM"),
    (
      dataclasses.replace(PLAIN, attention_bias="qkv"),
      AttentionConfig(window=5, full_layers=(1,)),
      "Qwen2ForCausalLM",
    ),
    (MODEL, AttentionConfig(window=5, full_layers=(0, 3)), "Qwen3ForCausalLM"),
    (dataclasses.replace(MODEL, attention_bias="qkvo"), AttentionConfig(), "Qwen3ForCausalLM"),
  ],
)
def test_architectures_round_trip(tmp_path, model, attention, architecture):
  made = random_model(model, attention, TTTConfig())
  save_pretrained(made, tmp_path / "a")
  assert config_of(tmp_path / "a")["architectures"] == [architecture]
  assert_same(load_pretrained(tmp_path / "a"), made)


@pytest.mark.parametrize("rate", [{}, {"inner_lr": 0.3, "inner_lr_scale": "1/F"}])
def test_published_keys_and_our_section(tmp_path, rate):
  ttt = dataclasses.replace(PUBLISHED, **rate)
  made = random_model(ttt=ttt)
  save_pretrained(made, tmp_path / "a")
  config = config_of(tmp_path / "a")
  assert {key: config[key] for key in config if key.startswith("ttt_") and key != "ttt_jax"} == {
    "ttt_mode": True,
    "ttt_layers": [0, 2],
    "ttt_chunk": 4,
    "ttt_lr": 0.3 / 20 if rate else 0.1,
    "ttt_proj": True,
    "ttt_target": "input_embed",
  }
  again = load_pretrained(tmp_path / "a")
  assert again.ttt == ttt
  assert_same(again, made)


def test_learned_half_lives_are_not_lost(tmp_path):
  ttt = dataclasses.replace(PUBLISHED, half_life=24.0, learn_half_life=True)
  made = random_model(ttt=ttt)
  with pytest.warns(UserWarning, match=r"ttt\.half_life=24"):
    save_pretrained(made, tmp_path / "a")
  again = load_pretrained(tmp_path / "a")
  assert again.ttt == ttt
  assert_same(again, made)


def test_learned_rates_are_not_lost(tmp_path):
  """Rates that differ cannot be said in the published format: then nothing is, and a warning says so."""
  ttt = dataclasses.replace(PUBLISHED, learn_inner_lr=True)
  made = random_model(ttt=ttt)
  with pytest.warns(UserWarning, match=r"without TTT.*learned inner rates from 0\.\d+ to 0\.\d+"):
    save_pretrained(made, tmp_path / "a")
  config = config_of(tmp_path / "a")
  assert "ttt_mode" not in config
  again = load_pretrained(tmp_path / "a")
  assert again.ttt == ttt
  assert_same(again, made)
  # One rate for all can be said.
  one = dataclasses.replace(ttt, layers=(1,))
  made = random_model(ttt=one)
  save_pretrained(made, tmp_path / "b")
  g, p, r = made.layers()[1]
  learned = float(made.groups[g][p].mlp.log_rate[r])
  rate = config_of(tmp_path / "b")["ttt_lr"]
  assert rate != 0.1
  assert rate == pytest.approx(0.1 * np.exp(10 * learned))
  assert_same(load_pretrained(tmp_path / "b"), made)


@pytest.mark.parametrize(
  ("field", "value", "reason"),
  [
    ("normalize_target", True, r"ttt\.normalize_target=true"),
    ("conv_width", 3, r"ttt\.conv_width=3 \(there it is 5\)"),
    ("decay", 0.9, r"ttt\.decay=0\.9"),
    ("half_life", 24.0, r"ttt\.half_life=24\.0"),
    ("clip_norm", 1.0, r"ttt\.clip_norm=1\.0"),
  ],
)
def test_what_the_published_code_cannot_express_it_is_not_told(tmp_path, field, value, reason):
  ttt = dataclasses.replace(PUBLISHED, **{field: value})
  made = random_model(ttt=ttt)
  with pytest.warns(UserWarning, match=f"will read this checkpoint without TTT.*{reason}"):
    save_pretrained(made, tmp_path / "a")
  assert not [key for key in config_of(tmp_path / "a") if key in ("ttt_mode", "ttt_layers")]
  again = load_pretrained(tmp_path / "a")
  assert again.ttt == ttt
  assert_same(again, made)


@pytest.mark.parametrize("change", [{"ttt_lr": 0.2}, {"ttt_mode": False}, {"ttt_clip": 1.0}])
def test_keys_changed_beside_our_section_are_refused(tmp_path, change):
  save_pretrained(random_model(ttt=PUBLISHED), tmp_path / "a")
  config = config_of(tmp_path / "a") | change
  (tmp_path / "a" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="says two things"):
    load_pretrained(tmp_path / "a")
  assert load_pretrained(tmp_path / "a", ttt=PUBLISHED).ttt.inner_lr == 0.1


def test_several_files(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "SHARD_BYTES", 2500)
  made = random_model(ttt=PUBLISHED)
  save_pretrained(made, tmp_path / "a")
  index = json.loads((tmp_path / "a" / files.INDEX).read_text())
  names = sorted(set(index["weight_map"].values()))
  assert len(names) > 3
  assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
  total = 0
  for name in names:
    tensors = load_file(tmp_path / "a" / name)
    assert set(tensors) == {t for t, file in index["weight_map"].items() if file == name}
    size = sum(x.nbytes for x in tensors.values())
    assert size <= 2500 or len(tensors) == 1
    total += size
  assert index["metadata"]["total_size"] == total == sum(x.nbytes for x in jax.tree.leaves(made))
  assert_same(load_pretrained(tmp_path / "a"), made)


def test_from_a_mesh(tmp_path):
  made = random_model(ttt=PUBLISHED)
  save_pretrained(jax.device_put(made, sharding(mesh_of(2, 4))), tmp_path / "a")
  assert_same(load_pretrained(tmp_path / "a"), made)


def test_nothing_is_written_over(tmp_path):
  path = tmp_path / "a"
  path.mkdir()
  (path / "mine.txt").write_text("x")
  with pytest.raises(ValueError, match="exists already: nothing is written over it"):
    save_pretrained(random_model(), path)
  assert os.listdir(tmp_path) == ["a"]
  assert os.listdir(path) == ["mine.txt"]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_failed_write_leaves_nothing(tmp_path, broken):
  model = random_model(ttt=PUBLISHED)
  model.norm.scale[...] = model.norm.scale[...].at[0].set(jnp.float32(broken))
  (tmp_path / "a").mkdir()  # an empty directory may be filled
  with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinities"):
    save_pretrained(model, tmp_path / "a")
  assert os.listdir(tmp_path) == ["a"]
  assert not os.listdir(tmp_path / "a")
  save_pretrained(random_model(ttt=PUBLISHED), tmp_path / "a")
  assert "config.json" in os.listdir(tmp_path / "a")
