"""Converts text to tokens and back, by tokenizer.json, the tokenizer inside a GGUF file, or bytes."""

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
  load_json,
  local_path,
)
from ttt_jax.checkpoints.hf_config import special_token_ids
from ttt_jax.errors import UserError
from ttt_jax.files import write_json

BYTES = "bytes"  # the name of the tokenizer of 256 bytes
_PROBE = "a b"  # encoded to find the tokens that are put around a text
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDED_TOKENS = "added_tokens.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
# The files of a tokenizer in a Hugging Face directory.
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
  """Wraps a `tokenizers.Tokenizer` and the special tokens with which a model begins and ends texts.

  Attributes:
    vocab_size: one more than the highest token id.
    bos_id: the token that begins a text, or None.
    eos_ids: the tokens that end a text; all but `eos_id` may end only a turn of a chat.
    eos_id: the token of `eos_ids` that the tokenizer names as its `eos_token`, else the first; None without
      `eos_ids`.
    prefix: the tokens that `encode` puts before every text.
    suffix: the tokens that it puts after every text.
    adds_bos: whether `bos_id` is in the prefix.
    adds_eos: whether one of `eos_ids` is in the suffix.
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
    """Returns the tokens of a text, by default with the prefix and suffix, as `transformers` does."""
    return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

  def encode_batch(
    self, texts: Sequence[str], *, add_special_tokens: bool = True
  ) -> list[list[int]]:
    """Encodes many texts, on all cores."""
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]

  def count_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[int]:
    """Returns the number of tokens that `encode` makes of each text, on all cores."""
    encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [len(encoding) for encoding in encodings]

  def _prefix_and_suffix(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bare, whole = (self.encode(_PROBE, add_special_tokens=added) for added in (False, True))
    if not bare:  # the vocabulary lacks the letters of the probe: all tokens count as prefix
      return tuple(whole), ()
    count = len(whole) - len(bare)
    start = next((i for i in range(count) if whole[i : i + len(bare)] == bare), count)
    return tuple(whole[:start]), tuple(whole[start + len(bare) :])

  def vocabulary(self) -> dict[str, int]:
    """Returns token ids by spelling, added tokens included."""
    return self._backend.get_vocab(with_added_tokens=True)

  def decode(
    self, ids: Sequence[int] | Integer[np.ndarray, "T"], *, skip_special_tokens: bool = False
  ) -> str:
    """Returns the text of tokens; U+FFFD replaces bytes that are not UTF-8."""
    return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

  def check_vocabulary(self, vocab_size: int, model: str = "the model") -> None:
    """Raises UserError if the tokenizer has more tokens than a model's vocabulary."""
    if self.vocab_size > vocab_size:
      raise UserError(
        f"the tokenizer has {self.vocab_size} tokens, {model} only vocab_size={vocab_size}: they do not "
        "belong together, use the model's tokenizer"
      )

  def save(self, directory: str | Path) -> None:
    """Saves the tokenizer for `load_tokenizer` and `transformers`; one from a directory is copied.

    The directory is made if it is missing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if self._source is not None and self._source.resolve() == directory.resolve():
      return
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
  """Loads the tokenizer of a model.

  As in `transformers` 5, other files of a directory may add tokens, and truncation and padding saved in
  tokenizer.json are not applied. A GGUF file's tokenizer follows llama.cpp.

  Args:
    path: a Hugging Face directory or a hub name with tokenizer.json, that file, a `.gguf` file, or
      "bytes": one token per byte of UTF-8, the default of `ttt-jax train` from scratch.

  Raises:
    UserError: there is no tokenizer, it is damaged, or it has more tokens than the model in its directory.
    UnsupportedError: the GGUF tokenizer is of an unknown kind.
  """
  if str(path) == BYTES:
    return byte_tokenizer()
  path = local_path(path)
  if is_gguf(path):
    return _from_gguf(path)
  return _from_directory(path if path.is_dir() else path.parent, path)


def byte_tokenizer() -> Tokenizer:
  """Returns the tokenizer whose token i is byte i."""
  vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.decoder = decoders.ByteLevel()
  return Tokenizer(backend)


def _byte_characters() -> list[str]:
  """Returns the printable character that byte-level BPE, since GPT-2, writes for each byte."""
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
    gguf = ", ".join(model.name for model in gguf_models(directory)[:5])
    hint = f"; {gguf} in it may hold one: give that path" if gguf else ""
    raise UserError(
      f"{directory} has no {_TOKENIZER}: save it from a fast tokenizer of transformers, or give another "
      f"path, or {BYTES!r} for a model of bytes{hint}"
    )
  try:
    backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
  except Exception as error:  # the library raises nothing more specific
    raise UserError(f"{file} is not a tokenizer: {str(error)[:200]}") from error
  # A training script may have saved these settings; `transformers` applies neither unless asked to.
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
  tokenizer_eos = _named_ids("eos_token", backend, {}, {}, named)
  tokenizer = Tokenizer(
    backend,
    bos_id=next(iter(bos), None),
    eos_ids=eos,
    eos_id=next(iter(tokenizer_eos), None),
    source=directory,
  )
  if vocab_size is not None:
    tokenizer.check_vocabulary(vocab_size, str(directory / CONFIG))
  return tokenizer


def _optional_json(path: Path) -> dict[str, Any]:
  return load_json(path) if path.is_file() else {}


def _named_ids(
  key: str,
  backend: tokenizers.Tokenizer,
  generation: dict[str, Any],
  config: dict[str, Any],
  named: dict[str, Any],
) -> tuple[int, ...]:
  """Returns the ids of `eos_token` or `bos_token` by the model's config, else by the tokenizer's."""
  ids = special_token_ids(config, generation, f"{key}_id")
  if ids:
    return ids
  token = named.get(key)
  token = token.get("content") if isinstance(token, dict) else token
  token_id = None if token is None else backend.token_to_id(token)
  return () if token_id is None else (token_id,)
