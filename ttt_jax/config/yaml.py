"""Loads a `Config` from a YAML file and command-line words, and writes it back.

jsonargparse checks types, parses the words and lists the fields for `--help`; ruamel.yaml parses YAML 1.2,
where `4e-3` is a number, `010` is ten, `1:30` is text and a repeated key is an error. Every mistake of a
user is a UserError that names the field. A field counts as given if the file or the words name it,
whatever its value (`ttt_jax.config.given`).
"""

import argparse
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import jsonargparse
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from ttt_jax.config import Config, RopeScaling, TTTConfig
from ttt_jax.errors import UserError

_YAML = "yaml_1_2"  # the name under which jsonargparse knows our YAML parser


def load_config(path: str | PathLike | None, overrides: Sequence[str] = ()) -> Config:
  """Loads the config of a YAML file with command-line overrides.

  Args:
    path: a YAML file of nested sections; fields that it does not name keep their defaults. None: no file.
    overrides: words like `--train.steps 100`, `--train.steps=100` or `--name short`. A value is parsed
      as YAML, except that a text field takes the word unparsed (`null` is None), so that
      `--data.path "*.txt"` works. If a field is given twice, the last value counts.

  Raises:
    UserError: no such file, not YAML, an unknown field, a value of the wrong type, or a config that
      `Config` refuses.
  """
  return make_config(load_fields(path, overrides))


