"""Runs `ttt-jax bench fast-weights`: measures the time, memory and bytes sent of fast weights.

All programs are compiled first, then timed in turns, round after round, so that a machine that slows down
slows all of them down: compare by ratios. No test measures time.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from ttt_jax.errors import UserError
from ttt_jax.extras.bench.cases import (
  VARIANTS,
  BenchConfig,
  Case,
  exchange_cases,
  memory_by_chunks,
  mlp_cases,
  sharded_cases,
)
from ttt_jax.extras.bench.machine import machine, wide_console
from ttt_jax.files import write_json
from ttt_jax.ops.fast_weight import cost
from ttt_jax.progress import Progress


def time_in_turns(cases: list[Case], repeats: int, progress: Callable[[], None]) -> None:
  """Runs every case once without a measurement, then `repeats` rounds of every case once."""
  for case in cases:
    jax.block_until_ready(case.run(*case.inputs))
  for _ in range(repeats):
    for case in cases:
      start = time.perf_counter()
      jax.block_until_ready(case.run(*case.inputs))
      case.seconds.append(time.perf_counter() - start)
      progress()


def run_bench(config: BenchConfig, name: str, out: Path) -> dict[str, Any]:
  """Measures all cases, prints tables, and writes `out/NAME.json` and `out/NAME.png`."""
  available = len(jax.devices())
  if config.shards > available:
    raise UserError(f"--shards {config.shards}: there are {available} devices ({jax.devices()[0]})")
  console = wide_console()
  here = machine()
  console.print(f"{here['device']} ({here['processor']}), jax {here['jax']}", highlight=False)
  with Progress("compiling", None, console=console):
    cases = mlp_cases(config)
    chunks = memory_by_chunks(config)
    exchanges, sent, sharded = [], [], []
    if config.shards > 1:
      exchanges, sent = exchange_cases(config)
      sharded = sharded_cases(config)
  groups = (cases, exchanges, sharded)
  with Progress("timing", config.repeats * sum(map(len, groups)), console=console) as progress:
    for group in groups:
      time_in_turns(group, config.repeats, progress.advance)
  explanation = cost.explain(
    tokens=config.tokens,
    chunk_size=config.chunk_size,
    d_ff=config.d_ff,
    d_model=config.d_model,
    shards=config.shards,
    batch=config.batch,
    dtype=config.dtype,
  )
  report = {
    "machine": here,
    "config": dataclasses.asdict(config),
    "mlp": [case.record() for case in cases],
    "gradient_memory_by_chunks": chunks,
    "exchange": [case.record() | counted for case, counted in zip(exchanges, sent)],
    "sharded": [case.record() for case in sharded],
    "cost_model": {
      "device": explanation.device.name,
      "implementation": explanation.implementation,
      "forward_seconds": explanation.implementations,
      "collective": explanation.collective,
      "exchange_seconds": explanation.collectives,
    },
  }
  _print(report, console)
  console.print(f"\n[bold]Cost model[/bold]\n{explanation}", highlight=False)
  out.mkdir(parents=True, exist_ok=True)
  write_json(out / f"{name}.json", report)
  from ttt_jax.extras.bench.picture import plot_bench

  plot_bench(report, out / f"{name}.png")
  console.print(f"\nwritten: {out / name}.json, {out / name}.png", highlight=False)
  return report


def ratios(report: dict[str, Any]) -> dict[tuple[str, str], float]:
  """Returns every MLP case's median time over that of the dense MLP, by (case, pass)."""
  medians = {(r["case"], r["what"]): r["median_seconds"] for r in report["mlp"]}
  return {key: seconds / medians["dense", key[1]] for key, seconds in medians.items()}


def _print(report: dict[str, Any], console: Console) -> None:
  sizes = report["config"]
  op_only = sizes["op_only"]
  title = (
    f"{'down projection' if op_only else 'gated MLP'}: T {sizes['tokens']}, C {sizes['chunk_size']}, "
    f"D {sizes['d_model']}, F {sizes['d_ff']}, {sizes['dtype']}"
  )
  table = Table(
    "", "pass", "ms (min-max)", "x dense", "FLOPs x", "temp MB", "total MB", title=title
  )
  table.columns[0].no_wrap = True
  against_dense = ratios(report)
  for record in report["mlp"]:
    case, part = record["case"], record["what"]
    variant = VARIANTS.get(case)
    flops = variant and (variant.forward if part == "forward" else variant.both_passes)
    table.add_row(
      case,
      part,
      _spread(record),
      f"{against_dense[case, part]:.2f}",
      f"{flops:.2f}" if flops and not op_only else "",
      _mb(record["temp_bytes"]),
      _mb(record["total_bytes"]),
    )
  console.print(table)
  if report["gradient_memory_by_chunks"]:
    table = Table("chunks", "temp MB", title="memory of the gradient, one product")
    for record in report["gradient_memory_by_chunks"]:
      table.add_row(str(record["chunks"]), _mb(record["temp_bytes"]))
    console.print(table)
  if report["exchange"]:
    shards = sizes["shards"]
    title = (
      f"exchange of a state of {_mb(report['exchange'][0]['state_bytes'])} MB, {shards} devices"
    )
    table = Table("", "ms (min-max)", "model ms", "sent MB", "x state", title=title)
    for record in report["exchange"]:
      predicted = record["predicted_seconds"]
      table.add_row(
        record["case"],
        _spread(record),
        f"{predicted * 1e3:.3g}" if predicted is not None else "",
        _mb(record["sent_bytes"]),
        f"{record['sent_bytes'] / record['state_bytes']:.3f}",
      )
    console.print(table)
    table = Table("", "pass", "ms (min-max)", title=f"down projection on {shards} devices")
    for record in report["sharded"]:
      table.add_row(record["case"], record["what"], _spread(record))
    console.print(table)


def _spread(record: dict[str, Any]) -> str:
  median, low, high = (
    f"{seconds * 1e3:.4g}"
    for seconds in (record["median_seconds"], min(record["seconds"]), max(record["seconds"]))
  )
  return f"{median} ({low}-{high})"


def _mb(size: int) -> str:
  return f"{size / 1e6:.4g}"
