"""A program of a run, compiled for a TPU slice, and what that says of memory, time and what limits it."""

import re
import time
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.config import Config
from ttt_jax.extras.plan.hlo import Collective, Program
from ttt_jax.extras.plan.programs import trace_prefill, trace_training
from ttt_jax.extras.plan.topology import Topology, open_topology
from ttt_jax.extras.plan.traced import TracedArray, device_flops, largest_arrays
from ttt_jax.nn.transformer import count_parameters
from ttt_jax.ops.hardware import Device, find_device
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.training.flops import token_flops, training_flops

Mode = Literal["train", "prefill"]
GIB = 2**30
_TRACERS = {"train": trace_training, "prefill": trace_prefill}
# Parts of a program by the innermost of these scopes that a collective stands in.
_SCOPES = (
  ("prefix_", "fast weights"),
  ("gather_keys_and_values", "keys and values"),
  ("swap_second_halves", "queries of mirror shards"),
  ("halo_exchange", "window"),
  ("fast_weight", "fast weights"),
  ("ntp_targets", "fast weights"),
  ("embed", "embedding"),
  ("head", "head"),
  ("optimizer", "optimizer"),
  ("attention", "attention"),
  ("mlp", "mlp"),
)


class Buffer(NamedTuple):
  """One of the largest arrays of a program that does not fit."""

  gib: float  # of a device
  shape: str
  scope: str
  remedy: str


class Plan(NamedTuple):
  """What `ttt-jax plan` says; `_asdict` is its JSON.

  Attributes:
    topology, devices, mesh: what was compiled for.
    mode: the program.
    params: of the model. tokens_per_step: a training step's, or the prompts'.
    hbm_per_device_gib: arguments (parameters, optimiser state, batch, caches), outputs that are not
      arguments reused, temporaries, and their total.
    hbm_limit_gib, fits: what a chip has.
    flops_per_device: of a step, with what remat computes again (`device_flops`).
    collectives: by kind, mesh axis and part of the model: how many, and bytes a device sends per step.
    step_seconds: of the roofline: `compute`, `memory`, `communication`, their largest as `bound`, and
      which one it is as `limit`.
    tokens_per_second, mfu_bound: at that time, of rows without padding; MFU counts no remat.
    compile_seconds: tracing included.
    largest: where it does not fit, the largest buffers.
  """

  topology: str
  devices: int
  mesh: dict[str, int]
  mode: Mode
  params: int
  tokens_per_step: int
  hbm_per_device_gib: dict[str, float]
  hbm_limit_gib: float
  fits: bool
  flops_per_device: float | None
  collectives: list[dict[str, Any]]
  step_seconds: dict[str, Any]
  tokens_per_second: float | None
  mfu_bound: float | None
  compile_seconds: float
  largest: list[Buffer]


def plan(config: Config, topology: str | Topology, *, mode: Mode = "train") -> Plan:
  """Compiles the training step, or the reading of long prompts, for a TPU slice, and reads the result.

  The time is that of a roofline, a bound from below of what the program takes:

      compute        flops_per_device / peak of bfloat16 products
      memory         bytes read and written by its instructions / memory bandwidth
      communication  bytes sent / link bandwidth, both directions of a ring where it uses both

  No array is made: it runs on a machine without a TPU, in the memory that the compiler takes.

  Args:
    config: resolved (`ttt_jax.checkpoints.resolve.resolve`), its mesh filled.
    topology: as `v5p:4x4x4`, or any devices.
    mode: `"train"`, or `"prefill"`: prompts of `data.seq_len` tokens in `train.batch_size` rows.

  Raises:
    UserError: no such topology, libtpu is not there, a mesh of another size.
  """
  where = open_topology(topology) if isinstance(topology, str) else topology
  mesh = make_mesh(config.mesh, list(where.devices))
  start = time.perf_counter()
  traced = _TRACERS[mode](config, mesh)
  flops = traced.runs * device_flops(
    traced.program.jaxpr,
    devices=mesh.size,
    tokens=config.data.seq_len,
    window=config.attention.window,
  )
  known = {
    "topology": where.name,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "mode": mode,
    "params": count_parameters(jax.eval_shape(lambda: make_model(config))),
    "tokens_per_step": traced.tokens * traced.runs,
    "hbm_limit_gib": where.hbm_gib,
    "flops_per_device": flops,
  }
  try:
    with jax.set_mesh(mesh):
      compiled = traced.program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    arrays = largest_arrays(traced.program.jaxpr, devices=mesh.size, count=3)
    return _too_large(str(error), known, arrays, time.perf_counter() - start)
  return _read(compiled, known, where, mesh, traced.runs, config, time.perf_counter() - start)


