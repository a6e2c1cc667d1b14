"""Tests `ttt-jax convert` from every kind of source."""

import json

import jax
import numpy as np
from helpers import random_model

from ttt_jax import load_pretrained, load_tokenizer, save_pretrained
from ttt_jax.checkpoints.orbax import Checkpoints
from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import Config, ModelConfig
from ttt_jax.training.rundir import open_run

MODEL = ModelConfig(num_layers=2, d_model=12, d_ff=20, num_heads=2, num_kv_heads=2)


def test_directory_with_dtype_and_fast_weights(tmp_path, capsys):
  made = random_model(MODEL, None, None)
  source, destination = tmp_path / "a", tmp_path / "b"
  save_pretrained(made, source, tokenizer=byte_tokenizer())
  (source / "chat_template.jinja").write_text("{{ hello }}")
  (source / "notes.txt").write_text("not the model's")
  words = ["--dtype", "bfloat16", "--ttt.layers", "[1]", "--ttt.chunk_size", "8"]
  words += ["--ttt.normalize_target", "false", "--ttt.learn_inner_lr=false"]
  assert main(["convert", str(source), str(destination), *words]) == 0
  output = capsys.readouterr().out
  assert "in bfloat16, fast weights in [1]" in output
  assert sorted(file.name for file in destination.iterdir()) == [
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  config = json.loads((destination / "config.json").read_text())
  assert (config["ttt_layers"], config["ttt_chunk"], config["ttt_lr"]) == ([1], 8, 0.05 / 20)
  model = load_pretrained(destination)
  assert (model.ttt.layers, model.ttt.init, model.model.param_dtype) == (
    (1,),
    "identity",
    "bfloat16",
  )
  up = np.asarray(made.groups[0][0].mlp.up[0].astype("bfloat16"))
  assert np.array_equal(np.asarray(model.groups[0][0].mlp.up[0]), up)
  assert load_tokenizer(destination).encode("hé") == list("hé".encode())


def test_run_directory(tmp_path, capsys):
  config = Config(model=MODEL)
  run = tmp_path / "run"
  open_run(run, config)
  made = make_model(config)
  with Checkpoints(run / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(3, arrays={"model": made}, data_state={})
  assert main(["convert", str(run), str(tmp_path / "hf")]) == 0
  assert "written: config.json, model.safetensors, tokenizer.json" in capsys.readouterr().out
  for a, b in zip(jax.tree.leaves(load_pretrained(tmp_path / "hf")), jax.tree.leaves(made)):
    assert np.array_equal(a, b)
  assert load_tokenizer(tmp_path / "hf").decode([104, 105]) == "hi"
  assert main(["convert", str(run), str(tmp_path / "bf"), "--dtype", "bfloat16"]) == 0
  assert load_pretrained(tmp_path / "bf").embed.table.dtype == "bfloat16"
  capsys.readouterr()
  assert main(["convert", str(run), str(tmp_path / "no"), "--ttt.layers", "[0]"]) == 2
  assert "ttt.layers=[0] would change which parameters the model has" in capsys.readouterr().err
  assert not (tmp_path / "no").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
  save_pretrained(random_model(MODEL, None, None), tmp_path / "a")
  for words, message in (
    (["nowhere", "b"], "nowhere' does not exist"),
    (["a", "a"], "exists already"),
    (["a", "b", "--ttt.layer", "[1]"], "did you mean ttt.layers"),
    (["a", "b", "--train.steps", "3"], "only fields of model, attention, ttt"),
    (["a", "b", "--ttt.layers", "[5]"], "names layer 5"),
    (["a", "b", "--ttt.decay", "2"], "ttt.decay=2"),
  ):
    paths = [str(tmp_path / word) for word in words[:2]]
    assert main(["convert", *paths, *words[2:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ttt-jax convert: ")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_no_tokenizer_is_said(tmp_path, capsys):
  save_pretrained(random_model(MODEL, None, None), tmp_path / "a")
  assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
  assert "has no tokenizer" in capsys.readouterr().out.replace("\n", " ")
