"""Holds what several commands share."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt_jax.checkpoints.sections import SECTIONS
from ttt_jax.config import Config
from ttt_jax.config.recorded import CONFIG_FILE, recorded_fields
from ttt_jax.config.yaml import (
  flatten,
  load_fields,
  make_config,
  merged_fields,
  nested_fields,
  overridden,
)
from ttt_jax.errors import UserError

EVALUATED = "a run's YAML file or directory, a Hugging Face directory, or a .gguf file"
ALL_FIELDS = "all"  # a command takes the fields of all sections
MODEL_FIELDS = SECTIONS


class Command(argparse.ArgumentParser):
  """Parses one command; its help also lists the fields of the config that the command takes."""

  def __init__(
    self,
    *args: Any,
    fields: str | Sequence[str] = (),
    unused: Sequence[str] = (),
    **options: Any,
  ):
    """Makes the parser.

    Args:
      fields: sections of the config whose fields the command takes, or `ALL_FIELDS`.
      unused: fields among them, or sections, that have no effect on the command: it refuses them.
      options: as `argparse.ArgumentParser`; flags are never abbreviated, since fields may look alike.
    """
    super().__init__(*args, **{"allow_abbrev": False, **options})
    self._fields, self._unused = fields, unused
    self.set_defaults(unused=unused)
    self._parts: argparse._SubParsersAction | None = None

  def add_subparsers(self, **options: Any) -> argparse._SubParsersAction:
    self._parts = super().add_subparsers(**options)
    return self._parts

  @property
  def parts(self) -> Mapping[str, "Command"]:
    """Returns the commands that this one consists of, by the word that follows, as `data prepare`."""
    return {} if self._parts is None else self._parts.choices

  @property
  def takes_fields(self) -> bool:
    """Says whether the command takes `--section.field value`."""
    return len(self._fields) > 0

  @property
  def flags(self) -> frozenset[str]:
    """Returns the command's own options."""
    return frozenset(self._option_string_actions)

  def format_help(self) -> str:
    text = super().format_help()
    if not self.takes_fields:
      return text
    from ttt_jax.config.yaml import fields_help

    fields = fields_help(() if self._fields == ALL_FIELDS else self._fields, without=self._unused)
    text = text.replace("\n\n", " [--section.field value ...]\n\n", 1)  # after the usage line
    return f"{text}\nFields of the config; a YAML file has them under their section:\n\n{fields}"


def add_command(
  commands: argparse._SubParsersAction, name: str, text: str, epilog: str = "", **options: Any
) -> Command:
  """Adds a command with examples in its epilog; `options` are those of `Command`."""
  return commands.add_parser(
    name,
    help=text,
    description=text,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    **options,
  )


def given_model_fields(parsed: argparse.Namespace) -> dict[str, Any]:
  """Returns the fields of `model`, `attention` and `ttt` that the command line sets.

  Raises:
    UserError: the command line sets a field of another section; as `load_fields`.
  """
  fields = load_fields(None, parsed.overrides)
  for name in fields:
    if name not in MODEL_FIELDS:
      field = next(flatten({name: fields[name]}))[0]
      raise UserError(f"--{field} cannot be given here, only fields of {', '.join(MODEL_FIELDS)}")
  return fields


def given_config_fields(parsed: argparse.Namespace) -> dict[str, Any]:
  """Returns the fields of the config that the command line sets.

  Raises:
    UserError: a field has no effect on the command; as `load_fields`.
  """
  fields = load_fields(None, parsed.overrides)
  for name, _ in flatten(fields):
    if _is_among(name, parsed.unused):
      raise UserError(f"--{name} has no effect on this command: leave it out")
  return fields


def _is_among(field: str, names: Sequence[str]) -> bool:
  """Tells whether a field, or a section that it is in, is among the names."""
  return any(field == name or field.startswith(f"{name}.") for name in names)


def from_flags(config: type, parsed: argparse.Namespace) -> Any:
  """Makes the dataclass `config` from the flags of the same names; lists become tuples."""
  values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
  return config(**{k: tuple(x) if isinstance(x, list) else x for k, x in values.items()})


def evaluated(parsed: argparse.Namespace) -> tuple[Config, bool]:
  """Returns the config of the model to evaluate, and whether the model is a run's newest checkpoint.

  Raises:
    UserError: a field names another model than the command does; as `load_config`.
  """
  path = Path(parsed.config)
  given = given_config_fields(parsed)
  if path.suffix in (".yaml", ".yml"):
    return make_config(overridden(_used(load_fields(path), parsed.unused), given)), True
  is_run = (path / CONFIG_FILE).is_file()
  source = {"run_dir": str(path)} if is_run else {"init_from": parsed.config}
  for name in ("run_dir", "init_from") if is_run else ("init_from",):
    if name in given and given[name] != source.get(name):
      raise UserError(
        f"--{name} {given[name]} is given, but {parsed.config} is what is evaluated: leave one out"
      )
  fields = _used(recorded_fields(path), parsed.unused) if is_run else {"name": path.stem}
  return make_config(merged_fields(overridden(fields, given), source)), is_run


def _used(fields: dict[str, Any], unused: Sequence[str]) -> dict[str, Any]:
  """Returns nested fields without those that a command does not use, so that no check asks for them."""
  return nested_fields({k: x for k, x in flatten(fields) if not _is_among(k, unused)})


def add_ruler_samples(command: argparse.ArgumentParser) -> None:
  """Adds the flags for the fields of `SamplesConfig`."""
  command.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks (default: all)")
  command.add_argument(
    "--lengths",
    nargs="+",
    type=int,
    default=[4096],
    metavar="TOKENS",
    help="tokens of prompt and answer together (default 4096)",
  )
  command.add_argument(
    "--samples", type=int, default=100, help="samples per task and length (default 100)"
  )
  command.add_argument(
    "--haystack", type=Path, metavar="FILE", help="text that hides the needles (default: noise)"
  )
  command.add_argument("--squad", type=Path, metavar="FILE", help="questions in SQuAD's format")
  command.add_argument(
    "--hotpot", type=Path, metavar="FILE", help="questions in SQuAD's or HotpotQA's format"
  )
  command.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