def _read(
  compiled, known, topology: Topology, mesh: Mesh, runs: int, config: Config, seconds: float
) -> Plan:
  memory = compiled.memory_analysis()
  parts = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  hbm = {name: size / GIB for name, size in parts.items()}
  hbm["total"] = sum(hbm.values())
  program = Program(compiled.as_text())
  chip = find_device(topology.devices[0].device_kind)
  collectives = _by_part(program.collectives, mesh, chip, runs)
  terms = {
    "compute": known["flops_per_device"] / chip.peak,
    "memory": runs * program.moved_bytes / chip.memory,
    "communication": sum(entry["seconds"] for entry in collectives),
  }
  limit = max(terms, key=terms.__getitem__)
  bound = terms[limit]
  model_flops = _model_flops(config, known["mode"]) / mesh.size
  return Plan(
    **known,
    hbm_per_device_gib=hbm,
    fits=hbm["total"] <= topology.hbm_gib,
    collectives=collectives,
    step_seconds={**terms, "bound": bound, "limit": limit},
    tokens_per_second=known["tokens_per_step"] / bound,
    mfu_bound=model_flops / chip.peak / bound,
    compile_seconds=seconds,
    largest=[],
  )


def _model_flops(config: Config, mode: Mode) -> float:
  if mode == "train":
    return training_flops(config)
  tokens = config.train.batch_size * config.data.seq_len
  flops = token_flops(config.model, config.attention, config.ttt, config.data.seq_len)
  # The head is read for the last token of a segment only.
  return tokens * (flops.forward - flops.head)


def _by_part(
  collectives: list[Collective], mesh: Mesh, chip: Device, runs: int
) -> list[dict[str, Any]]:
  """Equal kinds over equal axes for one part of the model, together; the most bytes first.

  Bytes are those of the device that sends most: a permute between two neighbours burdens only one.
  """
  together: dict[tuple[str, str, str], list[Collective]] = {}
  for x in collectives:
    together.setdefault((x.kind, _axes(x, mesh), _part(x.scope)), []).append(x)
  entries = []
  for (kind, axes, part), found in together.items():
    by_device: Counter = Counter()
    for x in found:
      by_device.update(dict.fromkeys(x.senders or range(mesh.size), runs * x.times * x.bytes))
    entries.append(
      {
        "kind": kind,
        "axis": axes,
        "part": part,
        "count": sum(runs * x.times for x in found),
        "bytes": max(by_device.values(), default=0),
        "seconds": sum(runs * x.times * _seconds(x, chip) for x in found),
      }
    )
  return sorted(entries, key=lambda entry: -entry["bytes"])


def _axes(x: Collective, mesh: Mesh) -> str:
  """The mesh axes along which devices of a group differ."""
  sizes = list(mesh.shape.values())
  differ = set()
  for group in x.groups:
    places = [_place(device, sizes) for device in group]
    differ |= {i for i in range(len(sizes)) if len({place[i] for place in places}) > 1}
  return " x ".join(name for i, name in enumerate(mesh.shape) if i in differ)


def _place(device: int, sizes: list[int]) -> tuple[int, ...]:
  place = []
  for size in reversed(sizes):
    device, i = divmod(device, size)
    place.append(i)
  return tuple(reversed(place))


def _part(scope: str) -> str:
  """Which part of the model an instruction belongs to, by the scope it was traced in."""
  for mark, part in _SCOPES:
    if mark in scope:
      return part
  return "parameters" if "sharding_constraint" in scope else "other"


def _seconds(x: Collective, chip: Device) -> float:
  """Of one collective alone on a ring of two-way links, or behind a switch."""
  p = len(x.groups[0])
  if x.kind == "collective-permute" or not chip.torus:
    return chip.latency + x.bytes / chip.link
  if (
    x.kind == "all-to-all"
  ):  # every part crosses a quarter of the ring on average, in both directions
    return chip.latency + x.bytes * p / 8 / chip.link
  return chip.latency + x.bytes / 2 / chip.link


def _too_large(
  message: str, known: dict[str, Any], arrays: list[TracedArray], seconds: float
) -> Plan:
  """The plan of a program for which the compiler found no room."""
  sizes = re.search(r"(?:[Uu]sed |required for .*?\()([\d.]+)([KMGT])", message)
  total = None if sizes is None else float(sizes.group(1)) * _UNITS[sizes.group(2)] / GIB
  return Plan(
    **known,
    hbm_per_device_gib={"total": total},
    fits=False,
    collectives=[],
    step_seconds={},
    tokens_per_second=None,
    mfu_bound=None,
    compile_seconds=seconds,
    largest=[Buffer(x.bytes / GIB, x.shape, x.scope, _remedy(x.scope, known)) for x in arrays],
  )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _remedy(scope: str, known: dict[str, Any]) -> str:
  """What makes an array smaller, by where it is made."""
  if known["mode"] == "prefill":
    return "more mesh.tensor for keys, values and parameters; more mesh.context for activations"
  if "optimizer" in scope:
    return "parameters and optimiser state: more mesh.fsdp, or mesh.tensor"
  if "head" in scope:
    return "the head: mesh.tensor splits the vocabulary, mesh.fsdp and mesh.context the tokens"
  return "activations: more train.accumulate, mesh.context or mesh.fsdp; model.remat=layer"
