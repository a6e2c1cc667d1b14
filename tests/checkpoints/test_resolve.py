"""Tests runs that start from a pretrained model: config, first step and output."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from helpers import MODEL, mesh_of, random_model, random_rows
from tokenizers import decoders, pre_tokenizers, trainers

from ttt_jax import load_pretrained, save_pretrained
from ttt_jax.checkpoints.resolve import initial_model, resolve
from ttt_jax.checkpoints.tokenizer import Tokenizer, load_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import (
  AttentionConfig,
  Config,
  DataConfig,
  ModelConfig,
  RopeScaling,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.config.yaml import dump_config, load_config
from ttt_jax.data import load_corpus
from ttt_jax.nn.loss import token_losses
from ttt_jax.training.trainable import trained_parameters

TEXT = "to learn while reading is to be fast and to be fast is to learn "
SIZES = dataclasses.replace(MODEL, vocab_size=300, num_layers=2, norm_eps=1e-5)
# A checkpoint's window may be longer than the rows.
LAYERS = AttentionConfig(window=40, full_layers=(1,))
TTT = TTTConfig(layers=(1,), chunk_size=8, target="hidden_states")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """Makes a Hugging Face directory with a random model and a tokenizer of pairs and more."""
  path = tmp_path_factory.mktemp("models") / "small"
  save_pretrained(random_model(SIZES, LAYERS, TTTConfig()), path)
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
  backend.train_from_iterator([TEXT], trainer)
  Tokenizer(backend).save(path)
  return path


def _config(path, **sections):
  return Config(
    init_from=str(path),
    ttt=TTT,
    data=DataConfig(seq_len=32),
    train=TrainConfig(trainable="ttt", warmup_steps=0),
    **sections,
  )


def test_the_model_is_the_checkpoints(pretrained):
  given = ModelConfig(
    num_layers=2, norm_eps=1e-5 * (1 + 1e-8), remat="none", state_dtype="bfloat16"
  )
  config = resolve(_config(pretrained, model=given))
  assert config.model == dataclasses.replace(SIZES, remat="none", state_dtype="bfloat16")
  assert config.attention == LAYERS
  assert config.ttt == dataclasses.replace(TTT, init="identity")
  assert config.tokenizer == str(pretrained)
  # What is recorded of a run is a config that says the same.
  assert resolve(config) == config
  plain = Config()
  assert resolve(plain) is plain


def test_recorded_config_reads_back(pretrained, tmp_path):
  config = resolve(_config(pretrained))
  (tmp_path / "config.yaml").write_text(dump_config(config))
  assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    ({"model": ModelConfig(d_ff=32)}, r"model\.d_ff=32, but the model of .* has 20: leave"),
    ({"model": ModelConfig(norm_eps=5.0)}, r"model\.norm_eps=5\.0, but .* has 1e-05"),
    ({"attention": AttentionConfig(window=9)}, r"attention\.window=9, but .* has 40"),
  ],
)
def test_a_field_that_contradicts_the_checkpoint_is_named(pretrained, sections, message):
  with pytest.raises(ValueError, match=message):
    resolve(_config(pretrained, **sections))


def test_positions_may_be_stretched(pretrained):
  """Overrides the checkpoint's fields of positions by the config, which the model follows."""
  stretched = ModelConfig(
    rope_theta=5e5,
    max_positions=512,
    rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=128),
  )
  config = resolve(_config(pretrained, model=stretched))
  assert config.model == dataclasses.replace(
    SIZES,
    rope_theta=5e5,
    max_positions=512,
    rope_scaling=stretched.rope_scaling,
  )
  mesh = mesh_of(1, 1)
  model = initial_model(config, mesh)
  assert model.model == config.model
  plain = initial_model(resolve(_config(pretrained)), mesh)
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True):
    assert np.array_equal(a, b)
  tokens = np.arange(SIZES.vocab_size, dtype=np.int32)[None]
  assert not np.allclose(model(tokens), plain(tokens))


def test_what_does_not_fit_the_checkpoint_is_refused(pretrained, tmp_path):
  config = _config(pretrained)
  with pytest.raises(ValueError, match=r"ttt\.layers=\[2\] names layer 2.*num_layers=2"):
    resolve(dataclasses.replace(config, ttt=dataclasses.replace(TTT, layers=(2,))))
  with pytest.raises(ValueError, match=r"train\.trainable='ttt' .* names none"):
    resolve(dataclasses.replace(config, ttt=TTTConfig()))
  with pytest.raises(ValueError, match=r"init_from='no/model\.gguf' does not exist"):
    resolve(dataclasses.replace(config, init_from="no/model.gguf"))


def test_fast_weights_the_checkpoint_does_not_speak_of_are_refused(tmp_path):
  model = random_model(SIZES, LAYERS, dataclasses.replace(TTT, normalize_target=False))
  save_pretrained(model, tmp_path / "merged")
  file = tmp_path / "merged" / "config.json"
  config = json.loads(file.read_text())
  file.write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("ttt_")}))
  with pytest.raises(
    ValueError, match=r"fast weights .* does not say how they learn .* section ttt"
  ):
    resolve(Config(init_from=str(tmp_path / "merged"), data=DataConfig(seq_len=32)))


