"""Tests GGUF files as llama.cpp writes them: permuted heads, quantised tensors, the tokenizer inside."""

import dataclasses
import shutil

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from helpers import random_model, random_rows, relative_error

from ttt_jax import load_pretrained, load_tokenizer, save_pretrained
from ttt_jax.checkpoints.files import open_tensors
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.config import AttentionConfig, ModelConfig, RopeScaling, TTTConfig
from ttt_jax.nn.rope import scaled_frequencies

MODEL = ModelConfig(
  vocab_size=40,
  num_layers=2,
  d_model=32,
  d_ff=64,
  num_heads=4,
  num_kv_heads=2,
  norm_eps=1e-5,
  rope_theta=500000.0,
  max_positions=64,
)
NAMES = {
  "model.embed_tokens": "token_embd",
  "model.norm": "output_norm",
  "lm_head": "output",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "model.layers": "blk",
}


def permuted(x, heads):
  """Permutes like llama.cpp's converter: takes channels from the two halves of a head in turn."""
  return x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, model, *, kind=None, architecture="llama", metadata=(), extra=None, **split):
  """Writes a GGUF file of a model; matrices in `kind` of quantisation, in several files as `split` says."""
  shutil.rmtree(path.with_suffix(".hf"), ignore_errors=True)
  save_pretrained(model, path.with_suffix(".hf"))
  config = model.model
  writer = gguf.GGUFWriter(path, architecture, **split)
  writer.add_block_count(config.num_layers)
  writer.add_context_length(config.max_positions)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_rope_dimension_count(config.head_size)
  for name, arguments in metadata:
    getattr(writer, name)(*arguments)
  for name, stored in open_tensors(path.with_suffix(".hf")).items():
    array = stored.read()
    for theirs, ours in NAMES.items():
      name = name.replace(theirs, ours)
    if "attn_q" in name or "attn_k" in name:
      array = permuted(array, config.num_heads if "attn_q" in name else config.num_kv_heads)
    if kind is not None and array.ndim == 2:
      writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, array)
  for name, array in (extra or {}).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_same_model(tmp_path, tied):
  model = random_model(
    dataclasses.replace(MODEL, tie_embeddings=tied), AttentionConfig(), TTTConfig()
  )
  write_gguf(tmp_path / "a.gguf", model)
  loaded = load_pretrained(tmp_path / "a.gguf")
  assert dataclasses.replace(loaded.model, norm_eps=1e-5) == dataclasses.replace(
    model.model, head_dim=8
  )
  assert loaded.model.norm_eps == pytest.approx(1e-5)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(model)):
    assert np.array_equal(a, b)


def test_quantised_and_with_fast_weights(tmp_path):
  model = random_model(MODEL, AttentionConfig(), TTTConfig())
  write_gguf(tmp_path / "a.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0)
  loaded = load_pretrained(tmp_path / "a.gguf", ttt=TTTConfig(layers=(1,), chunk_size=4))
  tokens, _, _ = random_rows(2, 16, vocab=40)
  forward = jax.jit(lambda model: model(tokens))
  assert 0 < relative_error(forward(loaded), forward(model)) < 0.05
  # Exactly the dequantised numbers.
  up = np.asarray(model.groups[0][0].mlp.up[0]).T
  kind = gguf.GGMLQuantizationType.Q8_0
  expected = dequantize(quantize(np.ascontiguousarray(up), kind), kind)
  assert np.array_equal(np.asarray(loaded.groups[0][0].mlp.up[0]).T, expected)


def test_llama3_frequencies(tmp_path):
  model = random_model(MODEL, AttentionConfig(), TTTConfig())
  plain, _ = scaled_frequencies(8, 500000.0, RopeScaling("linear"))
  scaling = RopeScaling("llama3", 32.0, original_max_positions=8192)
  scaled, _ = scaled_frequencies(8, 500000.0, scaling)
  write_gguf(tmp_path / "a.gguf", model, extra={"rope_freqs.weight": plain / scaled})
  assert load_pretrained(tmp_path / "a.gguf").model.rope_scaling == scaling
  write_gguf(tmp_path / "b.gguf", model, extra={"rope_freqs.weight": np.float32([1, 2, 3, 4])})
  with pytest.raises(NotImplementedError, match="not the rope scaling of Llama 3"):
    load_pretrained(tmp_path / "b.gguf")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"architecture": "qwen3"}, "general.architecture='qwen3' is not supported"),
    ({"metadata": [("add_expert_count", (8,))]}, "expert_count=8"),
    ({"metadata": [("add_sliding_window", (8,))]}, "sliding_window=8"),
  ],
)
def test_what_is_not_there_is_named(tmp_path, options, message):
  write_gguf(tmp_path / "a.gguf", random_model(MODEL, AttentionConfig(), TTTConfig()), **options)
  with pytest.raises(NotImplementedError, match=message):
    load_pretrained(tmp_path / "a.gguf")


@pytest.mark.parametrize("keep", [0, 3, 200, 5000, -100])
def test_truncated(tmp_path, keep):
  path = tmp_path / "a.gguf"
  write_gguf(path, random_model(MODEL, AttentionConfig(), TTTConfig()))
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(ValueError, match=r"a\.gguf is cut short, damaged or no GGUF file"):
    load_pretrained(path)


