"""Tests loading: fast weights added to a plain model, dtypes, meshes, memory."""

import dataclasses
import json
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import mesh_of, random_model, random_rows, relative_error
from safetensors.numpy import load_file, save_file

from ttt_jax import load_pretrained, save_pretrained
from ttt_jax.checkpoints.files import StoredTensor
from ttt_jax.checkpoints.tensors import named_parameters
from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.parameters import shardings

MODEL = dataclasses.replace(helpers.MODEL, num_layers=3, norm_eps=1e-5)
PUBLISHED = TTTConfig(
  layers=(0, 2),
  chunk_size=4,
  inner_lr=0.1,
  inner_lr_scale="fixed",
  learn_inner_lr=False,
  normalize_target=False,
)


@pytest.fixture
def write(tmp_path):
  """Writes a random model; the path and the model."""

  def write(model=MODEL, attention=None, ttt=None, **options):
    path = tmp_path / "model"
    made = random_model(model, attention, ttt, **options)
    save_pretrained(made, path)
    return path, made

  return write


def edit_config(path, **changes):
  config = json.loads((path / "config.json").read_text()) | changes
  config = {key: value for key, value in config.items() if value != "delete"}
  (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, edit):
  tensors = load_file(path / "model.safetensors")
  edit(tensors)
  save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
  ("dtype", "target"), [("float32", "input_embed"), ("bfloat16", "hidden_states")]
)
def test_fast_weights_dropped_in_change_no_bit(write, dtype, target):
  path, _ = write()
  ttt = TTTConfig(layers=(0, 2), chunk_size=4, target=target)
  plain = load_pretrained(path, dtype=dtype)
  with_ttt = load_pretrained(path, dtype=dtype, ttt=ttt)
  assert with_ttt.ttt == dataclasses.replace(ttt, init="identity")
  tokens, segment_ids, _ = random_rows(2, 30)
  # By default XLA may skip a rounding to bfloat16 inside a fusion, and these are other programs.
  exact = {"xla_allow_excess_precision": False}
  forward = jax.jit(lambda model, *rows: model(*rows), compiler_options=exact)
  with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes
    actual, expected = (forward(model, tokens, segment_ids) for model in (with_ttt, plain))
  assert np.array_equal(actual, expected)


def test_fast_weights_that_learn_from_the_start_are_there_when_asked_for(write):
  path, _ = write()
  model = load_pretrained(path, ttt=TTTConfig(layers=(1,), chunk_size=4, init="next_token"))
  conv = np.asarray(named_parameters(model)["groups/0/1/mlp/conv"])[0]
  assert np.array_equal(conv[3], np.ones(12))
  assert not np.delete(conv, 3, axis=0).any()
  tokens, _, _ = random_rows(2, 32)
  plain = load_pretrained(path)
  forward = jax.jit(lambda model: model(tokens))
  assert relative_error(forward(model), forward(plain)) > 1e-3


def test_given_ttt_uses_the_tensors_there_are_and_starts_the_others(write):
  path, made = write(ttt=PUBLISHED)
  given = dataclasses.replace(PUBLISHED, layers=(0, 1), chunk_size=8, learn_inner_lr=True)
  with pytest.warns(UserWarning, match=r"left out.*layers\.2\.mlp\.ttt_conv"):
    model = load_pretrained(path, ttt=given)
  assert model.ttt.chunk_size == 8
  parameters, before = named_parameters(model), named_parameters(made)
  # Layers 0 and 1 are one group now.
  conv, projection = (parameters[f"groups/0/0/mlp/{name}"] for name in ("conv", "projection"))
  assert np.array_equal(conv[0], before["groups/0/0/mlp/conv"][0])
  assert np.array_equal(projection[0], before["groups/0/0/mlp/projection"][0])
  assert not np.asarray(conv[1]).any()
  assert np.array_equal(projection[1], np.eye(12))
  assert not np.asarray(parameters["groups/0/0/mlp/log_rate"]).any()


def test_ttt_without_layers_is_the_plain_model(write):
  path, made = write(ttt=PUBLISHED)
  with pytest.warns(UserWarning, match="left out"):
    plain = load_pretrained(path, ttt=TTTConfig())
  tokens, _, _ = random_rows(2, 16)
  forward = jax.jit(lambda model, update: model(tokens, update=update), static_argnums=1)
  assert relative_error(forward(plain, True), forward(made, False)) < 1e-6


