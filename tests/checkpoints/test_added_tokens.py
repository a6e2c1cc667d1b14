"""Tests that tokenizers equal those of `transformers` 5.24; most results were compared with it once."""

import json

import pytest
from helpers import random_model
from tokenizers import AddedToken, normalizers, processors

import ttt_jax
from ttt_jax import load_tokenizer
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig

BOM = b"\xef\xbb\xbf"


@pytest.fixture
def write(tmp_path):
  """Writes the tokenizer of bytes, changed by `edit`, and the JSON files beside it."""

  def write(edit=lambda backend: None, **files):
    backend = byte_tokenizer()._backend
    edit(backend)
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in ({"tokenizer_config": {}} | files).items():
      (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path

  return write


def token(content, **flags):
  plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
  return {"content": content, "special": True} | plain | flags


def decoder(*tokens, first=256):
  return {"added_tokens_decoder": {str(first + i): entry for i, entry in enumerate(tokens)}}


def test_saved_truncation_and_padding_are_not_applied(write):
  def edit(backend):
    backend.enable_truncation(4)
    backend.enable_padding(length=40)

  tokenizer = load_tokenizer(write(edit))
  text = "a text of many tokens"
  assert tokenizer.encode(text) == list(text.encode())
  assert tokenizer.encode_batch([text, "b"]) == [list(text.encode()), [98]]
  assert tokenizer.count_batch([text, "b"]) == [21, 1]


@pytest.mark.parametrize(
  ("entry", "text", "expected"),
  [
    (token("<x>"), "a <x> b", [97, 32, 256, 32, 98]),
    (token("<x>", lstrip=True), "a <x> b", [97, 256, 32, 98]),
    (token("<x>", rstrip=True, special=False), "a <x> b", [97, 32, 256, 98]),
    (token("<x>", single_word=True), "a<x>b", [97, *b"<x>b"]),
    (token("<x>", normalized=False), "a<X>b", [97, *b"<x>b"]),  # the text is lowered, the token not
    (token("<X>", normalized=True, special=False), "a<X>b", [97, 256, 98]),
  ],
)
def test_tokens_of_the_tokenizer_config(write, entry, text, expected):
  def edit(backend):
    backend.normalizer = normalizers.Lowercase()

  tokenizer = load_tokenizer(write(edit, tokenizer_config=decoder(entry)))
  assert tokenizer.encode(text) == expected
  assert tokenizer.vocab_size == 257
  kept = tokenizer.decode([97, 256, 98], skip_special_tokens=True)
  assert kept == ("ab" if entry["special"] else "a<x>b")


def test_tokens_have_the_ids_that_are_written(write):
  config = {"added_tokens_decoder": {"257": token("<x>"), "256": token("<y>")}}
  assert load_tokenizer(write(tokenizer_config=config)).encode("<x><y>") == [257, 256]


def test_tokens_of_the_older_file(write):
  files = {"added_tokens": {"<y>": 257, "<x>": 256}, "tokenizer_config": {"eos_token": "<x>"}}
  tokenizer = load_tokenizer(write(**files))
  assert tokenizer.encode("a<x> <y>") == [97, 256, 32, 257]
  assert tokenizer.eos_ids == (256,)
  assert tokenizer.decode([256, 257], skip_special_tokens=True) == "<y>"
  # The newer file, if it speaks of tokens, counts alone.
  files["tokenizer_config"] = decoder(token("<z>"))
  assert load_tokenizer(write(**files)).encode("<x><z>") == [*b"<x>", 256]


def test_flags_of_the_tokenizer_config_count(write):
  def edit(backend):
    backend.add_tokens([AddedToken("<x>", special=False)])

  tokenizer = load_tokenizer(write(edit, tokenizer_config=decoder(token("<x>", lstrip=True))))
  assert tokenizer.encode("a <x>") == [97, 256]
  assert tokenizer.decode([97, 256], skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
  "files",
  [
    {"tokenizer_config": {"eos_token": "<x>"}},
    {"tokenizer_config": {"eos_token": token("<x>")}},
    {"tokenizer_config": {"additional_special_tokens": ["<x>"], "eos_token": "<x>"}},
    {"special_tokens_map": {"eos_token": token("<x>")}},
    {"tokenizer_config": decoder(token("<x>", special=False)) | {"eos_token": "<x>"}},
  ],
)
def test_named_tokens_are_special(write, files):
  tokenizer = load_tokenizer(write(**files))
  assert tokenizer.encode("a<x>b") == [97, 256, 98]
  assert tokenizer.eos_ids == (256,)
  assert tokenizer.decode([97, 256, 98], skip_special_tokens=True) == "ab"


def test_named_tokens_come_in_the_order_of_their_roles(write):
  files = {"special_tokens_map": {"image_token": "<i>", "eos_token": "<e>", "bos_token": "<b>"}}
  assert load_tokenizer(write(**files)).encode("<b><e><i>") == [256, 257, 258]


def test_a_named_token_that_the_model_has_no_row_for(write):
  files = {"tokenizer_config": {"pad_token": "[PAD]"}, "config": {"vocab_size": 256}}
  with pytest.warns(
    UserWarning, match=r"'\[PAD\]' is not in tokenizer\.json, and the model has no"
  ):
    tokenizer = load_tokenizer(write(**files))
  assert tokenizer.vocab_size == 256


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      decoder(token("<x>"), first=300),
      "token 300, '<x>', cannot be added .* whose next token is 256",
    ),
    (decoder(token("<x>"), first=65), "token 65 is '<x>' in tokenizer_config.json, and 'A'"),
    (decoder("<x>"), "has '<x>', which is not a token"),
    ({"added_tokens_decoder": {"x": token("<x>")}}, "'x' is not the id"),
  ],
)
def test_tokens_that_cannot_be_added(write, config, message):
  with pytest.raises(ttt_jax.errors.UserError, match=message):
    load_tokenizer(write(tokenizer_config=config))