def spelled(text):
  """Spells a text in the characters of byte-level BPE."""
  return byte_tokenizer()._backend.pre_tokenizer.pre_tokenize_str(text)[0][0]


BYTE_TOKENS = [
  "<|end|>",
  *(byte_tokenizer()._backend.id_to_token(byte) for byte in range(256)),
  *map(spelled, (" t", "he", "  ", "12", "123")),
]
MERGES = [
  f"{spelled(a)} {spelled(b)}"
  for a, b in ((" ", "t"), ("h", "e"), (" ", " "), ("1", "2"), ("12", "3"))
]


def bpe_metadata(rule):
  return [
    ("add_tokenizer_model", ("gpt2",)),
    ("add_tokenizer_pre", (rule,)),
    ("add_token_list", (BYTE_TOKENS,)),
    ("add_token_types", ([3] + [1] * (len(BYTE_TOKENS) - 1),)),
    ("add_token_merges", (MERGES,)),
    ("add_eos_token_id", (0,)),
    ("add_add_bos_token", (False,)),
  ]


@pytest.mark.parametrize(
  ("rule", "pieces"),
  [
    ("gpt-2", ["a", " ", " ", "123", " t", "he", "<|end|>"]),
    ("smollm", ["a", "  ", "1", "2", "3", " t", "he", "<|end|>"]),
    ("llama-bpe", ["a", " ", " ", "123", " t", "he", "<|end|>"]),
    ("qwen2", ["a", " ", " ", "1", "2", "3", " t", "he", "<|end|>"]),
    ("default", ["a", " ", " ", "123", " t", "he", "<|end|>"]),
  ],
)
def test_byte_level_tokenizers(tmp_path, rule, pieces):
  model = random_model(dataclasses.replace(MODEL, vocab_size=272), AttentionConfig(), TTTConfig())
  path = tmp_path / "a.gguf"
  write_gguf(path, model, metadata=bpe_metadata(rule))
  tokenizer = load_tokenizer(path)
  text = "a  123 the<|end|>"
  ids = tokenizer.encode(text)
  assert [tokenizer.decode([i]) for i in ids] == pieces
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|end|>")
  assert tokenizer.eos_ids == (0,)
  assert tokenizer.vocab_size == 262
  odd = "ünï 日本 😀\r\n\t\x00"
  assert tokenizer.decode(tokenizer.encode(odd)) == odd
  # Written as tokenizer.json it is the same one.
  save_pretrained(load_pretrained(path), tmp_path / "hf", tokenizer=tokenizer)
  again = load_tokenizer(tmp_path / "hf")
  assert again.encode(text) == ids
  assert (again.eos_ids, again.bos_id, again.vocab_size) == ((0,), None, 262)


def test_sentence_piece_tokenizer(tmp_path):
  space = "\u2581"
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  words = [space, *"abc", f"{space}a", "bc", f"{space}ab", f"{space}a{'bc'}"]
  scores = [0.0] * len(pieces) + [-9.0, -8.0, -7.0, -6.0, -1.0, -2.0, -3.0, -4.0]
  types = [2, 3, 3] + [6] * 256 + [1] * len(words)
  metadata = [
    ("add_tokenizer_model", ("llama",)),
    ("add_token_list", (pieces + words,)),
    ("add_token_scores", (scores,)),
    ("add_token_types", (types,)),
    ("add_bos_token_id", (1,)),
    ("add_eos_token_id", (2,)),
    ("add_unk_token_id", (0,)),
  ]
  model = random_model(dataclasses.replace(MODEL, vocab_size=300), AttentionConfig(), TTTConfig())
  write_gguf(tmp_path / "a.gguf", model, metadata=metadata)
  tokenizer = load_tokenizer(tmp_path / "a.gguf")
  ids = tokenizer.encode("abc abc é")
  whole = len(pieces) + 7
  assert ids == [1, whole, whole, len(pieces), 3 + 0xC3, 3 + 0xA9]
  assert tokenizer.decode(ids, skip_special_tokens=True) == "abc abc é"
  assert tokenizer.encode("a", add_special_tokens=False) == [len(pieces) + 4]


@pytest.mark.parametrize(
  ("name", "value", "error", "message"),
  [
    ("add_tokenizer_model", "rwkv", NotImplementedError, "ggml.model='rwkv'"),
    ("add_tokenizer_pre", "magic", NotImplementedError, "ggml.pre='magic'"),
    ("add_token_list", ["a", "a"], ValueError, "repeats 1 tokens"),
  ],
)
def test_tokenizers_that_are_not_there(tmp_path, name, value, error, message):
  metadata = dict(bpe_metadata("gpt-2")) | {name: (value,)}
  path = tmp_path / "a.gguf"
  model = random_model(dataclasses.replace(MODEL, vocab_size=272), AttentionConfig(), TTTConfig())
  write_gguf(path, model, metadata=list(metadata.items()))
  with pytest.raises(error, match=message):
    load_tokenizer(path)
