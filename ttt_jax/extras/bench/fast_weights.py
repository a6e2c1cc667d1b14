"""`ttt-jax bench fast-weights`: what fast weights cost, in time, memory and bytes sent.

All cases are compiled first, then timed in turns, round after round, so that a machine that slows down
slows all of them down: compare by ratios. Nothing here is part of a test.
"""

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ttt_jax.errors import UserError
from ttt_jax.extras.plan.hlo import sent_bytes
from ttt_jax.files import write_json
from ttt_jax.ops.exchange.collectives import COLLECTIVES
from ttt_jax.ops.exchange.cost import collective_seconds
from ttt_jax.ops.exchange.prefix import exclusive_prefix
from ttt_jax.ops.fast_weight import cost
from ttt_jax.ops.fast_weight.api import inplace_ttt
from ttt_jax.ops.fast_weight.sharded import context_parallel
from ttt_jax.ops.fast_weight.targets import ntp_targets
from ttt_jax.ops.hardware import find_device
from ttt_jax.ops.update import Update

# Name, options of the op, and FLOPs against the dense MLP's: forward, forward and backward.
WAYS = {
  "one product": ({"implementation": "sequential", "merge": True}, 8 / 6, 26 / 18),
  "two products": ({"implementation": "sequential", "merge": False}, 10 / 6, 32 / 18),
  "dual": ({"implementation": "dual"}, None, None),
  "associative": ({"implementation": "associative"}, 10 / 6, None),
}
_INNER_LR = 1e-3  # small: what is measured does not depend on it


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """The sizes of a benchmark; T, C, F, D as everywhere.

  Attributes:
    tokens, chunk_size, d_model, d_ff: T, C, D, F. batch: rows.
    dtype: of weights and activations; the state is float32.
    shards: devices for the part about the exchange; 1 leaves it out.
    ways: of `WAYS`; None for all.
    op_only: leave out the gate and up projections, on both sides.
    repeats: timed rounds.
  """

  tokens: int = 8192
  chunk_size: int = 512
  d_model: int = 512
  d_ff: int = 1536
  batch: int = 1
  dtype: str = "float32"
  shards: int = 1
  ways: tuple[str, ...] | None = None
  op_only: bool = False
  repeats: int = 5

  def __post_init__(self):
    for field in ("tokens", "chunk_size", "d_model", "d_ff", "batch", "shards"):
      if getattr(self, field) < 1:
        raise UserError(f"--{field.replace('_', '-')} {getattr(self, field)} must be at least 1")
    if self.repeats < 5:
      raise UserError(f"--repeats {self.repeats}: a median of fewer than 5 runs says little")
    for way in self.ways or ():
      if way not in WAYS:
        raise UserError(f"--ways {way!r} is not one of {', '.join(map(repr, WAYS))}")
    if self.tokens % (self.shards * self.chunk_size):
      raise UserError(
        f"--tokens {self.tokens} is not a multiple of shards * chunk_size = "
        f"{self.shards * self.chunk_size}: shards hold whole chunks"
      )


@dataclasses.dataclass
class Case:
  """A compiled program, its inputs, and what came out."""

  name: str
  what: str
  run: Callable[..., Any]
  inputs: tuple[jax.Array, ...]
  seconds: list[float] = dataclasses.field(default_factory=list)
  memory: dict[str, int] = dataclasses.field(default_factory=dict)

  @classmethod
  def compiled(cls, name: str, what: str, function: Callable, inputs: tuple) -> "Case":
    program = jax.jit(function).lower(*inputs).compile()
    stats = program.memory_analysis()
    memory = {
      "temp": stats.temp_size_in_bytes,
      "total": stats.temp_size_in_bytes
      + stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes,
    }
    return cls(name, what, program, inputs, memory=memory)

  def record(self) -> dict[str, Any]:
    return {
      "case": self.name,
      "what": self.what,
      "median_seconds": statistics.median(self.seconds) if self.seconds else None,
      "seconds": self.seconds,
      "temp_bytes": self.memory.get("temp"),
      "total_bytes": self.memory.get("total"),
    }


