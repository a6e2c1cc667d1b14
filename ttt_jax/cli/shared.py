"""Parts of commands that several have."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttt_jax.checkpoints.sections import SECTIONS
from ttt_jax.config import Config
from ttt_jax.config.recorded import CONFIG_FILE
from ttt_jax.config.yaml import flatten, load_config, load_fields, make_config, merged_fields
from ttt_jax.errors import UserError

EVALUATED = "a run's YAML file or directory; or a Hugging Face directory, a .gguf file"
ALL_FIELDS = "all"  # of the config
MODEL_FIELDS = SECTIONS


class Command(argparse.ArgumentParser):
  """The parser of a command, whose help also lists the fields of the config that it takes."""

  def __init__(self, *args: Any, fields: str | Sequence[str] = (), **options: Any):
    """Makes the parser.

    Args:
      fields: sections of the config whose fields the command takes, or `ALL_FIELDS`.
      options: as `argparse.ArgumentParser`; flags are never abbreviated, since fields may look alike.
    """
    super().__init__(*args, **{"allow_abbrev": False, **options})
    self._fields = fields

  @property
  def takes_fields(self) -> bool:
    """Whether `--section.field value` may be given."""
    return len(self._fields) > 0

  @property
  def flags(self) -> frozenset[str]:
    """The command's own options."""
    return frozenset(self._option_string_actions)

  def format_help(self) -> str:
    text = super().format_help()
    if not self.takes_fields:
      return text
    from ttt_jax.config.yaml import fields_help

    fields = fields_help(() if self._fields == ALL_FIELDS else self._fields)
    text = text.replace("\n\n", " [--section.field value ...]\n\n", 1)  # the end of the usage
    return f"{text}\nFields of the config, which a YAML file has under their section:\n\n{fields}"


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
  """The fields of `model`, `attention` and `ttt` on the command line.

  Raises:
    UserError: as `load_fields`, or a field of another section.
  """
  fields = load_fields(None, parsed.overrides)
  for name in fields:
    if name not in MODEL_FIELDS:
      given = next(flatten({name: fields[name]}))[0]
      raise UserError(f"--{given} cannot be given here, only fields of {', '.join(MODEL_FIELDS)}")
  return fields


def from_flags(config: type, parsed: argparse.Namespace) -> Any:
  """A dataclass whose fields are flags; what a flag collects in a list is a tuple in it."""
  given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
  return config(**{k: tuple(x) if isinstance(x, list) else x for k, x in given.items()})


def evaluated(parsed: argparse.Namespace) -> tuple[Config, bool]:
  """The config of what is to be evaluated, and whether it is a run, whose model is in its checkpoints.

  Raises:
    UserError: as `load_config`; a field that names another model than the command does.
  """
  path = Path(parsed.config)
  if path.suffix in (".yaml", ".yml"):
    return load_config(path, parsed.overrides), True
  is_run = (path / CONFIG_FILE).is_file()
  named = {"run_dir": str(path)} if is_run else {"init_from": parsed.config}
  given = load_fields(None, parsed.overrides)
  for name in ("run_dir", "init_from") if is_run else ("init_from",):
    if name in given and given[name] != named.get(name):
      raise UserError(
        f"--{name} {given[name]} is given, but {parsed.config} is what is evaluated: leave one out"
      )
  if is_run:
    return make_config(merged_fields(load_fields(path / CONFIG_FILE), given, named)), True
  return make_config(merged_fields({"name": path.stem}, given, named)), False


def add_ruler_samples(command: argparse.ArgumentParser) -> None:
  """What `SamplesConfig` has."""
  command.add_argument("--tasks", nargs="+", metavar="TASK", help="(default: all)")
  command.add_argument(
    "--lengths",
    nargs="+",
    type=int,
    default=[4096],
    metavar="TOKENS",
    help="of prompt and answer (default 4096)",
  )
  command.add_argument(
    "--samples", type=int, default=100, help="of a task and length (default 100)"
  )
  command.add_argument(
    "--haystack", type=Path, metavar="FILE", help="text that needles are hidden in (default: noise)"
  )
  command.add_argument("--squad", type=Path, metavar="FILE", help="questions in SQuAD's format")
  command.add_argument(
    "--hotpot", type=Path, metavar="FILE", help="in SQuAD's or HotpotQA's format"
  )
  command.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
