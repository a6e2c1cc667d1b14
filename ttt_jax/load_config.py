"""From a YAML file and command-line words to a `Config`, and back.

Everything a user can get wrong here is a ValueError that names the field. Scalars follow YAML 1.2:
`4e-3` is a number, `yes` a string, `010` ten; a key given twice is an error.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import draccus
import yaml

from ttt_jax.config import Config
from ttt_jax.errors import UserError

_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
  r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
  r"|\.(?:nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
  yaml_implicit_resolvers: typing.ClassVar[dict] = {}

  def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = []
    for key_node, _ in node.value:
      key = self.construct_object(key_node, deep=True)
      if key in seen:
        raise yaml.constructor.ConstructorError(
          problem=f"{key} is given twice", problem_mark=key_node.start_mark
        )
      seen.append(key)
    return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
  """Quotes what YAML 1.1 or `_Loader` would not read as a string."""


_SCALARS = (
  ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
  ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
  ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
  ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)
for _tag, _pattern, _first in _SCALARS:
  _Loader.add_implicit_resolver(_tag, _pattern, _first)
  _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def load_config(path: str | PathLike | None, overrides: Sequence[str] = ()) -> Config:
  """The config of a YAML file with command-line overrides.

  Args:
    path: a YAML file of nested sections; what it does not name keeps its default. None: no file.
    overrides: words like `--train.steps 100`, `--train.steps=100` or `--name short`. A value is read
      as YAML, but for a text field it is taken as it stands (`null` is none), so that
      `--data.path "*.txt"` works. The last of two for one field counts.

  Raises:
    ValueError: no such file, not YAML, an unknown field, a value of the wrong type, or a config that
      `Config` refuses.
  """
  tree = {} if path is None else read_yaml(path)
  _check(Config, tree, (), f"in {path}")
  for name, text in _split_overrides(overrides):
    patch = _nested(name, _override_value(name, text))
    _check(Config, patch, (), "on the command line")
    tree = _merge(tree, patch)
  try:
    return draccus.decode(Config, _without_empty_sections(Config, tree))
  except draccus.utils.ParsingError as error:
    # The dataclass's own check, which draccus wraps.
    raise UserError(str(error.__cause__ or error)) from error


def override_section(section: Any, name: str, overrides: Sequence[str]) -> Any:
  """A section of a config with command-line overrides of its own fields, `--NAME.field value`.

  Raises:
    ValueError: as `load_config`, or a field of another section.
  """
  tree = {name: dataclasses.asdict(section)}
  tree[name] = {k: list(v) if isinstance(v, tuple) else v for k, v in tree[name].items()}
  for field, text in _split_overrides(overrides):
    if not field.startswith(f"{name}."):
      raise UserError(f"--{field} cannot be given here, only --{name}.FIELD")
    patch = _nested(field, _override_value(field, text))
    _check(Config, patch, (), "on the command line")
    tree = _merge(tree, patch)
  try:
    return draccus.decode(type(section), tree[name])
  except draccus.utils.ParsingError as error:
    raise UserError(str(error.__cause__ or error)) from error


def dump_config(config: Config) -> str:
  """All fields of a config as YAML that `load_config` reads back."""
  return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(path: str | PathLike) -> dict[Any, Any]:
  """The mapping in a YAML file, unchecked.

  Raises:
    ValueError: no such file, not YAML, or not a mapping.
  """
  path = Path(path)
  if not path.is_file():
    there = sorted(str(p) for p in path.parent.glob("*.yaml"))
    hint = f": there are {', '.join(there)}" if there else ""
    raise UserError(f"no config file {path}{hint}")
  try:
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not a text file") from error
  except yaml.YAMLError as error:
    raise UserError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
  if tree is None:
    return {}
  if not isinstance(tree, dict):
    raise UserError(f"{path} holds no sections but {type(tree).__name__}: {str(tree)[:80]!r}")
  return tree


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """Lines like `train.steps: 400 -> 500` for the fields in which two nested dicts differ."""
  before, after = dict(flatten(old)), dict(flatten(new))
  lines = []
  for name in {**before, **after}:
    if name not in before:
      lines.append(f"{name}: (absent) -> {_shown(after[name])}")
    elif name not in after:
      lines.append(f"{name}: {_shown(before[name])} -> (absent)")
    elif _plain(before[name]) != _plain(after[name]):
      lines.append(f"{name}: {_shown(before[name])} -> {_shown(after[name])}")
  return lines


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted names and values of a nested dict."""
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _yaml_problem(error: yaml.YAMLError) -> str:
  if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
    return f"line {error.problem_mark.line + 1}: {error.problem}"
  return str(error).splitlines()[0]


