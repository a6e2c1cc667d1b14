"""Builds a tokenizer of the `tokenizers` library from the vocabulary inside a GGUF file.

A byte-level BPE ("gpt2" in the file) stores tokens, merges and the name of the rule that splits text into
words; SentencePiece ("llama") stores tokens and scores, from which the merges follow.
"""

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import (
  AddedToken,
  Regex,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from ttt_jax.checkpoints.gguf import load_gguf
from ttt_jax.checkpoints.gguf_special import LLAMA3_NAMES, SpecialTokens, special_tokens
from ttt_jax.errors import UnsupportedError, UserError

_USER_DEFINED = 4  # a value in tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece's character for a space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_DIGITS = (r"\p{N}", _GPT2)  # splits off every digit
_TEKKEN = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
  r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns that split text into words, by tokenizer.ggml.pre, each applied to the pieces of the one before;
# as in llama.cpp.
_RULES = {
  **dict.fromkeys(LLAMA3_NAMES, (_LLAMA3,)),
  **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_LLAMA3,)),
  **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt"), (_GPT2,)),
  **dict.fromkeys(("olmo", "jais", "trillion", "granite-docling", "exaone4"), (_GPT2,)),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
  **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), _DIGITS),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2"), (_QWEN2,)),
  **dict.fromkeys(("megrez", "hunyuan", "solar-open", "grok-2"), (_QWEN2,)),
  "tekken": (_TEKKEN,),
  "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_IGNORE_MERGES = (*LLAMA3_NAMES, "tekken")  # rules by which a word that is a token is not split


class GgufTokenizer(NamedTuple):
  """A GGUF file holds these parts of a tokenizer."""

  backend: tokenizers.Tokenizer
  special: SpecialTokens
  chat_template: str | None


def gguf_tokenizer(path: Path) -> GgufTokenizer:
  """Loads the tokenizer of a GGUF file.

  Raises:
    UserError: the file has no tokenizer, or its tokens are damaged.
    UnsupportedError: the tokenizer's model or its rule for words is not supported.
  """
  fields, _ = load_gguf(path)
  kind, tokens = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
  if not tokens:
    raise UserError(f"{path} has no tokenizer: give the path of a tokenizer")
  # llama.cpp's names for tokens with an empty spelling.
  tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
  fields["tokenizer.ggml.tokens"] = tokens
  if len(set(tokens)) != len(tokens):
    raise UserError(
      f"{path}: tokenizer.ggml.tokens repeats {len(tokens) - len(set(tokens))} tokens: the file is damaged"
    )
  if kind == "gpt2":
    backend = _byte_level(path, fields)
  elif kind == "llama":
    backend = _sentence_piece(path, fields)
  else:
    raise UnsupportedError(
      f"{path}: tokenizer.ggml.model={kind!r} is not supported, only 'gpt2' and 'llama'"
    )
  types = fields.get("tokenizer.ggml.token_type", [])
  special = special_tokens(fields)
  special_tokens_list = [
    AddedToken(tokens[i], normalized=False, special=True) for i in special.special
  ]
  defined = [i for i, type_ in enumerate(types) if type_ == _USER_DEFINED]
  backend.add_special_tokens(special_tokens_list)
  backend.add_tokens(
    [
      AddedToken(tokens[i], normalized=False, special=False)
      for i in defined
      if i not in special.special
    ]
  )
  backend.post_processor = _post_processor(tokens, special)
  return GgufTokenizer(backend, special, fields.get("tokenizer.chat_template"))


def _post_processor(tokens: list[str], special: SpecialTokens) -> processors.TemplateProcessing:
  """Returns the post-processor that puts bos and eos around a text, where the file asks for them."""
  names = {}  # names for the template, since a token's spelling may hold a space or a colon
  if special.add_bos:
    names["BOS"] = special.bos_id
  if special.add_eos:
    names["EOS"] = special.eos_id

  def template(text: str) -> str:
    before, after = ("BOS " if "BOS" in names else ""), (" EOS" if "EOS" in names else "")
    return f"{before}{text}{after}"

  return processors.TemplateProcessing(
    single=template("$A"),
    pair=f"{template('$A')} {template('$B')}",
    special_tokens=[
      {"id": name, "ids": [token], "tokens": [tokens[token]]} for name, token in names.items()
    ],
  )


def _byte_level(path: Path, fields: dict[str, Any]) -> tokenizers.Tokenizer:
  rule = fields.get("tokenizer.ggml.pre", "default")
  if rule not in _RULES:
    raise UnsupportedError(
      f"{path}: tokenizer.ggml.pre={rule!r} is not supported, only {', '.join(_RULES)}"
    )
  vocabulary = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
  # A merge is "left right"; neither has a space, which byte-level BPE writes as another character.
  merges = [tuple(merge.split(" ", 1)) for merge in fields.get("tokenizer.ggml.merges", [])]
  backend = tokenizers.Tokenizer(
    models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _IGNORE_MERGES)
  )
  if rule == "qwen2":
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _RULES[rule]),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  return backend


def _sentence_piece(path: Path, fields: dict[str, Any]) -> tokenizers.Tokenizer:
  """Makes a BPE that merges the pair whose token has the highest score, with a fallback to bytes."""
  tokens, scores = fields["tokenizer.ggml.tokens"], fields.get("tokenizer.ggml.scores") or []
  if len(scores) < len(tokens):
    raise UserError(
      f"{path}: tokenizer.ggml.scores has {len(scores)} numbers for {len(tokens)} tokens: the file is "
      "damaged"
    )
  vocabulary = {token: i for i, token in enumerate(tokens)}
  merges = [
    (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
    for token, score in zip(tokens, scores)
    for cut in range(1, len(token))
    if token[:cut] in vocabulary and token[cut:] in vocabulary
  ]
  unknown = special_tokens(fields).unknown_id
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary,
      merges=[pair for *_, left, right in sorted(merges) for pair in [(left, right)]],
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
  steps = [normalizers.Prepend(_SPACE)] if prefix else []
  backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ]
  )
  return backend
