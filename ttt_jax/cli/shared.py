"""Parts of commands that several have."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ttt_jax.config import Config
from ttt_jax.load_config import load_config
from ttt_jax.rundir import CONFIG_FILE

EVALUATED = "a run's YAML file or directory; or a Hugging Face directory, a .gguf file"


def add_command(
  commands: argparse._SubParsersAction, name: str, text: str, epilog: str, **how: Any
) -> argparse.ArgumentParser:
  """A command with examples, whose flags are not abbreviated: overrides of the config may look alike."""
  return commands.add_parser(
    name,
    help=text,
    description=text,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    **how,
  )


def from_flags(config: type, parsed: argparse.Namespace) -> Any:
  """A dataclass whose fields are flags; what a flag collects in a list is a tuple in it."""
  given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
  return config(**{k: tuple(x) if isinstance(x, list) else x for k, x in given.items()})


def evaluated(parsed: argparse.Namespace) -> tuple[Config, bool]:
  """The config of what is to be evaluated, and whether it is a run, whose model is in its checkpoints."""
  path = Path(parsed.config)
  if path.suffix in (".yaml", ".yml"):
    return load_config(path, parsed.overrides), True
  if (path / CONFIG_FILE).is_file():
    words = ["--run_dir", str(path), *parsed.overrides]
    return load_config(path / CONFIG_FILE, words), True
  given = ["--init_from", parsed.config, "--name", path.stem]
  return load_config(None, [*given, *parsed.overrides]), False


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
