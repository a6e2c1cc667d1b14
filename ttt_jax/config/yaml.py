"""From a YAML file and command-line words to a `Config`, and back.

jsonargparse checks types, reads the words and lists the fields for `--help`; ruamel.yaml reads YAML 1.2:
`4e-3` is a number, `010` ten, `1:30` a text; a key given twice is an error. Everything a user can get
wrong here is a UserError that names the field. A field counts as given when the file or the words have
it, whatever its value (`ttt_jax.config.given`).
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

from ttt_jax.config import Config
from ttt_jax.errors import UserError

_YAML = "yaml_1_2"  # the name of our reader among jsonargparse's


def load_config(path: str | PathLike | None, overrides: Sequence[str] = ()) -> Config:
  """The config of a YAML file with command-line overrides.

  Args:
    path: a YAML file of nested sections; what it does not name keeps its default. None: no file.
    overrides: words like `--train.steps 100`, `--train.steps=100` or `--name short`. A value is read
      as YAML, but for a text field it is taken as it stands (`null` is none), so that
      `--data.path "*.txt"` works. The last of two for one field counts.

  Raises:
    UserError: no such file, not YAML, an unknown field, a value of the wrong type, or a config that
      `Config` refuses.
  """
  return make_config(load_fields(path, overrides))


def load_fields(path: str | PathLike | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The fields that a YAML file and command-line overrides give, as nested mappings.

  Raises:
    UserError: as `load_config`, but for what `Config` refuses.
  """
  fields = {} if path is None else checked_fields(read_yaml(path), f"in {path}")
  given = _parsed(_parser().parse_args, _words(overrides), "on the command line")
  return merged_fields(fields, _plain(given))


def merged_fields(*fields: Mapping[str, Any]) -> dict[str, Any]:
  """Nested mappings of fields over one another: the last that gives a field counts."""
  merged: dict[str, Any] = {}
  for each in fields:
    for key, value in each.items():
      both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
      merged[key] = merged_fields(merged[key], value) if both else value
  return merged


def nested_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Fields by dotted name, as `{"train.steps": 3}`, as nested mappings."""
  nested: dict[str, Any] = {}
  for name, value in fields.items():
    for key in reversed(str(name).split(".")):
      value = {key: value}
    nested = merged_fields(nested, value)
  return nested


def checked_fields(fields: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
  """The fields of nested mappings, each of the type that `Config` declares.

  Raises:
    UserError: an unknown field, or a value of the wrong type; `where` is in the message.
  """
  return _plain(_parsed_fields(fields, where))


def make_config(fields: Mapping[str, Any]) -> Config:
  """The config with these fields, nested by section; the others keep their defaults.

  Raises:
    UserError: an unknown field, a value of the wrong type, or a config that `Config` refuses.
  """
  return Config(**vars(_parser().instantiate(_parsed_fields(fields))))


def dump_config(config: Config) -> str:
  """All fields of a config as YAML that `load_config` reads back."""
  text = io.StringIO()
  _yaml().dump(_plain(dataclasses.asdict(config)), text)
  return text.getvalue()


def read_yaml(path: str | PathLike) -> dict[Any, Any]:
  """The mapping in a YAML file, unchecked.

  Raises:
    UserError: no such file, not YAML, or not a mapping.
  """
  path = Path(path)
  if not path.is_file():
    there = sorted(str(p) for p in path.parent.glob("*.yaml"))
    hint = f": there are {', '.join(there)}" if there else ""
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
    raise UserError(f"{path} holds no sections but {type(tree).__name__}: {str(tree)[:80]!r}")
  return tree


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Lines like `train.steps: 400 -> 500` for the fields in which two nested dicts differ."""
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
  """Dotted names and values of a nested mapping."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def is_field(word: str) -> bool:
  """Whether a command-line word like `--train.steps` or `--name=x` names a field, if misspelled."""
  name = word[2:].partition("=")[0]
  return word.startswith("--") and (name in _FIELDS or "." in name)


def fields_help(sections: Sequence[str] = ()) -> str:
  """The fields of the config with their meaning, type and default; of these sections only, if named."""
  parser = _new_parser(usage=argparse.SUPPRESS, add_help=False)
  if not sections:
    parser.add_class_arguments(Config)
  for section in sections:
    parser.add_class_arguments(_section(_FIELDS[section]), section)
  return parser.format_help()


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


def _parsed(parse: Callable, given: Any, where: str) -> jsonargparse.Namespace:
  """What a method of jsonargparse makes of the given fields; its errors in our words."""
  try:
    parsed = parse(given, defaults=False)
  except (argparse.ArgumentError, TypeError, KeyError) as error:
    raise UserError(_problem(error, where)) from error
  for name, value in flatten(_plain(parsed)):
    if value is None and type(None) not in typing.get_args(_FIELDS.get(name, None | int)):
      raise UserError(f"{name}=null{_place(where)}: {name} cannot be null")
  return parsed


def _problem(error: Exception, where: str) -> str:
  """jsonargparse's message as one line that begins with the field."""
  text = re.sub(r"<class '([\w.]+)'>", r"\1", str(error))
  text = re.sub(r'^Parser key "([^"]+)":', r"\1:", text.strip())
  return re.sub(r"\s+", " ", text).rstrip(".") + _place(where)