def test_tokenizer_json_counts_where_ids_differ(write):
  with pytest.warns(UserWarning, match="has 'a' as token 97, tokenizer_config.json as 5"):
    tokenizer = load_tokenizer(write(tokenizer_config=decoder(token("a"), first=5)))
  assert tokenizer.encode("a") == [97]


@pytest.mark.parametrize(
  ("template", "adds"),
  [("$A", (False, False)), ("<s> $A", (True, False)), ("<s> $A </s>", (True, True))],
)
def test_what_it_puts_around_a_text_is_said(write, template, adds):
  def edit(backend):
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [("<s>", 256), ("</s>", 257)]
    backend.post_processor = processors.TemplateProcessing(
      single=template, pair=f"{template} $B", special_tokens=ids
    )

  names = {"bos_token": "<s>", "eos_token": "</s>"}
  tokenizer = load_tokenizer(write(edit, tokenizer_config=names))
  assert (tokenizer.bos_id, tokenizer.eos_ids) == (256, (257,))
  assert (tokenizer.adds_bos, tokenizer.adds_eos) == adds
  assert tokenizer.encode("x", add_special_tokens=False) == [120]


def test_one_token_for_both_ends(write):
  def edit(backend):
    backend.add_special_tokens(["<|end|>"])
    backend.post_processor = processors.TemplateProcessing(
      single="<|end|> $A", pair="<|end|> $A $B", special_tokens=[("<|end|>", 256)]
    )

  names = {"bos_token": "<|end|>", "eos_token": "<|end|>"}
  tokenizer = load_tokenizer(write(edit, tokenizer_config=names))
  assert (tokenizer.adds_bos, tokenizer.adds_eos) == (True, False)


@pytest.mark.parametrize(
  ("files", "eos", "bos"),
  [
    ({"config": {"eos_token_id": [3, 5.0, 3], "bos_token_id": 1.0}}, (3, 5), 1),
    ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 6]}}, (4, 6), None),
    ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": None}}, (3,), None),
  ],
)
def test_special_ids(write, files, eos, bos):
  tokenizer = load_tokenizer(write(**files))
  assert (tokenizer.eos_ids, tokenizer.bos_id) == (eos, bos)
  assert all(isinstance(i, int) for i in tokenizer.eos_ids)


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([3, 300], r"generation_config.json: eos_token_id=\[3, 300\]: 300 is no token, vocab_size=256"),
    (2.5, "generation_config.json: eos_token_id=2.5 must be the id of a token"),
    ("</s>", "eos_token_id='</s>' must be the id of a token"),
    (True, "eos_token_id=True must be the id"),
  ],
)
def test_special_ids_that_are_none(write, ids, message):
  files = {"config": {"vocab_size": 256}, "generation_config": {"eos_token_id": ids}}
  with pytest.raises(ttt_jax.errors.UserError, match=message):
    load_tokenizer(write(**files))


def test_a_byte_order_mark_does_not_count(write, tmp_path):
  model = random_model(
    ModelConfig(256, 1, 12, 20, 2, 2, eos_ids=(7,)), AttentionConfig(), TTTConfig()
  )
  ttt_jax.save_pretrained(model, tmp_path / "hf")
  directory = tmp_path / "hf"
  for name in write(tokenizer_config=decoder(token("<x>")) | {"eos_token": "<x>"}).glob("*.json"):
    (directory / name.name).write_bytes(name.read_bytes())
  (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 8]}))
  config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 256}
  (directory / "config.json").write_text(json.dumps(config))
  config = directory / "tokenizer_config.json"
  config.write_text(json.dumps({"eos_token": "a"}))
  for file in directory.glob("*.json"):
    file.write_bytes(BOM + file.read_bytes())
  assert ttt_jax.load_pretrained(directory).model.eos_ids == (9, 8)
  tokenizer = load_tokenizer(directory)
  assert tokenizer.encode("ab") == [97, 98]
  assert tokenizer.decode([97, 98], skip_special_tokens=True) == "b"


def test_a_tokenizer_is_saved_where_a_word_says_and_onto_itself(tmp_path):
  made = byte_tokenizer()
  made.save(str(tmp_path / "new" / "place"))
  loaded = load_tokenizer(tmp_path / "new" / "place")
  loaded.save(tmp_path / "new" / "place")
  loaded.save(str(tmp_path / "copy"))
  assert load_tokenizer(tmp_path / "copy").encode("a b") == made.encode("a b")
