"""Adds to a tokenizer the tokens that a Hugging Face directory defines outside of tokenizer.json.

The rules are those of `transformers` 5: `added_tokens_decoder` of tokenizer_config.json has ids and
spellings; without it the older `added_tokens.json` and `special_tokens_map.json` count. Tokens that the
config names (as `eos_token`) are always special.
"""

import warnings
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ttt_jax.errors import UserError

_ROLE = "_token"  # suffix of the keys that name a special token; the usual ones come first
_ROLES = tuple(name + _ROLE for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def add_tokens(
  backend: tokenizers.Tokenizer,
  *,
  config: dict[str, Any],
  legacy: dict[str, Any],
  special_map: dict[str, Any],
  limit: int | None,
  where: Path,
) -> dict[str, Any]:
  """Adds to the tokenizer the tokens that tokenizer.json lacks.

  Args:
    config: tokenizer_config.json.
    legacy: added_tokens.json, ids by spelling.
    special_map: special_tokens_map.json.
    limit: the size of the model's vocabulary, if known: tokens without an id are added only below it.
    where: the directory, in messages.

  Returns:
    The config, with the special tokens that special_tokens_map.json names.

  Raises:
    UserError: an entry is not a token, or its token cannot have its id.
  """
  given = config.get("added_tokens_decoder")
  if given is None:
    config = {**config, **special_map}
  named = _named(config)
  if given is None:
    flags = {text: text in named for text in legacy}
    tokens = {
      _index(index, where): AddedToken(text, normalized=not flags[text], special=flags[text])
      for text, index in legacy.items()
    }
  else:
    tokens = {_index(index, where): _token(entry, where) for index, entry in given.items()}
  for token in tokens.values():
    token.special = token.special or token.content in named
  _add_with_ids(backend, tokens, where)
  _add_named(backend, named, limit, where)
  return config


def _named(config: dict[str, Any]) -> dict[str, AddedToken]:
  """Returns the special tokens that the config names, by spelling."""
  others = [key for key in config if key.endswith(_ROLE) and key not in _ROLES]
  entries = [config.get(key) for key in (*_ROLES, *others)]
  for key in _LISTS:
    more = config.get(key) or []
    entries += more.values() if isinstance(more, dict) else more
  named = {}
  for entry in entries:
    spelled = entry.get("content") if isinstance(entry, dict) else entry
    if isinstance(spelled, str):
      flags = entry if isinstance(entry, dict) else {"normalized": False}
      named.setdefault(spelled, _flagged(spelled, flags, special=True))
  return named


def _flagged(text: str, flags: dict[str, Any], *, special: bool) -> AddedToken:
  given = {name: bool(flags[name]) for name in _FLAGS if name in flags}
  return AddedToken(text, special=special, **({"normalized": not special} | given))


def _token(entry: Any, where: Path) -> AddedToken:
  if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
    raise UserError(
      f"{where}: added_tokens_decoder of tokenizer_config.json has {entry!r}, which is not a token"
    )
  return _flagged(entry["content"], entry, special=bool(entry.get("special")))


def _index(index: Any, where: Path) -> int:
  try:
    return int(index)
  except (TypeError, ValueError):
    raise UserError(f"{where}: {index!r} is not the id of an added token") from None


def _add_with_ids(
  backend: tokenizers.Tokenizer, tokens: dict[int, AddedToken], where: Path
) -> None:
  """Adds tokens in the order of their ids; tokens that tokenizer.json has get the flags given here."""
  existing = {repr(token) for token in backend.get_added_tokens_decoder().values()}
  for index, token in sorted(tokens.items()):
    current = backend.token_to_id(token.content)
    if current == index and repr(token) in existing:
      continue  # adding rebuilds the search for all tokens
    if current is not None and current != index:
      warnings.warn(
        f"{where}: tokenizer.json has {token.content!r} as token {current}, tokenizer_config.json as "
        f"{index}: {current} is used, as in transformers",
        stacklevel=5,
      )
    elif current is None and backend.id_to_token(index) is not None:
      raise UserError(
        f"{where}: token {index} is {token.content!r} in tokenizer_config.json, and "
        f"{backend.id_to_token(index)!r} in tokenizer.json: the two files are of different tokenizers"
      )
    backend.add_tokens([token])
    if current is None and backend.token_to_id(token.content) != index:
      raise UserError(
        f"{where}: token {index}, {token.content!r}, cannot be added to a tokenizer.json whose next "
        f"token is {backend.token_to_id(token.content)}: the tokens between them are missing"
      )


def _add_named(
  backend: tokenizers.Tokenizer, named: dict[str, AddedToken], limit: int | None, where: Path
) -> None:
  """Makes the named tokens special; a new token is added after all others, if the model has room."""
  existing = {token.content: token for token in backend.get_added_tokens_decoder().values()}
  for text, token in named.items():
    size = backend.get_vocab_size(with_added_tokens=True)
    if backend.token_to_id(text) is None and limit is not None and size >= limit:
      warnings.warn(
        f"{where}: the special token {text!r} is not in tokenizer.json, and the model has no room for one "
        "more token: it is left out",
        stacklevel=5,
      )
    elif text not in existing:
      backend.add_special_tokens([token])
    elif not existing[text].special:
      token = existing[text]
      token.special = True
      backend.add_special_tokens([token])
