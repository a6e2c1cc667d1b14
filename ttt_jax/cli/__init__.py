"""The command line: parse, build, call."""

import argparse
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from ttt_jax.cli import bench, data, evaluation, models, runs
from ttt_jax.errors import UnsupportedError, UserError


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
  """The parser, and the names of its commands, of which some are two words."""
  parser = argparse.ArgumentParser(
    prog="ttt-jax", description="Language models that learn while they read."
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for module in (runs, evaluation, models, data, bench):
    module.add(commands)
  return parser, commands.choices


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; a user's mistake is one line on stderr and exit status 2."""
  parser, named = _parser()
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if " ".join(arguments[:2]) in named:  # `eval ruler SRC` is a command, `eval SRC` another
    arguments[:2] = [" ".join(arguments[:2])]
  parsed, overrides = parser.parse_known_args(arguments)
  if overrides and not parsed.takes_overrides:
    parser.error(f"unrecognized arguments: {' '.join(overrides)}")
  parsed.overrides = [*getattr(parsed, "overrides", []), *overrides]
  try:
    with warnings.catch_warnings():
      warnings.showwarning = partial(_show_warning, warnings.showwarning)
      return parsed.run(parsed) or 0
  except (UserError, UnsupportedError) as error:
    print(f"ttt-jax {parsed.command}: {error}", file=sys.stderr)
    return 2


def _show_warning(
  show: Callable, message: Warning, category: type, *where: Any, **more: Any
) -> None:
  """What ttt_jax tells its user is a line without the place in the code; other warnings as ever."""
  if category is UserWarning:
    print(f"ttt-jax: {message}", file=sys.stderr)
  else:
    show(message, category, *where, **more)
