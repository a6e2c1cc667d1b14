"""Adds the commands that measure fast weights: `bench fast-weights`, `bench generation`."""

import argparse
from pathlib import Path

from ttt_jax.cli.shared import from_flags


def add(commands: argparse._SubParsersAction) -> None:
  bench = commands.add_parser("bench", help="measure what fast weights cost on this machine")
  benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
  text = "measure a gated MLP with and without fast weights: time, memory, bytes exchanged"
  _add_fast_weights(benches.add_parser("fast-weights", help=text, description=text))
  text = (
    "measure generation with and without fast weights that learn meanwhile: time per token, memory"
  )
  _add_generation(benches.add_parser("generation", help=text, description=text))


def _add_fast_weights(parser: argparse.ArgumentParser) -> None:
  for flag, default, text in (
    ("tokens", 8192, "T, tokens of a row"),
    ("chunk-size", 512, "C, tokens of a chunk"),
    ("d-model", 512, "D, the model width"),
    ("d-ff", 1536, "F, the hidden width"),
    ("batch", 1, "rows"),
    ("shards", 1, "devices to measure the exchange on; a CPU is split into so many"),
    ("repeats", 5, "timed rounds, at least 5"),
  ):
    parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument(
    "--ways", nargs="+", default=None, help="measure only these variants of the op"
  )
  parser.add_argument("--op-only", action="store_true", help="measure the down projection alone")
  parser.add_argument("--name", default="bench_fast_weights", help="name of the files to write")
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
  parser.add_argument("--name", default="bench_generation", help="name of the file to write")
  parser.add_argument("--out", type=Path, default=Path("bench"), help="directory (default bench)")
  parser.set_defaults(run=_run_generation)


def _run_generation(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.bench.generation import GenerationBenchConfig, run_generation_bench

  run_generation_bench(from_flags(GenerationBenchConfig, parsed), parsed.name, parsed.out)