def load_fields(path: str | PathLike | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Returns the fields that a YAML file and command-line overrides give, as nested mappings.

  Raises:
    UserError: as `load_config`, except that `Config` does not check the fields.
  """
  fields = {} if path is None else checked_fields(load_yaml(path), f"in {path}")
  given = _parsed(_parser().parse_args, _words(overrides), "on the command line")
  return overridden(fields, _plain(given))


def overridden(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested fields with the given ones over them.

  Fields that given ones leave without a meaning (`ended_by`) are left out.
  """
  kept = dict(fields)
  if "ttt" in given:
    ended = TTTConfig.ended_by(given["ttt"])
    kept["ttt"] = {k: x for k, x in fields.get("ttt", {}).items() if k not in ended}
  scalings = [(tree.get("model") or {}).get("rope_scaling") for tree in (fields, given)]
  if all(isinstance(scaling, Mapping) for scaling in scalings):
    ended = RopeScaling.ended_by(scalings[1])
    scaling = {k: x for k, x in scalings[0].items() if k not in ended}
    kept["model"] = {**fields["model"], "rope_scaling": scaling}
  return merged_fields(kept, given)


def merged_fields(*fields: Mapping[str, Any]) -> dict[str, Any]:
  """Merges nested mappings of fields; the last mapping that has a field counts."""
  merged: dict[str, Any] = {}
  for mapping in fields:
    for key, value in mapping.items():
      both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
      merged[key] = merged_fields(merged[key], value) if both else value
  return merged


def nested_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Turns fields with dotted names, as `{"train.steps": 3}`, into nested mappings."""
  nested: dict[str, Any] = {}
  for name, value in fields.items():
    for key in reversed(str(name).split(".")):
      value = {key: value}
    nested = merged_fields(nested, value)
  return nested


def checked_fields(fields: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
  """Returns the fields of nested mappings, each converted to the type that `Config` declares.

  Raises:
    UserError: an unknown field, or a value of the wrong type; the message ends with `where`.
  """
  return _plain(_parsed_fields(fields, where))


def make_config(fields: Mapping[str, Any]) -> Config:
  """Makes the config with these fields, nested by section; other fields keep their defaults.

  Raises:
    UserError: an unknown field, a value of the wrong type, or a config that `Config` refuses.
  """
  return Config(**vars(_parser().instantiate(_parsed_fields(fields))))


def dump_config(config: Config) -> str:
  """Returns all fields of a config as YAML that `load_config` loads."""
  text = io.StringIO()
  _yaml().dump(_plain(dataclasses.asdict(config)), text)
  return text.getvalue()


def load_yaml(path: str | PathLike) -> dict[Any, Any]:
  """Loads the mapping in a YAML file, unchecked.

  Raises:
    UserError: the file does not exist, is not YAML, or holds no mapping.
  """
  path = Path(path)
  if not path.is_file():
    others = sorted(str(p) for p in path.parent.glob("*.yaml"))
    hint = f": there are {', '.join(others)}" if others else ""
    raise UserError(f"no config file {path}{hint}")
  try:
    tree = _yaml().load(path.read_text(encoding="utf-8-sig"))
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not a text file") from error
  except YAMLError as error:
    raise UserError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
  if tree is None:
    return {}
  if not isinstance(tree, dict):
    raise UserError(
      f"{path} must hold sections, but holds {type(tree).__name__}: {str(tree)[:80]!r}"
    )
  return tree


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Lists the fields in which two nested dicts differ, in lines like `train.steps: 400 -> 500`."""
  before, after = dict(flatten(_plain(old))), dict(flatten(_plain(new)))
  lines = []
  for name in {**before, **after}:
    if name not in before:
      lines.append(f"{name}: (absent) -> {_shown(after[name])}")
    elif name not in after:
      lines.append(f"{name}: {_shown(before[name])} -> (absent)")
    elif before[name] != after[name]:
      lines.append(f"{name}: {_shown(before[name])} -> {_shown(after[name])}")
  return lines


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted names and the values of a nested mapping."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def is_field(word: str) -> bool:
  """Tells whether a word like `--train.steps` or `--name=x` names a field, even a misspelled one."""
  name = word[2:].partition("=")[0]
  return word.startswith("--") and (name in _FIELDS or "." in name)


def fields_help(sections: Sequence[str] = (), *, without: Sequence[str] = ()) -> str:
  """Lists the fields of these sections, or of all, with their meaning, type and default.

  Those of `without` are left out. Sections within a section, as `model.rope_scaling`, come last.
  """
  outer, inner = (_new_parser(usage=argparse.SUPPRESS, add_help=False) for _ in range(2))
  if not sections:
    outer.add_class_arguments(Config)
  for section in sections:
    outer.add_class_arguments(_section(_FIELDS[section]), section)
  for name, hint in _FIELDS.items():
    if "." in name and _section(hint) and (not sections or name.partition(".")[0] in sections):
      inner.add_class_arguments(_section(hint), name)
  for action in outer._actions + inner._actions:
    # An option of jsonargparse that our commands do not have, and a section that `outer` lists.
    left_out = any(action.dest == name or action.dest.startswith(f"{name}.") for name in without)
    if (
      left_out
      or action.dest.endswith(".help")
      or (action in inner._actions and _section(_FIELDS[action.dest]))
    ):
      action.help = argparse.SUPPRESS
  return "\n".join(filter(None, (outer.format_help(), inner.format_help())))


@cache
def _parser() -> jsonargparse.ArgumentParser:
  parser = _new_parser()
  parser.add_class_arguments(Config)
  return parser


def _new_parser(**options: Any) -> jsonargparse.ArgumentParser:
  jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
  jsonargparse.set_loader(_YAML, lambda text: _yaml().load(text), exceptions=(YAMLError,))
  return jsonargparse.ArgumentParser(
    exit_on_error=False, default_env=False, parser_mode=_YAML, allow_abbrev=False, **options
  )


def _parsed_fields(fields: Mapping[Any, Any], where: str = "") -> jsonargparse.Namespace:
  _check_names(fields, (), where)
  return _parsed(_parser().parse_object, _without_empty_sections(fields), where)


def _parsed(parse: Callable, fields: Any, where: str) -> jsonargparse.Namespace:
  """Parses fields with a method of jsonargparse, whose errors become UserErrors."""
  try:
    parsed = parse(fields, defaults=False)
  except argparse.ArgumentError as error:
    raise UserError(_problem(error, where)) from error
  for name, value in flatten(_plain(parsed)):
    if value is None and type(None) not in typing.get_args(_FIELDS.get(name, None | int)):
      raise UserError(f"{name}=null{_in_brackets(where)}: {name} cannot be null")
  return parsed


def _problem(error: Exception, where: str) -> str:
  """Turns a message of jsonargparse into one line that begins with the field."""
  text = re.sub(r"<class '([\w.]+)'>", r"\1", str(error))
  text = re.sub(r'^Parser key "([^"]+)":', r"\1:", text.strip())
  return re.sub(r"\s+", " ", text).rstrip(".") + _in_brackets(where)


def _in_brackets(where: str) -> str:
  return f" ({where})" if where else ""


def _check_names(fields: Mapping[Any, Any], path: tuple[str, ...], where: str) -> None:
  """Raises UserError, with the nearest known name, unless every key is a field."""
  for key, value in fields.items():
    name = ".".join((*path, str(key)))
    if "." in str(key) and name in _FIELDS:
      raise UserError(
        f"{name} {where} is written with a dot: in a file, put {name.partition('.')[2]} under the "
        f"section {name.partition('.')[0]}"
      )
    if name not in _FIELDS or not isinstance(key, str):
      raise _unknown(name, where)
    _check_items(name, value)
    if _section(_FIELDS[name]) is None:
      continue
    if isinstance(value, Mapping):
      _check_names(value, (*path, key), where)
    elif value is not None and not (
      isinstance(value, str) and str in typing.get_args(_FIELDS[name])
    ):
      raise UserError(f"{name}={value!r} is not a section{_in_brackets(where)}: write {name}.FIELD")


def _check_items(name: str, value: Any) -> None:
  """Raises UserError if a section in a list of sections lacks a field that has no default."""
  item = typing.get_args(_FIELDS[name])[0] if typing.get_origin(_FIELDS[name]) is tuple else None
  if dataclasses.is_dataclass(item) and isinstance(value, list):
    for i, fields in enumerate(value):
      for field in dataclasses.fields(item):
        if (
          isinstance(fields, Mapping)
          and field.default is dataclasses.MISSING
          and field.name not in fields
        ):
          raise UserError(f"{name}[{i}] lacks {field.name}: give it")


def _unknown(name: str, where: str) -> UserError:
  return UserError(f"unknown field {name} {where}".rstrip() + _suggestion(name))


def _suggestion(name: str) -> str:
  """Suggests fields for `name`: with the same last part, with these initials, or of similar spelling."""
  section, _, last = name.rpartition(".")
  same = [field for field in _FIELDS if field.rpartition(".")[2] == last]
  initials = [
    field
    for field in _FIELDS
    if _initials(field.rpartition(".")[2]) == last and section in ("", field.rpartition(".")[0])
  ]
  close = same or initials or difflib.get_close_matches(name, _FIELDS, n=1)
  if close:
    return f": did you mean {' or '.join(close)}?"
  siblings = [field for field in _FIELDS if field.rpartition(".")[0] == section]
  return f": there are {', '.join(siblings)}" if siblings else ""


def _initials(name: str) -> str:
  return "".join(word[0] for word in name.split("_"))


def _words(overrides: Sequence[str]) -> list[str]:
  """Returns the overrides as words `--name=value`, each for a field that exists."""
  words, unread = [], list(overrides)
  while unread:
    word = unread.pop(0)
    if not word.startswith("--") or word == "--":
      raise UserError(
        f"unexpected {word!r} on the command line: overrides look like --train.steps 100"
      )
    name, equals, text = word[2:].partition("=")
    if name not in _FIELDS:
      raise _unknown(name, "on the command line")
    if not equals:
      if not unread or unread[0].startswith("--"):
        raise UserError(f"--{name} has no value: write --{name} VALUE")
      text = unread.pop(0)
    words.append(f"--{name}={text}")
  return words


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted names and the types of all fields and sections."""
  for name, hint in typing.get_type_hints(cls).items():
    yield f"{prefix}{name}", hint
    if _section(hint) is not None:
      yield from _fields(_section(hint), f"{prefix}{name}.")


def _section(hint: Any) -> type | None:
  """Returns the dataclass of a section, also of an optional section (`SECTION | None`)."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return next((option for option in options if dataclasses.is_dataclass(option)), None)


_FIELDS = dict(_fields(Config))


def _without_empty_sections(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Drops sections with nothing under `section:`, which YAML parses as null, so they keep defaults."""
  return {
    key: value
    for key, value in fields.items()
    if not (value is None and dataclasses.is_dataclass(_FIELDS[key]))
  }


def _plain(value: Any) -> Any:
  """Converts namespaces and tuples to plain mappings and lists."""
  if isinstance(value, jsonargparse.Namespace):
    value = vars(value)
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
  return "null" if value is None else str(value)


def _yaml() -> YAML:
  yaml = YAML(typ="safe", pure=True)  # the C parser knows only YAML 1.1
  yaml.default_flow_style = False
  yaml.sort_base_mapping_type_on_output = False
  yaml.allow_unicode = True
  return yaml


def _yaml_problem(error: YAMLError) -> str:
  if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
    return f"line {error.problem_mark.line + 1}: {error.problem}"
  return str(error).splitlines()[0]
