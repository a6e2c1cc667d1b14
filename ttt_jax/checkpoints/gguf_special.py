"""Finds the special tokens of a GGUF file by the rules of llama.cpp (`llama-vocab.cpp`).

Files are often incomplete. The spelling of a token then decides whether it ends a text, and the kind of the
tokenizer decides whether tokens are added before and after a text.
"""

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from ttt_jax.errors import UserError

_KEY = "tokenizer.ggml"
_UNKNOWN, _CONTROL = 2, 3  # values in tokenizer.ggml.token_type
# Names of Llama 3's rules in tokenizer.ggml.pre; these tokenizers begin a text with bos.
LLAMA3_NAMES = (
  "llama-bpe",
  "llama3",
  "llama-v3",
  "falcon3",
  "falcon-h1",
  "pixtral",
  "midm-2.0",
  "lfm2",
  "jina-v5-nano",
)
_BEGIN_WITH_BOS = (*LLAMA3_NAMES, "tekken")
# Default ids of SentencePiece. For byte-level BPE we do not follow llama.cpp, whose default is Falcon's 11.
_DEFAULTS = {"bos": 1, "eos": 2, "unknown": 0}

_ENDS = (
  "<|eot_id|>",
  "<|im_end|>",
  "<|end|>",
  "<|return|>",
  "<|call|>",
  "<|flush|>",
  "<|calls|>",
  "<end_of_turn>",
  "<|endoftext|>",
  "</s>",
  "<|eom_id|>",
  "<EOT>",
  "_<EOT>",
  "[EOT]",
  "[EOS]",
  "<|end_of_text|>",
  "<end_of_utterance>",
  "<eos>",
  "<turn|>",
  "<|tool_response>",
  "<\uff5cend\u2581of\u2581sentence\uff5c>",
  "[e~[",
)
# Code infilling: one token of each kind ends a text, given by its key or else by its spelling.
_CODE_ENDS = {
  "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
  "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
  "fim_sep": ("<|file_sep|>",),
}
# Tokens that llama.cpp treats as special whatever their type in the file; they do not end a text.
_CODE_MARKS = (
  "<|fim_prefix|>",
  "<fim-prefix>",
  "<fim_prefix>",
  "<\uff5cfim\u2581begin\uff5c>",
  "<PRE>",
  "\u2581<PRE>",
  "<|code_prefix|>",
  "<|prefix|>",
  "<|fim_suffix|>",
  "<fim-suffix>",
  "<fim_suffix>",
  "<\uff5cfim\u2581hole\uff5c>",
  "<SUF>",
  "\u2581<SUF>",
  "<|code_suffix|>",
  "<|suffix|>",
  "<|fim_middle|>",
  "<fim-middle>",
  "<fim_middle>",
  "<\uff5cfim\u2581end\uff5c>",
  "<MID>",
  "\u2581<MID>",
  "<|code_middle|>",
  "<|middle|>",
)


class SpecialTokens(NamedTuple):
  """Holds the ids of special tokens.

  Attributes:
    bos_id: the token that begins a text, or None.
    eos_id: the token that ends a text by the file's metadata, or None.
    eos_ids: all tokens that end a text, `eos_id` first.
    unknown_id: the token for text that no other token spells, or None.
    special: all special tokens, which are no part of a text.
    add_bos, add_eos: whether `bos_id` and `eos_id` are put around a text.
  """

  bos_id: int | None
  eos_id: int | None
  eos_ids: tuple[int, ...]
  unknown_id: int | None
  special: tuple[int, ...]
  add_bos: bool
  add_eos: bool


def special_tokens(fields: dict[str, Any]) -> SpecialTokens:
  """Finds the special tokens that llama.cpp finds in the metadata.

  Raises:
    UserError: the metadata adds a token around texts but does not define it.
  """
  tokens = fields.get(f"{_KEY}.tokens") or []
  ids = {token: i for i, token in enumerate(tokens)}
  bos, eos, unknown = (_token_id(fields, name, len(tokens)) for name in ("bos", "eos", "unknown"))
  found = {_token_id(fields, name, len(tokens)) for name in ("eot", "eom")}
  found |= {_code_end(fields, name, spellings, ids) for name, spellings in _CODE_ENDS.items()}
  found |= {ids[text] for text in _ENDS if text in ids}
  ends = [i for i in (eos, *sorted(found - {None, eos})) if i is not None]
  ends = tuple(i for i in ends if i not in _not_ends(ids))
  types = fields.get(f"{_KEY}.token_type") or []
  special = {i for i, type_ in enumerate(types) if type_ in (_UNKNOWN, _CONTROL)}
  special |= {ids[text] for text in _CODE_MARKS if text in ids} | set(ends)
  begins = fields.get(f"{_KEY}.model") == "llama" or fields.get(f"{_KEY}.pre") in _BEGIN_WITH_BOS
  return SpecialTokens(
    bos_id=bos,
    eos_id=eos,
    eos_ids=ends,
    unknown_id=unknown,
    special=tuple(sorted(special)),
    add_bos=_adds_token(fields, "bos", bos, default=begins and bos is not None),
    add_eos=_adds_token(fields, "eos", eos, default=False),
  )


def _token_id(fields: dict[str, Any], name: str, size: int) -> int | None:
  """Returns the token of a name, else the tokenizer's default; ignores an id outside of the vocabulary."""
  default = _DEFAULTS.get(name) if fields.get(f"{_KEY}.model") == "llama" else None
  if default is not None and default >= size:
    default = None
  given = fields.get(f"{_KEY}.{name}_token_id")
  if given is not None and size and not 0 <= given < size:
    warnings.warn(
      f"{_KEY}.{name}_token_id={given} is no token, the file has {size}: "
      f"{default} is used, as in llama.cpp",
      stacklevel=3,
    )
    given = None
  return default if given is None else given


def _code_end(
  fields: dict[str, Any], name: str, spellings: Iterable[str], ids: dict[str, int]
) -> int | None:
  given = _token_id(fields, name, len(ids))
  return next((ids[x] for x in spellings if x in ids), None) if given is None else given


def _not_ends(ids: dict[str, int]) -> set[int]:
  """Returns tokens that do not end a text, despite their spelling, if certain other tokens exist."""
  exceptions = set()
  has_calls = "<|call|>" in ids or "<|calls|>" in ids
  if has_calls and ("<|return|>" in ids or "<|flush|>" in ids):
    exceptions.add(ids.get("<|end|>"))
  if "<|tool_response>" in ids:
    exceptions.add(ids.get("</s>"))
  return exceptions - {None}


def _adds_token(fields: dict[str, Any], name: str, token: int | None, *, default: bool) -> bool:
  adds = fields.get(f"{_KEY}.add_{name}_token", default)
  if adds and token is None:
    raise UserError(
      f"{_KEY}.add_{name}_token is true, but {_KEY}.{name}_token_id is not set: the file is damaged"
    )
  return bool(adds)
