"""Compiles the programs that `ttt-jax bench fast-weights` measures, with their inputs and memory."""

import dataclasses
import itertools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ttt_jax.errors import UserError
from ttt_jax.extras.plan.hlo import sent_bytes
from ttt_jax.names import COLLECTIVES
from ttt_jax.ops.exchange.cost import collective_seconds
from ttt_jax.ops.exchange.prefix import exclusive_prefix
from ttt_jax.ops.fast_weight.api import inplace_ttt
from ttt_jax.ops.fast_weight.sharded import context_parallel
from ttt_jax.ops.fast_weight.targets import ntp_targets
from ttt_jax.ops.hardware import find_device
from ttt_jax.ops.update import Update


class Variant(NamedTuple):
  """Names one way to compute the op; its FLOPs are multiples of the dense MLP's, None without a formula."""

  options: dict[str, Any]  # of `inplace_ttt`
  forward: float | None
  both_passes: float | None


# By the names that `--ways` takes.
VARIANTS = {
  "one product": Variant({"implementation": "sequential", "merge": True}, 8 / 6, 26 / 18),
  "two products": Variant({"implementation": "sequential", "merge": False}, 10 / 6, 32 / 18),
  "dual": Variant({"implementation": "dual"}, None, None),
  "associative": Variant({"implementation": "associative"}, 10 / 6, None),
}
_INNER_LR = 1e-3  # time and memory do not depend on it


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """Sets the sizes of a benchmark.

  Attributes:
    tokens, chunk_size, d_model, d_ff: T, C, D, F. batch: rows.
    dtype: of weights and activations; the state is float32.
    shards: devices that the exchange is measured on; 1 measures no exchange.
    ways: names of `VARIANTS`; None for all.
    op_only: measure the down projection without gate and up projections, dense and fast.
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
    for name in self.ways or ():
      if name not in VARIANTS:
        raise UserError(f"--ways {name!r} is not one of {', '.join(map(repr, VARIANTS))}")
    if self.tokens % (self.shards * self.chunk_size):
      raise UserError(
        f"--tokens {self.tokens} is not a multiple of shards * chunk_size = "
        f"{self.shards * self.chunk_size}: shards hold whole chunks"
      )


@dataclasses.dataclass
class Case:
  """Holds a compiled program with its inputs, its memory and its measured times.

  Attributes:
    name: the variant or the collective.
    part: "forward", "both passes" or "exchange".
    memory: bytes, `temp` and `total`.
  """

  name: str
  part: str
  run: Callable[..., Any]
  inputs: tuple[jax.Array, ...]
  seconds: list[float] = dataclasses.field(default_factory=list)
  memory: dict[str, int] = dataclasses.field(default_factory=dict)

  @classmethod
  def compiled(cls, name: str, part: str, function: Callable, inputs: tuple) -> "Case":
    program = jax.jit(function).lower(*inputs).compile()
    stats = program.memory_analysis()
    memory = {
      "temp": stats.temp_size_in_bytes,
      "total": stats.temp_size_in_bytes
      + stats.argument_size_in_bytes
      + stats.output_size_in_bytes
      - stats.alias_size_in_bytes,
    }
    return cls(name, part, program, inputs, memory=memory)

  def record(self) -> dict[str, Any]:
    """Returns the case as an entry of the JSON report."""
    return {
      "case": self.name,
      "what": self.part,
      "median_seconds": statistics.median(self.seconds) if self.seconds else None,
      "seconds": self.seconds,
      "temp_bytes": self.memory.get("temp"),
      "total_bytes": self.memory.get("total"),
    }


def _inputs(config: BenchConfig) -> dict[str, jax.Array]:
  t, d, f = config.tokens, config.d_model, config.d_ff
  # A single row is [T, D]: a batch dimension of 1 makes some compilers transpose whole activations.
  rows = (config.batch,) if config.batch > 1 else ()
  shapes = {
    "h": ((*rows, t, d), 1.0),
    "z": ((*rows, t, f), 1.0),
    "v": ((*rows, t, d), 1.0),
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
      name: (scale * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(config.dtype)
      for i, (name, (shape, scale)) in enumerate(shapes.items())
      if name not in unused
    }

  return draw()


def mlp_cases(config: BenchConfig) -> list[Case]:
  """Compiles the dense gated MLP and every variant with fast weights, forward and with all gradients."""
  x = _inputs(config)
  hidden = ("z",) if config.op_only else ("h", "gate", "up")
  dtype = jnp.dtype(config.dtype)

  def activations(*inputs):
    if config.op_only:
      return inputs[0]
    h, gate, up = inputs
    return jax.nn.silu(h @ gate) * (h @ up)

  def dense(*inputs):
    *inputs, down = inputs
    return activations(*inputs) @ down

  def ttt(options):
    def function(*inputs):
      *inputs, v, down = inputs
      sizes = {"chunk_size": config.chunk_size, "inner_lr": _INNER_LR}
      return inplace_ttt(activations(*inputs), v, down, **sizes, **options)[0]

    return function

  def with_targets(h, gate, up, conv, projection, down):
    v = ntp_targets(h, conv, projection, chunk_size=config.chunk_size)
    return ttt(VARIANTS["one product"].options)(h, gate, up, v, down)

  def both_passes(function):
    def run(*inputs):
      y, pull_back = jax.vjp(function, *inputs)
      return y, pull_back(y.astype(dtype))

    return run

  functions = {"dense": (dense, (*hidden, "down"))}
  for name in config.ways or VARIANTS:
    functions[name] = (ttt(VARIANTS[name].options), (*hidden, "v", "down"))
  if not config.op_only and config.ways is None:
    names = ("h", "gate", "up", "conv", "projection", "down")
    functions["one product, with targets"] = (with_targets, names)
  return [
    Case.compiled(name, part, wrap(function), tuple(x[i] for i in names))
    for name, (function, names) in functions.items()
    for part, wrap in (("forward", lambda f: f), ("both passes", both_passes))
  ]


def memory_by_chunks(config: BenchConfig) -> list[dict[str, Any]]:
  """Compiles the gradient at 8 and at 64 chunks of the same tokens, for its temporary memory."""
  records = []
  for chunks in (8, 64):
    if config.tokens % chunks:
      continue
    resized = dataclasses.replace(config, chunk_size=config.tokens // chunks, ways=("one product",))
    case = mlp_cases(resized)[-1]
    records.append({"chunks": chunks, "temp_bytes": case.memory["temp"]})
  return records


def _mesh(shards: int) -> jax.sharding.Mesh:
  devices = jax.devices()[:shards]
  return jax.make_mesh((shards,), ("context",), axis_types=(AxisType.Auto,), devices=devices)


def exchange_cases(config: BenchConfig) -> tuple[list[Case], list[dict[str, Any]]]:
  """Compiles one exchange of the state by every collective, and counts the bytes that each sends."""
  spec = PartitionSpec("context")
  shape = (config.shards, config.batch, config.d_ff, config.d_model)
  mesh = _mesh(config.shards)
  deltas = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
  state_bytes = config.batch * config.d_ff * config.d_model * 4
  predicted = collective_seconds(config.shards, state_bytes, find_device(), rows=config.d_ff)
  cases, sent = [], []
  for collective, wire_dtype in itertools.product(COLLECTIVES, (None, "bfloat16")):

    def exchange(delta, collective=collective, wire_dtype=wire_dtype):
      update = Update(jnp.ones(shape[1]), delta[0])
      prefix = exclusive_prefix(update, "context", collective=collective, wire_dtype=wire_dtype)
      return prefix.delta[None]

    mapped = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)
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
  """Compiles the op on a sequence that is split over the devices, by every collective."""
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
      options = {"implementation": "sequential", "collective": collective}
      return op(z, v, down, chunk_size=config.chunk_size, inner_lr=_INNER_LR, **options)[0]

    def both_passes(*inputs, forward=forward):
      y, pull_back = jax.vjp(forward, *inputs)
      return y, pull_back(y)

    cases.append(Case.compiled(collective, "forward", forward, inputs))
    cases.append(Case.compiled(collective, "both passes", both_passes, inputs))
  return cases
