"""Text to tokens and back: tokenizer.json, the tokenizer inside a GGUF file, or bytes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers

from ttt_jax.checkpoints.added_tokens import add_tokens
from ttt_jax.checkpoints.files import (
  CONFIG,
  GENERATION_CONFIG,
  gguf_models,
  is_gguf,
  local_path,
  read_json,
)
from ttt_jax.checkpoints.hf_config import special_token_ids
from ttt_jax.errors import UserError
from ttt_jax.files import write_json

BYTES = "bytes"  # the name of the tokenizer of 256 bytes
_PROBE = "a b"  # a text, to see what is put around it
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDED_TOKENS = "added_tokens.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
# What belongs to a tokenizer in a Hugging Face directory.
TOKENIZER_FILES = (
  _TOKENIZER,
  _TOKENIZER_CONFIG,
  _SPECIAL_TOKENS,
  _ADDED_TOKENS,
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "chat_template.jinja",
)


class Tokenizer:
  """A `tokenizers.Tokenizer`, with the special tokens that a model begins and ends texts with.

  Attributes:
    vocab_size: one more than the highest token.
    bos_id: the token that begins a text, or None.
    eos_ids: the tokens that end one; others than `eos_id` may end a chat's turn.
    eos_id: the one of them that the tokenizer itself names as its `eos_token`, else the first.
    prefix, suffix: the tokens that `encode` puts before and behind every text.
    adds_bos, adds_eos: whether `bos_id` is in the prefix, or one of `eos_ids` in the suffix.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    bos_id: int | None = None,
    eos_ids: tuple[int, ...] = (),
    eos_id: int | None = None,
    chat_template: str | None = None,
    source: Path | None = None,
  ):
    self._backend = backend
    self._chat_template = chat_template
    self._source = source  # the directory whose files `save` copies
    self.bos_id = bos_id
    self.eos_ids = eos_ids
    self.eos_id = eos_id if eos_id in eos_ids else next(iter(eos_ids), None)
    self.vocab_size = 1 + max(self.vocabulary().values())
    self.prefix, self.suffix = self._prefix_and_suffix()
    self.adds_bos = bos_id in self.prefix
    self.adds_eos = any(token in eos_ids for token in self.suffix)

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text; by default with those the tokenizer puts around it, as `transformers` does."""
    return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

  def encode_batch(
    self, texts: Sequence[str], *, add_special_tokens: bool = True
  ) -> list[list[int]]:
    """`encode` of many texts, by all cores."""
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]

  def count_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
    """How many tokens `encode` makes of each text, by all cores."""
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [len(encoding) for encoding in encodings]

  def _prefix_and_suffix(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bare, whole = (self.encode(_PROBE, add_special_tokens=added) for added in (False, True))
    if not bare:  # no such letters in the vocabulary: what there is begins a text
      return tuple(whole), ()
    count = len(whole) - len(bare)
    start = next((i for i in range(count) if whole[i : i + len(bare)] == bare), count)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])

  def vocabulary(self) -> dict[str, int]:
    """How each token is spelled, added ones included."""
    return self._backend.get_vocab(with_added_tokens=True)

  def decode(
    self, ids: Sequence[int] | Integer[np.ndarray, "T"], *, skip_special_tokens: bool = False
  ) -> str:
    """The text of tokens; U+FFFD stands for bytes that are not UTF-8."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def check_vocabulary(self, vocab_size: int, model: str = "the model") -> None:
    """Raises UserError if a token is beyond a model's vocabulary."""
    if self.vocab_size > vocab_size:
      raise UserError(
        f"the tokenizer has {self.vocab_size} tokens, {model} only vocab_size={vocab_size}: they do not "
        "belong together"
      )

  def save(self, directory: Path) -> None:
    """Writes what `load_tokenizer` and `transformers` read; of a directory, a copy of its files."""
    if self._source is not None:
      for name in TOKENIZER_FILES:
        if (self._source / name).is_file():
          shutil.copyfile(self._source / name, directory / name)
      return
    self._backend.save(str(directory / _TOKENIZER))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
      if token is not None:
        config[key] = self._backend.id_to_token(token)
    if self._chat_template is not None:
      config["chat_template"] = self._chat_template
    write_json(directory / _TOKENIZER_CONFIG, config)


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a model.

  Tokens that other files of a directory add are there, as in `transformers` 5; truncation and padding that
  tokenizer.json was saved with are not applied. A GGUF file's tokenizer follows llama.cpp.

  Args:
    path: a Hugging Face directory or a hub name with tokenizer.json, that file, a `.gguf` file, or
      "bytes": one token per byte of UTF-8, as models that `ttt-jax train` made from scratch read.

  Raises:
    UserError: there is none, it is damaged, or it has more tokens than the model it lies beside.
    UnsupportedError: a GGUF tokenizer of an unknown kind.
  """
  if str(path) == BYTES:
    return byte_tokenizer()
  path = local_path(path)
  if is_gguf(path):
    return _from_gguf(path)
  return _from_directory(path if path.is_dir() else path.parent, path)


def byte_tokenizer() -> Tokenizer:
  """Token i is byte i."""
  vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  return Tokenizer(backend)


def _byte_characters() -> list[str]:
  """The printable character that byte-level BPE, since GPT-2, writes for each byte."""
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  spelled = {byte: byte for byte in printable} | {b: 256 + i for i, b in enumerate(others)}
  return [chr(spelled[byte]) for byte in range(256)]


def _from_gguf(path: Path) -> Tokenizer:
  # Imported here because it loads Flax, which no other tokenizer needs.
  from ttt_jax.checkpoints.gguf_tokenizer import gguf_tokenizer

  backend, special, chat_template = gguf_tokenizer(path)
  return Tokenizer(
    backend, bos_id=special.bos_id, eos_ids=special.eos_ids, chat_template=chat_template
  )


def _from_directory(directory: Path, path: Path) -> Tokenizer:
  file = directory / _TOKENIZER if path.is_dir() else path
  if not file.is_file():
    models = ", ".join(model.name for model in gguf_models(directory)[:5])
    there = f"; {models} in it may hold one: give that path" if models else ""
    raise UserError(
      f"{directory} has no {_TOKENIZER}: save it from a fast tokenizer of transformers, or give another "
      f"path, or {BYTES!r} for a model of bytes{there}"
    )
  try:
    backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
  except Exception as error:  # the library raises nothing more specific
    raise UserError(f"{file} is not a tokenizer: {str(error)[:200]}") from error
  # What a training script has left in the file; `transformers` applies neither unless a call asks for it.
  backend.no_truncation()
  backend.no_padding()
  config = _optional_json(directory / CONFIG)
  vocab_size = config.get("vocab_size")
  vocab_size = vocab_size if isinstance(vocab_size, int) else None
  named = add_tokens(
    backend,
    config=_optional_json(directory / _TOKENIZER_CONFIG),
    legacy=_optional_json(directory / _ADDED_TOKENS),
    special_map=_optional_json(directory / _SPECIAL_TOKENS),
    limit=vocab_size,
    where=directory,
  )
  backend.encode_special_tokens = bool(named.get("split_special_tokens"))
  generation = _optional_json(directory / GENERATION_CONFIG)
  eos, bos = (
    _named_ids(key, backend, generation, config, named) for key in ("eos_token", "bos_token")
  )
  own_eos = _named_ids("eos_token", backend, {}, {}, named)
  tokenizer = Tokenizer(
    backend,
    bos_id=next(iter(bos), None),
    eos_ids=eos,
    eos_id=next(iter(own_eos), None),
    source=directory,
  )
  if vocab_size is not None:
    tokenizer.check_vocabulary(vocab_size, str(directory / CONFIG))
  return tokenizer


def _optional_json(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}


def _named_ids(
  key: str,
  backend: tokenizers.Tokenizer,
  generation: dict[str, Any],
  config: dict[str, Any],
  named: dict[str, Any],
) -> tuple[int, ...]:
  """Ids of `eos_token` or `bos_token`: as the model says, else as the tokenizer's config names it."""
  ids = special_token_ids(config, generation, f"{key}_id")
  if ids:
    return ids
  token = named.get(key)
  token = token.get("content") if isinstance(token, dict) else token
  found = None if token is None else backend.token_to_id(token)
  return () if found is None else (found,)
