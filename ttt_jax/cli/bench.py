"""What fast weights cost: `bench fast-weights`, `bench generation`."""

import argparse
from pathlib import Path

from ttt_jax.cli.shared import from_flags


def add(commands: argparse._SubParsersAction) -> None:
  bench = commands.add_parser("bench", help="measure what fast weights cost on this machine")
  benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
  text = "dense gated MLP against TTT MLP: time, memory, bytes exchanged; tables, JSON and a plot"
  _add_fast_weights(benches.add_parser("fast-weights", help=text, description=text))
  text = (
    "a model that learns while it writes against its twin that does not: time per token, memory"
  )
  _add_generation(benches.add_parser("generation", help=text, description=text))


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
  parser.set_defaults(run=_run_fast_weights)


def _run_fast_weights(parsed: argparse.Namespace) -> None:
  import jax

  if parsed.shards > 1:
    jax.config.update("jax_num_cpu_devices", parsed.shards)
  from ttt_jax.extras.bench.cases import BenchConfig
  from ttt_jax.extras.bench.fast_weights import run_bench

  run_bench(from_flags(BenchConfig, parsed), parsed.name, parsed.out)


def _add_generation(parser: argparse.ArgumentParser) -> None:
  for flag, default in (
    ("layers", 30),
    ("d-model", 576),
    ("d-ff", 1536),
    ("heads", 9),
    ("kv-heads", 3),
    ("vocab", 49152),
    ("every", 6),
    ("chunk-size", 128),
    ("prompt", 256),
    ("batch", 1),
    ("repeats", 5),
  ):
    parser.add_argument(f"--{flag}", type=int, default=default, help=f"(default {default})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--name", default="bench_generation", help="of the file written")
  parser.add_argument("--out", type=Path, default=Path("bench"), help="directory (default bench)")
  parser.set_defaults(run=_run_generation)


def _run_generation(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.bench.generation import GenerationBenchConfig, run_generation_bench

  run_generation_bench(from_flags(GenerationBenchConfig, parsed), parsed.name, parsed.out)
