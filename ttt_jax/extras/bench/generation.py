"""Runs `ttt-jax bench generation`: measures the time per token and memory of learning meanwhile.

A model of random weights and its twin without fast weights generate in turns, round after round.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.errors import UserError
from ttt_jax.extras.bench.machine import machine, wide_console
from ttt_jax.files import write_json
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class GenerationBenchConfig:
  """Sets the sizes of the model (by default those of SmolLM2-135M) and of the texts.

  Attributes:
    every: one layer in so many has a fast weight.
    chunk_size: C. A round generates C tokens, so that every row learns one chunk per round.
    prompt: tokens of the prompt. batch: rows. repeats: rounds.
  """

  layers: int = 30
  d_model: int = 576
  d_ff: int = 1536
  heads: int = 9
  kv_heads: int = 3
  vocab: int = 49152
  dtype: str = "float32"
  every: int = 6
  chunk_size: int = 128
  prompt: int = 256
  batch: int = 1
  repeats: int = 5

  def __post_init__(self):
    if self.repeats < 5:
      raise UserError(f"--repeats {self.repeats}: a median of fewer than 5 runs says little")
    if not 1 <= self.every <= self.layers:
      raise UserError(f"--every {self.every} must be between 1 and --layers {self.layers}")


def run_generation_bench(config: GenerationBenchConfig, name: str, out: Path) -> dict[str, Any]:
  """Measures both models, prints a table, and writes `out/NAME.json`."""
  console = wide_console()
  here = machine()
  console.print(f"{here['device']} ({here['processor']}), jax {here['jax']}", highlight=False)
  model = ModelConfig(
    vocab_size=config.vocab,
    num_layers=config.layers,
    d_model=config.d_model,
    d_ff=config.d_ff,
    num_heads=config.heads,
    num_kv_heads=config.kv_heads,
    dtype=config.dtype,
    param_dtype=config.dtype,
  )
  fast = tuple(range(config.every - 1, config.layers, config.every))
  cases = {}
  for case, layers in (("without fast weights", ()), ("with fast weights", fast)):
    ttt = TTTConfig(layers=layers, chunk_size=config.chunk_size, target="hidden_states")
    decoder = Transformer(model, AttentionConfig(), ttt, rngs=nnx.Rngs(0))
    cases[case] = (Reader.of(decoder), count_parameters(decoder))
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, config.vocab, (config.batch, config.prompt)).astype(np.int32)
  states = {
    case: generate(reader, prompts, max_new_tokens=0).state for case, (reader, _) in cases.items()
  }
  seconds: dict[str, list[float]] = {case: [] for case in cases}
  no_prompt = [[]] * config.batch
  with Progress("writing", config.repeats + 1, console=console) as progress:
    for turn in range(config.repeats + 1):
      for case, (reader, _) in cases.items():
        options = {"max_new_tokens": config.chunk_size, "state": states[case], "stop": ()}
        result = generate(reader, no_prompt, **options)
        if turn:  # the first turn compiles
          seconds[case].append(result.write_seconds / config.chunk_size)
      progress.advance()
  report = {
    "machine": here,
    "config": dataclasses.asdict(config),
    "cases": [
      {
        "case": case,
        "params": params,
        "median_seconds_per_step": statistics.median(seconds[case]),
        "seconds_per_step": seconds[case],
        "tokens_per_second": config.batch / statistics.median(seconds[case]),
      }
      | _bytes(states[case])
      for case, (_, params) in cases.items()
    ],
  }
  _print(report, console)
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / f"{name}.json", report)
  console.print(f"written: {out / name}.json", highlight=False)
  return report


def _bytes(state) -> dict[str, int]:
  """Counts the bytes of a state, by kind."""
  layers = state.cache.layers
  fast = [layer.fast for layer in layers if layer.fast is not None]
  kinds = {
    "keys_and_values_bytes": [layer.attention for layer in layers],
    "fast_weights_bytes": [cache.s for cache in fast],
    "pending_chunk_bytes": [(cache.z, cache.source) for cache in fast],
  }
  return {kind: sum(x.nbytes for x in jax.tree.leaves(tree)) for kind, tree in kinds.items()}


def _print(report: dict[str, Any], console: Console) -> None:
  sizes = report["config"]
  title = (
    f"{sizes['layers']} layers of {sizes['d_model']}, {sizes['dtype']}, {sizes['batch']} rows, C "
    f"{sizes['chunk_size']}"
  )
  columns = ("", "ms a step (min-max)", "x without", "tokens/s", "K/V MB", "fast MB", "pending MB")
  table = Table(*columns, title=title)
  table.columns[0].no_wrap = True
  base = report["cases"][0]["median_seconds_per_step"]
  for case in report["cases"]:
    low, high = min(case["seconds_per_step"]), max(case["seconds_per_step"])
    median = case["median_seconds_per_step"]
    kinds = ("keys_and_values_bytes", "fast_weights_bytes", "pending_chunk_bytes")
    table.add_row(
      case["case"],
      f"{1e3 * median:.3g} ({1e3 * low:.3g}-{1e3 * high:.3g})",
      f"{median / base:.2f}",
      f"{case['tokens_per_second']:.1f}",
      *(f"{case[kind] / 1e6:.3g}" for kind in kinds),
    )
  console.print(table)