def _inputs(config: BenchConfig) -> dict[str, jax.Array]:
  t, d, f = config.tokens, config.d_model, config.d_ff
  # One row is [T, D]: a batch dimension of 1 makes some compilers transpose whole activations.
  lead = (config.batch,) if config.batch > 1 else ()
  shapes = {
    "h": ((*lead, t, d), 1.0),
    "z": ((*lead, t, f), 1.0),
    "v": ((*lead, t, d), 1.0),
    "gate": ((d, f), d**-0.5),
    "up": ((d, f), d**-0.5),
    "down": ((f, d), f**-0.5),
    "conv": ((5, d), 1.0),
    "projection": ((d, d), d**-0.5),
  }
  unused = {"h", "gate", "up", "conv", "projection"} if config.op_only else {"z"}
  key = jax.random.key(0)

  @jax.jit
  def draw():
    return {
      name: (size * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(config.dtype)
      for i, (name, (shape, size)) in enumerate(shapes.items())
      if name not in unused
    }

  return draw()


def mlp_cases(config: BenchConfig) -> list[Case]:
  """The dense gated MLP and its TTT twin by every way, forward and with all gradients."""
  x = _inputs(config)
  hidden = ("z",) if config.op_only else ("h", "gate", "up")
  dtype = jnp.dtype(config.dtype)

  def z_of(*inputs):
    if config.op_only:
      return inputs[0]
    h, gate, up = inputs
    return jax.nn.silu(h @ gate) * (h @ up)

  def dense(*inputs):
    *inputs, down = inputs
    return z_of(*inputs) @ down

  def ttt(options):
    def function(*inputs):
      *inputs, v, down = inputs
      how = {"chunk_size": config.chunk_size, "inner_lr": _INNER_LR}
      return inplace_ttt(z_of(*inputs), v, down, **how, **options)[0]

    return function

  def with_targets(h, gate, up, conv, projection, down):
    v = ntp_targets(h, conv, projection, chunk_size=config.chunk_size)
    return ttt(WAYS["one product"][0])(h, gate, up, v, down)

  def both_passes(function):
    def run(*inputs):
      y, pull_back = jax.vjp(function, *inputs)
      return y, pull_back(y.astype(dtype))

    return run

  functions = {"dense": (dense, (*hidden, "down"))}
  for way in config.ways or WAYS:
    functions[way] = (ttt(WAYS[way][0]), (*hidden, "v", "down"))
  if not config.op_only and config.ways is None:
    names = ("h", "gate", "up", "conv", "projection", "down")
    functions["one product, with targets"] = (with_targets, names)
  return [
    Case.compiled(name, what, wrap(function), tuple(x[i] for i in names))
    for name, (function, names) in functions.items()
    for what, wrap in (("forward", lambda f: f), ("both passes", both_passes))
  ]


def memory_by_chunks(config: BenchConfig) -> list[dict[str, Any]]:
  """Temporary memory of the gradient at 8 and at 64 chunks of the same tokens; compiled, not run."""
  records = []
  for chunks in (8, 64):
    if config.tokens % chunks:
      continue
    shorter = dataclasses.replace(config, chunk_size=config.tokens // chunks, ways=("one product",))
    case = mlp_cases(shorter)[-1]
    records.append({"chunks": chunks, "temp_bytes": case.memory["temp"]})
  return records


def _mesh(shards: int) -> jax.sharding.Mesh:
  devices = jax.devices()[:shards]
  return jax.make_mesh((shards,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


def exchange_cases(config: BenchConfig) -> tuple[list[Case], list[dict[str, Any]]]:
  """One exchange of the state by every collective, and what its program sends."""
  spec = PartitionSpec("context")
  shape = (config.shards, config.batch, config.d_ff, config.d_model)
  mesh = _mesh(config.shards)
  deltas = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
  state_bytes = config.batch * config.d_ff * config.d_model * 4
  predicted = collective_seconds(config.shards, state_bytes, find_device(), rows=config.d_ff)
  cases, sent = [], []
  for collective, wire_dtype in itertools.product(COLLECTIVES, (None, "bfloat16")):

    def prefix(delta, collective=collective, wire_dtype=wire_dtype):
      update = Update(jnp.ones(shape[1]), delta[0])
      how = {"collective": collective, "wire_dtype": wire_dtype}
      return exclusive_prefix(update, "context", **how).delta[None]

    mapped = jax.shard_map(prefix, mesh=mesh, in_specs=spec, out_specs=spec)
    name = collective if wire_dtype is None else f"{collective}, {wire_dtype}"
    case = Case.compiled(name, "exchange", mapped, (deltas,))
    cases.append(case)
    sent.append(
      {
        "case": name,
        "sent_bytes": sum(sent_bytes(case.run.as_text()).values()),
        "state_bytes": state_bytes,
        "predicted_seconds": predicted[collective] if wire_dtype is None else None,
      }
    )
  return cases, sent


def sharded_cases(config: BenchConfig) -> list[Case]:
  """The op on a sequence split over the devices, by every collective."""
  mesh = _mesh(config.shards)
  x = _inputs(dataclasses.replace(config, op_only=True))
  op = context_parallel(mesh, batch_axes=())
  tokens = NamedSharding(mesh, PartitionSpec(*(None,) * (x["z"].ndim - 2), "context"))
  whole = NamedSharding(mesh, PartitionSpec())
  inputs = (*(jax.device_put(x[name], tokens) for name in ("z", "v")),)
  inputs += (jax.device_put(x["down"], whole),)
  cases = []
  for collective in COLLECTIVES:

    def forward(z, v, down, collective=collective):
      how = {"chunk_size": config.chunk_size, "inner_lr": _INNER_LR, "collective": collective}
      return op(z, v, down, implementation="sequential", **how)[0]

    def both_passes(*inputs, forward=forward):
      y, pull_back = jax.vjp(forward, *inputs)
      return y, pull_back(y)

    cases.append(Case.compiled(collective, "forward", forward, inputs))
    cases.append(Case.compiled(collective, "both passes", both_passes, inputs))
  return cases


def time_in_turns(cases: list[Case], repeats: int, progress: Callable[[], None]) -> None:
  """Every case once, unmeasured; then `repeats` rounds of every case once."""
  for case in cases:
    jax.block_until_ready(case.run(*case.inputs))
  for _ in range(repeats):
    for case in cases:
      start = time.perf_counter()
      jax.block_until_ready(case.run(*case.inputs))
      case.seconds.append(time.perf_counter() - start)
      progress()


def wide_console() -> Console:
  """Standard output; a file has no edge to wrap tables at."""
  console = Console()
  return console if console.is_terminal else Console(width=120)


def processor() -> str:
  """Cores and name of the processor."""
  cpuinfo = Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    if names:
      return f"{len(names)} x {names[0].split(': ')[1]}"
  return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
  """What the figures were measured on."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "processor": processor(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }


def run_bench(config: BenchConfig, name: str, out: Path) -> dict[str, Any]:
  """Measures, prints tables, and writes `out/NAME.json` and `out/NAME.png`."""
  available = len(jax.devices())
  if config.shards > available:
    raise UserError(f"--shards {config.shards}: there are {available} devices ({jax.devices()[0]})")
  console = wide_console()
  where = machine()
  console.print(f"{where['device']} ({where['processor']}), jax {where['jax']}", highlight=False)
  with Progress(console=console) as progress:
    task = progress.add_task("compiling", total=None)
    cases = mlp_cases(config)
    chunks = memory_by_chunks(config)
    exchanges, sent, sharded = [], [], []
    if config.shards > 1:
      exchanges, sent = exchange_cases(config)
      sharded = sharded_cases(config)
    groups = (cases, exchanges, sharded)
    progress.update(task, description="timing", total=config.repeats * sum(map(len, groups)))
    for group in groups:
      time_in_turns(group, config.repeats, lambda: progress.advance(task))
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
    "machine": where,
    "config": dataclasses.asdict(config),
    "mlp": [case.record() for case in cases],
    "gradient_memory_by_chunks": chunks,
    "exchange": [case.record() | more for case, more in zip(exchanges, sent)],
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
  from ttt_jax.evaluation.plots import plot_bench

  plot_bench(report, out / f"{name}.png")
  console.print(f"\nwritten: {out / name}.json, {out / name}.png", highlight=False)
  return report


def ratios(report: dict[str, Any]) -> dict[tuple[str, str], float]:
  """Median time of every MLP case over the dense one's, by (case, what)."""
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
  against = ratios(report)
  for record in report["mlp"]:
    case, what = record["case"], record["what"]
    limit = dict(zip(("forward", "both passes"), WAYS.get(case, (0, None, None))[1:])).get(what)
    table.add_row(
      case,
      what,
      _spread(record),
      f"{against[case, what]:.2f}",
      f"{limit:.2f}" if limit and not op_only else "",
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
