"""The command line: parse, build, call."""

import argparse
import dataclasses
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
  bench = commands.add_parser("bench", help="measure what fast weights cost on this machine")
  benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
  text = "dense gated MLP against TTT MLP: time, memory, bytes exchanged; tables, JSON and a plot"
  _add_fast_weights(benches.add_parser("fast-weights", help=text, description=text))
  return parser


def _add_fast_weights(parser: argparse.ArgumentParser) -> None:
  for flag, default, text in (
    ("tokens", 8192, "T, of a row"),
    ("chunk-size", 512, "C"),
    ("d-model", 512, "D"),
    ("d-ff", 1536, "F"),
    ("batch", 1, "rows"),
    ("shards", 1, "devices for the part about the exchange; on a CPU, it is split into as many"),
    ("repeats", 5, "rounds, at least 5"),
  ):
    parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--ways", nargs="+", default=None, help="only these ways to compute it")
  parser.add_argument("--op-only", action="store_true", help="the down projection alone")
  parser.add_argument("--name", default="bench_fast_weights", help="of the files written")
  parser.add_argument("--out", type=Path, default=Path("bench"), help="directory (default bench)")


def _run_bench(parsed: argparse.Namespace) -> None:
  import jax

  if parsed.shards > 1:
    jax.config.update("jax_num_cpu_devices", parsed.shards)
  from ttt_jax.bench import BenchConfig, run_bench

  fields = {field.name for field in dataclasses.fields(BenchConfig)}
  config = {name: value for name, value in vars(parsed).items() if name in fields}
  config["ways"] = None if parsed.ways is None else tuple(parsed.ways)
  run_bench(BenchConfig(**config), parsed.name, parsed.out)


def _start_runtime(config: Config) -> None:
  """Tells JAX what it must know before its first use."""
  import jax

  if config.runtime.cpu_devices is not None:
    jax.config.update("jax_num_cpu_devices", config.runtime.cpu_devices)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; a user's mistake is one line on stderr and exit status 2."""
  parsed = _parser().parse_args(arguments)
  try:
    if parsed.command == "bench":
      _run_bench(parsed)
      return 0
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