def _plain(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
  return "null" if value is None else str(_plain(value))


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


def _item_section(hint: Any) -> type | None:
  """The dataclass of a list of sections, `tuple[SECTION, ...]`."""
  item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
  return item if dataclasses.is_dataclass(item) else None


_FIELDS = dict(_fields(Config))


def _suggestion(name: str) -> str:
  """The field most like `name`; one with its last part in another section comes first."""
  last = name.rpartition(".")[2]
  same = [field for field in _FIELDS if field.rpartition(".")[2] == last]
  close = same or difflib.get_close_matches(name, _FIELDS, n=1)
  if close:
    return f": did you mean {' or '.join(close)}?"
  section = name.rpartition(".")[0]
  around = [field for field in _FIELDS if field.rpartition(".")[0] == section]
  return f": there are {', '.join(around)}" if around else ""


def _unknown(name: str, where: str) -> ValueError:
  return UserError(f"unknown field {name} {where}{_suggestion(name)}")


def _check(cls: type, tree: dict, path: tuple[str, ...], where: str) -> None:
  """Raises ValueError unless every key is a field and every value is of its type."""
  hints = typing.get_type_hints(cls)
  for key, value in tree.items():
    name = ".".join((*path, str(key)))
    if key not in hints:
      if name in _FIELDS:
        raise UserError(
          f"{name} {where} is written with a dot: in a file, put it under its section "
          f"{name.partition('.')[0]}"
        )
      raise _unknown(name, where)
    hint = hints[key]
    section, item = _section(hint), _item_section(hint)
    if item is not None and isinstance(value, list):
      for i, one in enumerate(value):
        if not isinstance(one, dict):
          raise UserError(f"{name}[{i}]={one!r} is not {_describe(item)} ({where})")
        _check_item(item, one, f"{name}[{i}]", where)
    elif section is None:
      if not _fits(value, hint):
        raise UserError(f"{name}={value!r} is not {_describe(hint)} ({where})")
    elif isinstance(value, dict):
      _check(section, value, (*path, key), where)
    elif value is not None:
      raise UserError(f"{name}={value!r} is not a section ({where}): write {name}.FIELD")


def _check_item(cls: type, tree: dict, name: str, where: str) -> None:
  """`_check` of one of a list of sections."""
  hints = typing.get_type_hints(cls)
  for key, value in tree.items():
    if key not in hints:
      raise UserError(f"unknown field {name}.{key} {where}: there are {', '.join(hints)}")
    if not _fits(value, hints[key]):
      raise UserError(f"{name}.{key}={value!r} is not {_describe(hints[key])} ({where})")
  for field in dataclasses.fields(cls):
    if field.default is dataclasses.MISSING and field.name not in tree:
      raise UserError(f"{name} lacks {field.name} ({where})")


def _fits(value: Any, hint: Any) -> bool:
  if isinstance(hint, types.UnionType):
    return any(_fits(value, option) for option in typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    item, _ = typing.get_args(hint)  # tuple[item, ...]
    return isinstance(value, list) and all(_fits(v, item) for v in value)
  if hint is float:
    return type(value) in (int, float)
  return type(value) is hint  # bool is a subclass of int


def _describe(hint: Any) -> str:
  names = {int: "an int", float: "a number", bool: "true or false", str: "a text"}
  names[types.NoneType] = "null"
  if isinstance(hint, types.UnionType):
    return " or ".join(_describe(option) for option in typing.get_args(hint))
  if dataclasses.is_dataclass(hint):
    return f"a mapping of {', '.join(typing.get_type_hints(hint))}"
  if _item_section(hint) is not None:
    return f"a list, each item {_describe(_item_section(hint))}"
  if typing.get_origin(hint) is tuple:
    return f"a list of {typing.get_args(hint)[0].__name__}"
  return names[hint]


def _split_overrides(words: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Pairs of dotted name and text."""
  rest = list(words)
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
    yield name, text


def _override_value(name: str, text: str) -> Any:
  if text not in ("null", "~") and _fits("", _FIELDS[name]):
    return text
  try:
    return yaml.load(text, Loader=_Loader)
  except yaml.YAMLError as error:
    raise UserError(f"--{name} {text!r} is not valid YAML: {_yaml_problem(error)}") from error


def _nested(name: str, value: Any) -> dict[str, Any]:
  for key in reversed(name.split(".")):
    value = {key: value}
  return value


def _merge(old: dict, new: dict) -> dict:
  merged = dict(old)
  for key, value in new.items():
    both = isinstance(value, dict) and isinstance(merged.get(key), dict)
    merged[key] = _merge(merged[key], value) if both else value
  return merged


def _without_empty_sections(cls: type, tree: dict) -> dict:
  """Drops `section:` with nothing under it, which YAML reads as null: it keeps its defaults."""
  hints = typing.get_type_hints(cls)
  return {
    key: value
    for key, value in tree.items()
    if not (value is None and dataclasses.is_dataclass(hints[key]))
  }