def _place(where: str) -> str:
  return f" ({where})" if where else ""


def _check_names(fields: Mapping[Any, Any], path: tuple[str, ...], where: str) -> None:
  """Raises UserError, with the nearest known name, unless every key is a field."""
  for key, value in fields.items():
    name = ".".join((*path, str(key)))
    if "." in str(key) and name in _FIELDS:
      raise UserError(
        f"{name} {where} is written with a dot: in a file, put it under its section "
        f"{name.partition('.')[0]}"
      )
    if name not in _FIELDS or not isinstance(key, str):
      raise _unknown(name, where)
    _check_items(name, value)
    if _section(_FIELDS[name]) is None:
      continue
    if isinstance(value, Mapping):
      _check_names(value, (*path, key), where)
    elif value is not None:
      raise UserError(f"{name}={value!r} is not a section{_place(where)}: write {name}.FIELD")


def _check_items(name: str, value: Any) -> None:
  """Raises UserError if one of a list of sections lacks a field that has no default."""
  item = typing.get_args(_FIELDS[name])[0] if typing.get_origin(_FIELDS[name]) is tuple else None
  if dataclasses.is_dataclass(item) and isinstance(value, list):
    for i, fields in enumerate(value):
      for field in dataclasses.fields(item):
        if (
          isinstance(fields, Mapping)
          and field.default is dataclasses.MISSING
          and field.name not in fields
        ):
          raise UserError(f"{name}[{i}] lacks {field.name}")


def _unknown(name: str, where: str) -> UserError:
  return UserError(f"unknown field {name} {where}".rstrip() + _suggestion(name))


def _suggestion(name: str) -> str:
  """The field most like `name`: of the same last part, of these initials, or spelled nearly so."""
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
  around = [field for field in _FIELDS if field.rpartition(".")[0] == section]
  return f": there are {', '.join(around)}" if around else ""


def _initials(name: str) -> str:
  return "".join(word[0] for word in name.split("_"))


def _words(overrides: Sequence[str]) -> list[str]:
  """The overrides as words `--name=value`, each of a field that exists."""
  words, rest = [], list(overrides)
  while rest:
    word = rest.pop(0)
    if not word.startswith("--") or word == "--":
      raise UserError(
        f"unexpected {word!r} on the command line: overrides look like --train.steps 100"
      )
    name, equals, text = word[2:].partition("=")
    if name not in _FIELDS:
      raise _unknown(name, "on the command line")
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name} has no value: write --{name} VALUE")
      text = rest.pop(0)
    words.append(f"--{name}={text}")
  return words


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted names and types of all fields, sections included."""
  for name, hint in typing.get_type_hints(cls).items():
    yield f"{prefix}{name}", hint
    if _section(hint) is not None:
      yield from _fields(_section(hint), f"{prefix}{name}.")


def _section(hint: Any) -> type | None:
  """The dataclass of a section; of one that may be null, `SECTION | None`, too."""
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return next((option for option in options if dataclasses.is_dataclass(option)), None)


_FIELDS = dict(_fields(Config))


def _without_empty_sections(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Drops `section:` with nothing under it, which YAML reads as null: it keeps its defaults."""
  return {
    key: value
    for key, value in fields.items()
    if not (value is None and dataclasses.is_dataclass(_FIELDS[key]))
  }


def _plain(value: Any) -> Any:
  """Mappings, lists and scalars, of what jsonargparse or a dataclass has."""
  if isinstance(value, jsonargparse.Namespace):
    value = vars(value)
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _shown(value: Any) -> str:
  return "null" if value is None else str(value)


def _yaml() -> YAML:
  yaml = YAML(typ="safe", pure=True)  # the C parser reads YAML 1.1
  yaml.default_flow_style = False
  yaml.sort_base_mapping_type_on_output = False
  yaml.allow_unicode = True
  return yaml


def _yaml_problem(error: YAMLError) -> str:
  if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
    return f"line {error.problem_mark.line + 1}: {error.problem}"
  return str(error).splitlines()[0]