def test_it_starts_bit_for_bit_as_the_model_was(pretrained):
  config = resolve(_config(pretrained))
  model = initial_model(config, mesh_of(1, 1))
  assert model.ttt.target == "hidden_states"
  conv = trained_parameters(model, "ttt")["groups/0/1/mlp/conv/value"]
  assert not np.any(conv)
  tokens, segment_ids, _ = random_rows(2, 32, vocab=300)
  forward = jax.jit(lambda model: model(tokens, segment_ids))
  assert np.array_equal(forward(model), forward(load_pretrained(pretrained)))


CONFIG = """
name: continual
init_from: {model}
ttt: {{layers: [1], chunk_size: 8, target: hidden_states, inner_lr: 5.0}}
data: {{path: {data}, seq_len: 32, heldout_fraction: 0.3}}
train: {{trainable: ttt, steps: 2, warmup_steps: 0, learning_rate: 0.1}}
eval: {{before: true, seq_len: 64, documents: 2, buckets: 2, prompt_tokens: 9, sample_tokens: 4}}
"""


def test_train_and_eval_from_the_command_line(pretrained, tmp_path, capsys):
  """Trains on the model's tokens, and evaluates before and after at twice the length of the rows."""
  data = tmp_path / "text"
  data.mkdir()
  for i in range(6):
    (data / f"{i}.txt").write_text(f"{i} " + TEXT * 20)
  file, run_dir = tmp_path / "continual.yaml", tmp_path / "run"
  file.write_text(CONFIG.format(model=pretrained, data=data))
  with jax.numpy_dtype_promotion("standard"):
    assert main(["train", str(file), "--run_dir", str(run_dir)]) == 0
  output = capsys.readouterr().out
  assert "parameters trained (ttt)" in output
  assert "before" in output

  summary = json.loads((run_dir / "summary.json").read_text())
  table = summary["heldout_by_position"]
  assert (table[0]["from"], table[-1]["to"]) == (0, 63)
  for row in table:
    # The convolution starts at 0, and only it, the projection and the inner rate have moved.
    assert row["loss_before"] == row["loss_before_updates_off"] == row["loss_updates_off"]
    assert row["loss_baseline"] is None
  assert table[1]["loss"] != table[1]["loss_before"]
  assert table[0]["loss_before"] > summary["heldout_loss_before"] > table[1]["loss_before"]

  # Six documents of equal length: tokens, not bytes.
  tokenizer = load_tokenizer(pretrained)
  count = len(tokenizer.encode("0 " + TEXT * 20))
  assert count < len(TEXT * 20) / 2
  assert f"({count * summary['heldout_documents']:,} tokens)" in output
  texts = [f"{i} " + TEXT * 20 for i in range(6)]
  assert summary["sample"]["prompt"] in [tokenizer.decode(tokenizer.encode(t)[:9]) for t in texts]

  recorded = load_config(run_dir / "config.yaml")
  assert recorded.model == SIZES
  with jax.numpy_dtype_promotion("standard"):
    assert main(["eval", str(run_dir / "config.yaml"), "--run_dir", str(run_dir)]) == 0
  assert json.loads((run_dir / "summary.json").read_text()) == summary
  # The same command goes on, another model may not.
  with jax.numpy_dtype_promotion("standard"):
    words = ["--run_dir", str(run_dir), "--eval.documents", "1", "--eval.before", "false"]
    assert main(["train", str(file), *words]) == 0
  assert main(["train", str(file), "--run_dir", str(run_dir), "--train.trainable", "all"]) == 2
  assert "train.trainable: ttt -> all" in capsys.readouterr().err


def test_eval_of_a_pretrained_model(pretrained, tmp_path, capsys):
  """Its losses are those of the model that `load_pretrained` gives; nothing is trained."""
  data, run_dir = tmp_path / "text", tmp_path / "run"
  data.mkdir()
  for i in range(3):
    (data / f"{i}.txt").write_text(f"{i} " + TEXT * 9)
  words = ["--data.path", str(data), "--data.seq_len", "40", "--eval.buckets", "2"]
  words += ["--eval.sample_tokens", "3", "--run_dir", str(run_dir)]
  with jax.numpy_dtype_promotion("standard"):
    assert main(["eval", str(pretrained), *words]) == 0
  assert "fast weights" not in capsys.readouterr().out
  summary = json.loads((run_dir / "summary.json").read_text())
  assert (summary["steps"], summary["heldout_loss_updates_off"]) == (0, None)

  config = load_config(run_dir / "config.yaml")
  held = load_corpus(config.data, seed=0, tokenizer=load_tokenizer(pretrained)).sources[0].heldout
  tokens = jnp.stack([document.tokens[:40].astype(np.int32) for document in held])
  logits = load_pretrained(pretrained)(tokens)
  losses = token_losses(logits[:, :-1], tokens[:, 1:])[0]
  np.testing.assert_allclose(summary["heldout_loss"], np.mean(losses), rtol=1e-5)

  with jax.numpy_dtype_promotion("standard"):  # a run's directory
    assert main(["eval", str(run_dir)]) == 2
  assert "has no checkpoints: train there first" in capsys.readouterr().err
  assert main(["eval", str(tmp_path / "nothing")]) == 2
  assert "nothing" in capsys.readouterr().err


def test_a_tokenizer_beyond_the_vocabulary_is_refused(pretrained, tmp_path, capsys):
  file = tmp_path / "config.yaml"
  file.write_text(f"data: {{tokenizer: {pretrained}}}")
  assert main(["train", str(file), "--run_dir", str(tmp_path / "run")]) == 2
  error = capsys.readouterr().err
  assert "model.vocab_size=256 is smaller than the " in error
  assert f"set model.vocab_size={load_tokenizer(pretrained).vocab_size}" in error
