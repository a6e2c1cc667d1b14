"""Tests that damaged, foreign and contradictory checkpoints each give a clear error."""

import json
import os
import sys

import numpy as np
import pytest
from helpers import random_model
from safetensors.numpy import load_file, save_file

from ttt_jax import load_pretrained, load_tokenizer, save_pretrained
from ttt_jax.checkpoints import files, gguf
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.checkpoints.ttt_config import PUBLISHED_KEYS
from ttt_jax.errors import UserError

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def path(tmp_path):
  save_pretrained(random_model(ttt=None), tmp_path / "a")
  return tmp_path / "a"


@pytest.fixture
def sharded(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "SHARD_BYTES", 2500)
  save_pretrained(random_model(ttt=None), tmp_path / "b")
  return tmp_path / "b"


def edit(path, **changes):
  tensors = load_file(path / "model.safetensors")
  for name, value in changes.items():
    if value is None:
      del tensors[name]
    else:
      tensors[name] = value
  save_file(tensors, path / "model.safetensors")


def test_every_misfit_is_listed_at_once(path):
  wrong = np.zeros((3, 2), np.float32)
  edit(path, **{Q0: wrong, "model.norm.weight": None, "model.surprise": wrong})
  with pytest.raises(ValueError, match="3 tensors do not fit") as error:
    load_pretrained(path)
  message = str(error.value)
  assert f"{Q0}: [24, 12] expected, [3, 2] in the checkpoint" in message
  assert "model.norm.weight: [12] expected, missing in the checkpoint" in message
  assert "model.surprise: [3, 2] in the checkpoint, not expected" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_numbers_are_named(path, value):
  tensors = load_file(path / "model.safetensors")
  tensors[Q0][3, 2] = value
  tensors["model.norm.weight"][0] = value
  edit(path, **{name: tensors[name] for name in (Q0, "model.norm.weight")})
  with pytest.raises(ValueError, match="2 tensors hold NaN or infinities") as error:
    load_pretrained(path)
  assert Q0 in str(error.value)
  assert "model.norm.weight" in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_safetensors(path, keep):
  file = path / "model.safetensors"
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"model\.safetensors is cut short or damaged"):
    load_pretrained(path)


def test_a_file_that_cannot_be_read_is_not_called_damaged(path, tmp_path, monkeypatch):
  """Nobody should download a model again for want of a permission."""

  def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(files, "safe_open", refuse)
  with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: .*Permission denied$"):
    load_pretrained(path)
  monkeypatch.setattr(gguf, "GGUFReader", refuse)
  (tmp_path / "x.gguf").touch()
  with pytest.raises(ValueError, match=r"x\.gguf cannot be read: .*Permission denied$"):
    load_pretrained(tmp_path / "x.gguf")


def test_integers_are_refused(path):
  edit(path, **{Q0: np.zeros((24, 12), np.int8)})
  with pytest.raises(NotImplementedError, match="dtype I8: there are F64, F32, F16, BF16"):
    load_pretrained(path)


