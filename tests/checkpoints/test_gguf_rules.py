"""What a GGUF file leaves unsaid, by the rules of llama.cpp: each case has been compared with its tokens or
logits (llama.cpp of October 2026, through the package xllamacpp)."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers import random_model, random_rows, relative_error
from test_gguf import BYTE_TOKENS, MODEL, bpe_metadata, write_gguf

import ttt_jax
from ttt_jax import load_pretrained, load_tokenizer
from ttt_jax.checkpoints.convert import convert
from ttt_jax.checkpoints.files import open_tensors
from ttt_jax.checkpoints.gguf_tokenizer import _RULES
from ttt_jax.config import AttentionConfig, RopeScaling, TTTConfig
from ttt_jax.errors import UnsupportedError, UserError

SMALL = dataclasses.replace(MODEL, num_layers=1)


def key(name, value):
  """Makes a key of the architecture for `write_gguf`."""
  kind = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
  return kind, (f"llama.{name}", value)


@pytest.fixture
def write(tmp_path):
  """Writes a GGUF of a plain model with metadata; its path."""

  def write(metadata=(), model=SMALL, name="a.gguf", **options):
    path = tmp_path / name
    write_gguf(
      path, random_model(model, AttentionConfig(), TTTConfig()), metadata=metadata, **options
    )
    return path

  return write


LINEAR = RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
  ("keys", "scaling"),
  [
    ({"scaling.factor": 4.0}, LINEAR),
    ({"scale_linear": 4.0}, LINEAR),
    ({"scaling.factor": 4.0, "scale_linear": 2.0}, LINEAR),
    ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
    ({"scaling.type": "linear"}, None),
    ({"scaling.type": "none", "scaling.factor": 4.0}, None),
    (
      {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
      RopeScaling("yarn", 4.0, original_max_positions=32),
    ),
    (
      {"scaling.type": "yarn", "scaling.factor": 4.0},
      RopeScaling("yarn", 4.0, original_max_positions=64),
    ),
  ],
)
def test_rope_scaling(write, keys, scaling):
  path = write([key(f"rope.{name}", value) for name, value in keys.items()])
  assert load_pretrained(path).model.rope_scaling == scaling


def test_positions_are_scaled(write):
  scaled = dataclasses.replace(SMALL, rope_scaling=LINEAR)
  tokens, _, _ = random_rows(1, 12, vocab=40)
  forward = jax.jit(lambda model: model(tokens))
  expected = forward(random_model(scaled, AttentionConfig(), TTTConfig()))
  assert relative_error(forward(load_pretrained(write())), expected) > 0.01
  loaded = load_pretrained(write([key("rope.scale_linear", 4.0)]))
  assert relative_error(forward(loaded), expected) < 1e-5


def test_rope_that_is_not_there(write):
  with pytest.raises(UnsupportedError, match=r"rope\.scaling\.type='longrope' is not supported"):
    load_pretrained(write([key("rope.scaling.type", "longrope")]))
  path = write([key("rope.scaling.factor", 4.0)], extra={"rope_freqs.weight": np.ones(4, "f4")})
  with pytest.raises(UnsupportedError, match="scales its rotary frequencies twice"):
    load_pretrained(path)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("rope.scaling.attn_factor", 1.5),
    ("rope.scaling.yarn_beta_fast", 16.0),
    ("rope.scaling.yarn_ext_factor", 0.5),
    ("logit_scale", 0.5),
    ("residual_scale", 0.2),
    ("embedding_scale", 12.0),
    ("attention.scale", 0.5),
    ("attention.value_length", 4),
    ("attention.clamp_kqv", 8.0),
    ("attention.causal", False),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("expert_count", 8),
    ("expert_used_count", 2),
    ("rope.dimension_count_swa", 4),
    ("a_key_of_tomorrow", 1),
  ],
)
def test_keys_that_change_numbers_are_refused_by_name(write, name, value):
  with pytest.raises(UnsupportedError, match=rf"llama\.{name}={value}"):
    load_pretrained(write([key(name, value)]))


def test_keys_that_change_nothing_pass(write):
  keys = {
    "vocab_size": 40,
    "rope.scaling.finetuned": True,
    "rope.scaling.attn_factor": 1.0,
    "attention.scale": 8**-0.5,
    "attention.value_length": 8,
    "logit_scale": 1.0,
    "expert_count": 0,
    "attention.causal": True,
    "tensor_data_layout": "Meta AI original pth",
  }
  path = write([key(name, value) for name, value in keys.items()])
  tokens, _, _ = random_rows(1, 12, vocab=40)
  forward = jax.jit(lambda model: model(tokens))
  assert np.array_equal(forward(load_pretrained(path)), forward(load_pretrained(write())))


def test_sizes_of_each_layer(write):
  def sizes(*numbers):
    return [("add_array", ("llama.attention.head_count_kv", list(numbers)))]

  model = random_model(SMALL, AttentionConfig(), TTTConfig())
  assert load_pretrained(write(sizes(2, 2))).model.num_kv_heads == model.model.num_kv_heads
  with pytest.raises(UnsupportedError, match=r"head_count_kv=\[2, 4\] differs between layers"):
    load_pretrained(write(sizes(2, 4)))


@pytest.mark.parametrize("bias", ["qkv", "qkvo"])
def test_biases(write, bias, tmp_path):
  config = dataclasses.replace(SMALL, attention_bias=bias)
  model = random_model(config, AttentionConfig(), TTTConfig())
  ttt_jax.save_pretrained(model, tmp_path / "hf")
  extra = {}
  for name, stored in open_tensors(tmp_path / "hf").items():
    if name.endswith("bias"):
      letter = name.split(".")[-2][0]
      x = stored.read()
      if letter in "qk":
        x = x.reshape({"q": 4, "k": 2}[letter], 2, -1).swapaxes(1, 2).reshape(-1)
      extra[f"blk.0.attn_{'output' if letter == 'o' else letter}.bias"] = x
  path = tmp_path / "b.gguf"
  write_gguf(path, random_model(SMALL, AttentionConfig(), TTTConfig()), extra=extra)
  loaded = load_pretrained(path)
  assert loaded.model.attention_bias == bias
  for name in ("query_bias", "key_bias", "value_bias"):
    theirs, ours = (getattr(m.groups[0][0].attention, name)[...] for m in (model, loaded))
    assert np.array_equal(theirs, ours)


# The special tokens: 0 <|end|>, then bytes, then merges, then these.
FIRST = len(BYTE_TOKENS)
EXTRA = ["<s>", "<|im_end|>", "<|eot_id|>", "<x:y z>", "<usr>", "<|file_sep|>", "[PAD]"]
BOS, IM_END, EOT, COLON, USER, FILE, PAD = range(FIRST, FIRST + len(EXTRA))
BPE = dataclasses.replace(SMALL, vocab_size=FIRST + len(EXTRA))


def bpe(rule, *more, without=()):
  tokens, types = BYTE_TOKENS + EXTRA, [3] + [1] * (FIRST - 1) + [3, 1, 3, 3, 4, 1, 1]
  metadata = dict(bpe_metadata(rule)) | {
    "add_token_list": (tokens,),
    "add_token_types": (types,),
    "add_bos_token_id": (BOS,),
  }
  del metadata["add_add_bos_token"]
  metadata |= dict(more)
  return [item for item in metadata.items() if item[0] not in without]


def byte(text):
  return [1 + b for b in text.encode()]


@pytest.mark.parametrize(
  ("rule", "more", "before", "after"),
  [
    ("llama-bpe", [], [BOS], []),
    ("falcon3", [], [BOS], []),
    ("tekken", [], [BOS], []),
    ("gpt-2", [], [], []),
    ("qwen2", [], [], []),
    ("smaug-bpe", [], [], []),  # the rule of Llama 3, but not its beginning
    ("llama-bpe", [("add_add_bos_token", (False,))], [], []),
    ("gpt-2", [("add_add_bos_token", (True,)), ("add_add_eos_token", (True,))], [BOS], [0]),
    ("gpt-2", [("add_add_eos_token", (True,))], [], [0]),
    ("gpt-2", [("add_add_bos_token", (True,)), ("add_bos_token_id", (COLON,))], [COLON], []),
  ],
)
def test_tokens_around_a_text(write, tmp_path, rule, more, before, after):
  path = write(bpe(rule, *more), BPE)
  tokenizer = load_tokenizer(path)
  assert tokenizer.encode("xyz") == [*before, *byte("xyz"), *after]
  assert tokenizer.encode("xyz", add_special_tokens=False) == byte("xyz")
  assert (tokenizer.adds_bos, tokenizer.adds_eos) == (bool(before), bool(after))
  (tmp_path / "written").mkdir()
  tokenizer.save(tmp_path / "written")
  again = load_tokenizer(tmp_path / "written")
  assert again.encode("xyz") == [*before, *byte("xyz"), *after]


def test_ends_are_known_by_their_spelling(write):
  path = write(bpe("gpt-2"), BPE)
  tokenizer, model = load_tokenizer(path), load_pretrained(path)
  assert tokenizer.eos_ids == model.model.eos_ids == (0, IM_END, EOT, FILE, PAD)
  # Whatever type the file gives them, they are no text.
  assert tokenizer.encode("x<|im_end|>") == [*byte("x"), IM_END]
  assert tokenizer.decode([*byte("x"), IM_END, USER], skip_special_tokens=True) == "x<usr>"


@pytest.mark.parametrize(
  ("tokens", "ends"),
  [
    (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
    (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
    (["</s>", "<|tool_response>"], ["<|tool_response>"]),
    (["</s>", "<eos>"], ["</s>", "<eos>"]),
  ],
)
def test_ends_in_company(write, tokens, ends):
  metadata = dict(bpe("gpt-2", without=("add_eos_token_id", "add_bos_token_id")))
  metadata["add_token_list"] = (["[BOS]", *BYTE_TOKENS[1:], *tokens],)
  metadata["add_token_types"] = ([3] + [1] * (FIRST - 1) + [3] * len(tokens),)
  tokenizer = load_tokenizer(write(list(metadata.items()), BPE))
  assert [tokenizer.decode([i]) for i in tokenizer.eos_ids] == ends
  assert tokenizer.bos_id is None


def test_special_ids_that_are_no_tokens(write):
  path = write(bpe("gpt-2", ("add_eot_token_id", (999,))), BPE)
  with pytest.warns(UserWarning, match="eot_token_id=999 is no token"):
    assert load_tokenizer(path).eos_ids == (0, IM_END, EOT, FILE, PAD)
  missing = bpe("gpt-2", ("add_add_bos_token", (True,)), without=("add_bos_token_id",))
  with pytest.raises(UserError, match=r"add_bos_token is true, but .*bos_token_id is not set"):
    load_tokenizer(write(missing, BPE))


def test_sentence_piece_without_its_ids(write):
  """Tokens 0, 1 and 2 are then the unknown one, the beginning and the end, as everywhere."""
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581"]
  metadata = [
    ("add_tokenizer_model", ("llama",)),
    ("add_token_list", (tokens,)),
    ("add_token_scores", ([0.0] * len(tokens),)),
    ("add_token_types", ([2, 3, 3] + [6] * 256 + [1],)),
    ("add_add_eos_token", (True,)),
  ]
  tokenizer = load_tokenizer(write(metadata, dataclasses.replace(SMALL, vocab_size=len(tokens))))
  assert tokenizer.encode("x") == [1, 259, 3 + ord("x"), 2]
  assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


# What the rules make of "aB1212$a" where all pairs within a word merge.
WORDS = {
  "llama-bpe": ["aB", "12", "1", "2", "$a"],
  "qwen2": ["aB", "1", "2", "1", "2", "$a"],
  "smollm": ["aB", "1", "2", "1", "2", "$", "a"],
  "gpt-2": ["aB", "1212", "$", "a"],
  "tekken": ["a", "B", "1", "2", "1", "2", "$a"],
  "default": ["aB", "12", "1", "2", "$", "a"],
}
NAMES = {
  "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 "
  "chatglm-bpe",
  "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2",
  "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
  "gpt-2": "gpt2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4",
  "tekken": "",
  "default": "",
}


@pytest.mark.parametrize("rule", WORDS)
def test_names_of_rules(write, rule):
  pairs = [*itertools.product("aB", "aB"), *itertools.product("12", "12"), ("$", "a")]
  spelled = ["".join(pair) for pair in pairs]
  for name in (rule, *NAMES[rule].split()):
    metadata = dict(bpe(name, without=("add_bos_token_id",)))
    metadata["add_token_list"] = ([*BYTE_TOKENS[:257], *spelled, "1212"],)
    metadata["add_token_types"] = ([3] + [1] * (257 + len(spelled)),)
    metadata["add_token_merges"] = ([*(f"{a} {b}" for a, b in pairs), "12 12"],)
    tokenizer = load_tokenizer(write(list(metadata.items()), BPE))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("aB1212$a")] == WORDS[rule], name


def test_all_names_are_here():
  assert set(_RULES) == {*NAMES, *" ".join(NAMES.values()).split()}


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00003.gguf", "m-00003-of-00003.gguf"])
def test_split_files(tmp_path, name):
  model = random_model(BPE, AttentionConfig(), TTTConfig())
  write_gguf(tmp_path / "m.gguf", model, metadata=bpe("llama-bpe"), split_max_tensors=4)
  parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
  assert parts == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
  path = tmp_path if name == "m.gguf" else tmp_path / name
  loaded = load_pretrained(path)
  for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
    assert np.array_equal(a, b)
  assert load_tokenizer(path).encode("x") == [BOS, *byte("x")]
  (tmp_path / "m-00002-of-00003.gguf").unlink()
  for part in ("m-00001-of-00003.gguf", "m-00003-of-00003.gguf"):
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is not there: download"):
      load_pretrained(tmp_path / part)


def test_a_part_under_another_name(tmp_path):
  model = random_model(BPE, AttentionConfig(), TTTConfig())
  write_gguf(tmp_path / "m.gguf", model, metadata=bpe("llama-bpe"), split_max_tensors=4)
  (tmp_path / "m-00001-of-00003.gguf").rename(tmp_path / "first.gguf")
  with pytest.raises(UserError, match=r"split\.count=3, but its name .* model-00001-of-00003"):
    load_pretrained(tmp_path / "first.gguf")


def test_capitals_and_directories(write, tmp_path):
  path = write(bpe("llama-bpe"), BPE)
  directory = tmp_path / "model"
  directory.mkdir()
  upper = path.rename(directory / "A.GGUF")
  expected = jax.tree.leaves(load_pretrained(upper))
  for place in (upper, directory):
    for a, b in zip(jax.tree.leaves(load_pretrained(place)), expected, strict=True):
      assert np.array_equal(a, b)
    assert load_tokenizer(place).encode("x") == [BOS, *byte("x")]
  convert(directory, tmp_path / "hf")
  assert load_tokenizer(tmp_path / "hf").encode("x") == [BOS, *byte("x")]
  (directory / "b.gguf").write_bytes(b"")
  with pytest.raises(UserError, match=r"no config.json but 2 GGUF files, A\.GGUF, b\.gguf: give"):
    load_pretrained(directory)
  with pytest.raises(UserError, match=r"A\.GGUF, b\.gguf in it may hold one"):
    load_tokenizer(directory)


def test_tokens_that_are_spelled_by_nothing(write):
  metadata = dict(bpe("gpt-2"))
  metadata["add_token_list"] = ([*BYTE_TOKENS, *EXTRA[:-2], "", ""],)
  tokenizer = load_tokenizer(write(list(metadata.items()), BPE))
  assert tokenizer.encode("x") == byte("x")
  assert tokenizer.decode([FILE]) == f"[EMPTY_{FILE}]"


def test_scores_that_are_missing(write):
  metadata = [("add_tokenizer_model", ("llama",)), ("add_token_list", (["<unk>", "a"],))]
  with pytest.raises(UserError, match="has 0 numbers for 2 tokens"):
    load_tokenizer(write(metadata))
