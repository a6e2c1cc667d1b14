"""The command line: parse, build, call."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ttt_jax.config import Config
from ttt_jax.load_config import load_config

_EPILOG = """Every field of the config can be overridden, as in
  ttt-jax train configs/quickstart.yaml --train.steps 100 --ttt.layers "[2]" --run_dir runs/short
"""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="ttt-jax", description="Language models that learn while they read."
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, text in (
    ("train", "train a model, evaluate it, draw the result; the same command again resumes"),
    ("eval", "evaluate the newest checkpoint of a run again"),
  ):
    command = commands.add_parser(
      name,
      help=text,
      description=text,
      epilog=_EPILOG,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", help="a YAML file, see configs/")
    command.add_argument(
      "overrides",
      nargs=argparse.REMAINDER,
      metavar="--section.field value",
      help="config overrides",
    )
  return parser


def _start_runtime(config: Config) -> None:
  """Tells JAX what it must know before its first use."""
  import jax

  if config.runtime.cpu_devices is not None:
    jax.config.update("jax_num_cpu_devices", config.runtime.cpu_devices)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; a user's mistake is one line on stderr and exit status 2."""
  parsed = _parser().parse_args(arguments)
  try:
    config = load_config(parsed.config, parsed.overrides)
    _start_runtime(config)
    from ttt_jax.run import run_evaluation, run_training

    if parsed.command == "train":
      run_training(config)
    else:
      run_evaluation(config)
  except (ValueError, NotImplementedError) as error:
    if not _is_ours(error):
      raise
    print(f"ttt-jax {parsed.command}: {error}", file=sys.stderr)
    return 2
  return 0


def _is_ours(error: BaseException) -> bool:
  """Whether ttt_jax itself raised: its message is for the user, another one's wants a traceback."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return Path(innermost.filename).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
  sys.exit(main())