def test_fast_weights_the_config_does_not_speak_of_are_refused(write):
  """Imitates the checkpoint of a merge script that wrote the plain model's config."""
  path, made = write(ttt=PUBLISHED)
  keys = [key for key in json.loads((path / "config.json").read_text()) if key.startswith("ttt_")]
  edit_config(path, **dict.fromkeys(keys, "delete"))
  with pytest.raises(ValueError, match=r"no ttt_mode\).*pass ttt=TTTConfig\(layers=\(0, 2\)"):
    load_pretrained(path)
  model = load_pretrained(path, ttt=PUBLISHED)
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(made)):
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
  ("stored", "loaded"), [("float16", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_by_default_nothing_is_rounded(write, stored, loaded):
  path, made = write()
  kind = ml_dtypes.bfloat16 if stored == "bfloat16" else stored
  rounded = {}

  def cast(tensors):
    for name, x in tensors.items():
      tensors[name] = rounded[name] = x.astype(kind)

  edit_tensors(path, cast)
  model = load_pretrained(path)
  assert model.model.param_dtype == model.model.dtype == loaded
  expected = rounded["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T
  assert np.array_equal(np.asarray(model.groups[0][0].mlp.up[1], np.float32), expected)
  wide = load_pretrained(path, dtype="bfloat16", param_dtype="float32")
  assert wide.groups[0][0].mlp.up.dtype == jnp.float32
  assert wide.model.dtype == "bfloat16"
  assert made.model.dtype == "float32"


def test_unknown_dtype_and_float64_without_x64(write):
  path, _ = write()
  with pytest.raises(ValueError, match="dtype='fp8' is not one of 'float32'"):
    load_pretrained(path, dtype="fp8")
  with pytest.raises(ValueError, match="float64' needs jax_enable_x64"):
    load_pretrained(path, dtype="float64")


def test_onto_a_mesh(write):
  model = dataclasses.replace(MODEL, vocab_size=18)
  path, made = write(model, attention=AttentionConfig(window=5, full_layers=(2,)), ttt=PUBLISHED)
  mesh = mesh_of(1, 2, fsdp=2, tensor=2)
  model = load_pretrained(path, mesh=mesh)
  wanted = shardings(model, mesh)
  for leaf, where in zip(jax.tree.leaves(model), jax.tree.leaves(wanted), strict=True):
    assert leaf.sharding == where
    assert len(leaf.sharding.device_set) == 8
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(made), strict=True):
    assert np.array_equal(a, b)
  tokens, _, _ = random_rows(2, 32)
  with jax.set_mesh(mesh):
    rows = jax.device_put(tokens, sharding(mesh, "batch", "sequence"))
    actual = jax.jit(lambda m, rows: m(rows))(model, rows)
  assert relative_error(actual, jax.jit(lambda m, rows: m(rows))(made, tokens)) < 1e-5


def test_a_head_stored_beside_a_tied_embedding(write):
  path, made = write()
  edit_tensors(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
  assert load_pretrained(path).head is None
  edit_tensors(path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
  with pytest.raises(ValueError, match="tie_word_embeddings is true: set it to false"):
    load_pretrained(path)
  edit_config(path, tie_word_embeddings=False)
  assert load_pretrained(path).head.shape == (12, 17)
  assert made.head is None


def test_a_tied_table_under_the_name_of_the_head(write):
  path, made = write()
  edit_tensors(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
  loaded = load_pretrained(path)
  assert loaded.head is None
  assert np.array_equal(loaded.embed.table[...], made.embed.table[...])
  edit_config(path, tie_word_embeddings=False)
  with pytest.raises(
    ValueError, match=r"model\.embed_tokens\.weight: .* missing in the checkpoint"
  ):
    load_pretrained(path)


@pytest.mark.parametrize(
  "name",
  [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
  ],
)
def test_constants_of_the_rotary_embedding_are_ignored(write, name):
  path, _ = write()

  def edit(tensors):
    tensors |= {key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()}
    tensors[name] = np.ones(3, np.float32)

  edit_tensors(path, edit)
  assert load_pretrained(path).model.param_dtype == "bfloat16"


def test_one_tensor_at_a_time(write, monkeypatch):
  """Each tensor is read once, and its array is gone before the next is read."""
  import weakref

  path, _ = write()
  alive, reads = [], []

  def counted(read):
    def once():
      assert not [x for x in alive if x() is not None]
      array = read()
      alive.append(weakref.ref(array))
      reads.append(array.shape)
      return array

    return once

  from ttt_jax.checkpoints import hf as load

  def open_tensors(directory):
    from ttt_jax.checkpoints.files import open_tensors

    return {
      name: StoredTensor(t.shape, t.dtype, counted(t.read))
      for name, t in open_tensors(directory).items()
    }

  monkeypatch.setattr(load, "open_tensors", open_tensors)
  load_pretrained(path)
  assert len(reads) == 3 * 11 + 2
  assert np.prod(reads[0]) == max(np.prod(shape) for shape in reads)


MEMORY = """
import re, sys
import jax
from ttt_jax import load_pretrained

def memory(key):  # of this process alone, unlike ru_maxrss
  return 1024 * int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1])

small, large = sys.argv[1:]
load_pretrained(small)  # libraries
before = memory("VmRSS")
model = load_pretrained(large)
jax.block_until_ready(model)
size = sum(x.nbytes for x in jax.tree.leaves(model))
print(memory("VmHWM") - before, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path, optimized_commands):
  sizes = {
    "small": {"d_model": 16, "num_heads": 2, "head_dim": 8, "vocab_size": 17},
    "large": {"d_model": 1024, "num_heads": 8, "head_dim": 128, "vocab_size": 24576},
  }
  for name, size in sizes.items():
    config = dataclasses.replace(MODEL, **size, d_ff=size["d_model"], tie_embeddings=False)
    save_pretrained(Transformer(config, rngs=nnx.Rngs(0)), tmp_path / name)
  result = subprocess.run(
    [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")],
    capture_output=True,
    text=True,
    check=True,
  )
  peak, size = map(int, result.stdout.split()[-2:])
  largest = 24576 * 1024 * 4
  assert size > 2.5 * largest
  assert peak < size + 1.25 * largest, (peak - size) / largest