def test_pickles_are_refused(path):
  os.rename(path / "model.safetensors", path / "pytorch_model.bin")
  with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle, which could execute code"):
    load_pretrained(path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_config_that_is_no_object(path, text):
  (path / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json (is not|holds no) JSON"):
    load_pretrained(path)


def test_no_config(path):
  (path / "config.json").unlink()
  with pytest.raises(ValueError, match=r"config\.json does not exist"):
    load_pretrained(path)


def rename_in_index(path, new):
  index = json.loads((path / files.INDEX).read_text())
  old = index["weight_map"][Q0]
  for name, file in index["weight_map"].items():
    if file == old:
      index["weight_map"][name] = str(new)
  (path / files.INDEX).write_text(json.dumps(index))
  return path / old


def test_index_names_a_file_that_is_not_there(sharded):
  rename_in_index(sharded, "model-9.safetensors")
  with pytest.raises(ValueError, match=r"names 'model-9\.safetensors', which is not there"):
    load_pretrained(sharded)


def test_index_names_a_tensor_that_is_not_there(sharded):
  index = json.loads((sharded / files.INDEX).read_text())
  index["weight_map"]["lost"] = index["weight_map"][Q0]
  (sharded / files.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match="names 1 tensors that are in none of its files, lost"):
    load_pretrained(sharded)


@pytest.mark.parametrize("way", ["parent", "absolute", "link"])
def test_index_may_not_leave_its_directory(sharded, tmp_path, way):
  outside = tmp_path / "outside.safetensors"
  name = {"parent": "../outside.safetensors", "absolute": outside, "link": "link.safetensors"}[way]
  old = rename_in_index(sharded, name)
  os.rename(old, outside)
  if way == "link":
    (sharded / "link.safetensors").symlink_to(outside)
  with pytest.raises(ValueError, match=r"which lies outside of .*: it is not read"):
    load_pretrained(sharded)


def test_a_hub_cache_links_to_its_blobs(sharded, tmp_path):
  snapshot, blobs = (
    tmp_path / "models--a--b" / "snapshots" / "1",
    tmp_path / "models--a--b" / "blobs",
  )
  snapshot.parent.mkdir(parents=True)
  os.rename(sharded, snapshot)
  blobs.mkdir()
  for file in list(snapshot.iterdir()):
    os.rename(file, blobs / file.name)
    file.symlink_to(blobs / file.name)
  load_pretrained(snapshot)


def test_paths_that_do_not_exist(tmp_path, monkeypatch):
  for name in (tmp_path / "nothing", "./nothing/here", "a/b/c"):
    with pytest.raises(ValueError, match="does not exist: give a directory"):
      load_pretrained(name)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(
    ValueError, match=r"'org/name' does not exist; .* pip install huggingface_hub"
  ):
    load_pretrained("org/name")


def test_another_file(tmp_path):
  (tmp_path / "x.bin").write_bytes(b"x")
  with pytest.raises(ValueError, match=r"neither a directory nor a \.gguf file"):
    load_pretrained(tmp_path / "x.bin")


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"ttt_mode": True, "ttt_layers": [0]}, "ttt_mode but lacks ttt_chunk, ttt_lr"),
    (dict.fromkeys(PUBLISHED_KEYS, "0"), "ttt_layers='0' must be a list of integers"),
    (
      {
        "ttt_mode": True,
        "ttt_layers": [0],
        "ttt_chunk": 4,
        "ttt_lr": 0.1,
        "ttt_proj": True,
        "ttt_target": "input_embed",
        "ttt_clip_tau": 1e-5,
      },
      "also ttt_clip_tau, which ttt_jax does not know: pass ttt=TTTConfig",
    ),
  ],
)
def test_published_keys_are_not_guessed(path, keys, message):
  config = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(config | keys))
  with pytest.raises(ValueError, match=message):
    load_pretrained(path)


def test_tokenizer_of_another_model(path, tmp_path):
  byte_tokenizer().save(path)
  with pytest.raises(ValueError, match=r"has 256 tokens, .*config\.json only vocab_size=17"):
    load_tokenizer(path)
  with pytest.raises(ValueError, match="has 256 tokens, the model only vocab_size=17"):
    save_pretrained(random_model(ttt=None), tmp_path / "c", tokenizer=byte_tokenizer())
  assert not (tmp_path / "c").exists()


def test_no_tokenizer_or_a_damaged_one(path):
  with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
    load_tokenizer(path)
  (path / "tokenizer.json").write_text("{")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
    load_tokenizer(path)


def test_a_run_directory_is_named_for_what_it_is(tmp_path):
  (tmp_path / "config.yaml").write_text("name: x")
  with pytest.raises(UserError, match=rf"is a run directory .*`ttt-jax convert {tmp_path} NEW"):
    load_pretrained(tmp_path)
