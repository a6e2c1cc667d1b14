"""Runs the command line: parses the words, builds the config, calls the command."""

import argparse
import difflib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from ttt_jax import __version__
from ttt_jax.cli import bench, compare, data, evaluation, models, runs
from ttt_jax.cli.shared import Command
from ttt_jax.errors import UnsupportedError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; a user's mistake is one line on stderr and exit status 2."""
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  # On a CPU, XLA factors and solves with scipy's library, which reads this when it is loaded. On cores
  # that others use too, its threads wait for one another: 1.7 s for a matrix that takes one thread 0.03 s.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  try:
    parsed = parse(arguments)
    with warnings.catch_warnings():
      warnings.showwarning = partial(_show_warning, warnings.showwarning)
      return parsed.run(parsed) or 0
  except (UserError, UnsupportedError) as error:
    print(f"ttt-jax {' '.join(_command_name(arguments))}: {error}", file=sys.stderr)
    return 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """Parses the command and its options; `overrides` has the words that set fields of the config.

  Raises:
    UserError: an option is unknown, or is probably misspelled.
    SystemExit: argparse refuses the words, or prints a help text.
  """
  parser, commands = _parser()
  first, words = _command_name(arguments), list(arguments)
  words[: len(first)] = [" ".join(first)] if first else []
  overrides, own, parts = [], 0, commands
  while own < len(words) and words[own] in parts:
    command = parts[words[own]]
    own, parts = own + 1, command.parts
  if own:
    words[own:], overrides = _split(words[own:], command)
  parsed = parser.parse_args(words)
  parsed.overrides = overrides
  return parsed


def _command_name(arguments: Sequence[str]) -> list[str]:
  """Returns the first word, or two: `eval ruler SRC` is one command, `eval SRC` another."""
  _, commands = _parser()
  return list(arguments[: 2 if " ".join(arguments[:2]) in commands else 1])


@cache
def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, Command]]:
  """Makes the parser; returns it with its commands by name (one word or two)."""
  parser = argparse.ArgumentParser(
    prog="ttt-jax", description="Language models that learn while they read."
  )
  parser.add_argument("--version", action="version", version=f"ttt-jax {__version__}")
  commands = parser.add_subparsers(
    dest="command", required=True, metavar="COMMAND", parser_class=Command
  )
  for module in (runs, evaluation, models, data, bench):
    module.add(commands)
  compare.add(commands, parse)
  return parser, commands.choices


def _split(words: Sequence[str], command: Command) -> tuple[list[str], list[str]]:
  """Separates the command's own words from those that set fields of the config, in any order."""
  command_words, overrides, rest = [], [], list(words)
  while rest:
    word = rest.pop(0)
    flag, equals, _ = word.partition("=")
    if word == "--":
      return [*command_words, word, *rest], overrides
    if not word.startswith("--") or flag in command.flags:
      command_words.append(word)
      continue
    _check_flag(flag, command)
    overrides.append(word)
    if not equals and rest and not rest[0].startswith("--"):
      overrides.append(rest.pop(0))
  return command_words, overrides


def _check_flag(flag: str, command: Command) -> None:
  """Raises UserError if a flag is none of the command and cannot be a field of the config."""
  from ttt_jax.config.yaml import is_field

  cutoff = 0.8 if command.takes_fields else 0.6  # a misspelled field is no misspelled flag
  close = difflib.get_close_matches(flag, command.flags, n=1, cutoff=cutoff)
  if command.takes_fields and (not close or is_field(flag)):
    return
  options = sorted(option for option in command.flags if option.startswith("--"))
  remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(options)}"
  raise UserError(f"unknown option {flag}: {remedy}")


def _show_warning(
  show: Callable, message: Warning, category: type, *place: Any, **options: Any
) -> None:
  """Prints a warning of ttt_jax as one line without its place in the code, others as Python does."""
  if category is UserWarning:
    print(f"ttt-jax: {message}", file=sys.stderr)
  else:
    show(message, category, *place, **options)
