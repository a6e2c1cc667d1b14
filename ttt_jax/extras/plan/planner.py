"""Compiles a run's program for a TPU slice, and reports its memory and a lower bound of its time."""

import re
import time
import warnings
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
# The part of a program that a collective belongs to: that of the first mark in its scope.
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
  """Describes one of the largest arrays of a program that does not fit."""

  gib: float  # per device
  shape: str
  scope: str
  remedy: str


class Plan(NamedTuple):
  """Holds what `ttt-jax plan` prints; `_asdict` is its JSON.

  Attributes:
    topology, devices, mesh: the slice that the program was compiled for.
    mode: which program.
    params: parameters of the model. tokens_per_step: tokens of a training step, or of all prompts.
    hbm_per_device_gib: arguments (parameters, optimiser state, batch, caches), outputs that do not reuse
      arguments, temporaries, the program, and their total.
    hbm_limit_gib, fits: a chip's memory, and whether the total is within it.
    flops_per_device: FLOPs of a step, remat included (`device_flops`).
    collectives: by kind, mesh axis and part of the model: their count, and bytes per device and step.
    step_seconds: the roofline's `compute`, `memory` and `communication`, the largest of them as `bound`,
      and its name as `limit`.
    tokens_per_second, mfu_bound: both at that time, for rows without padding; MFU leaves remat out.
    compile_seconds: the time to trace and compile.
    largest: the largest buffers, if the program does not fit.
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
  """Compiles the training step, or the prefill of long prompts, for a TPU slice, and analyses the result.

  The time is that of a roofline, a lower bound of the program's time:

      compute        flops_per_device / peak of bfloat16 products
      memory         bytes that its instructions load and store / memory bandwidth
      communication  bytes sent / link bandwidth, both directions of a ring where it uses both

  No array is made, so a plan needs no TPU and only the compiler's memory.

  Args:
    config: a resolved config (`ttt_jax.checkpoints.resolve.resolve`), its mesh filled.
    topology: a name such as `v5p:4x4x4`, or any devices.
    mode: `"train"`, or `"prefill"`: prompts of `data.seq_len` tokens in `train.batch_size` rows.

  Raises:
    UserError: the topology does not exist, libtpu is not installed, or the mesh has another size.
  """
  target = open_topology(topology) if isinstance(topology, str) else topology
  mesh = make_mesh(config.mesh, list(target.devices))
  start = time.perf_counter()
  traced = _TRACERS[mode](config, mesh)
  flops = traced.runs * device_flops(
    traced.program.jaxpr,
    devices=mesh.size,
    tokens=config.data.seq_len,
    window=config.attention.window,
  )
  facts = {
    "topology": target.name,
    "devices": mesh.size,
    "mesh": dict(mesh.shape),
    "mode": mode,
    "params": count_parameters(jax.eval_shape(lambda: make_model(config))),
    "tokens_per_step": traced.tokens * traced.runs,
    "hbm_limit_gib": target.hbm_gib,
    "flops_per_device": flops,
  }
  try:
    with jax.set_mesh(mesh):
      compiled = traced.program.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    arrays = largest_arrays(traced.program.jaxpr, devices=mesh.size, count=3)
    return _too_large(str(error), facts, arrays, time.perf_counter() - start)
  return _analyse(compiled, facts, target, mesh, traced.runs, config, time.perf_counter() - start)


def _analyse(
  compiled, facts, target: Topology, mesh: Mesh, runs: int, config: Config, seconds: float
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
  if program.unknown_loops:
    warnings.warn(
      f"the trip counts of {len(program.unknown_loops)} loops are not known, they count once: the bounds "
      f"of memory and communication are too low ({', '.join(program.unknown_loops[:3])}, ...)",
      stacklevel=2,
    )
  chip = find_device(target.devices[0].device_kind)
  collectives = _by_part(program.collectives, mesh, chip, runs)
  terms = {
    "compute": facts["flops_per_device"] / chip.peak,
    "memory": runs * program.moved_bytes / chip.memory,
    "communication": sum(entry["seconds"] for entry in collectives),
  }
  limit = max(terms, key=terms.__getitem__)
  bound = terms[limit]
  model_flops = _model_flops(config, facts["mode"]) / mesh.size
  return Plan(
    **facts,
    hbm_per_device_gib=hbm,
    fits=hbm["total"] <= target.hbm_gib,
    collectives=collectives,
    step_seconds={**terms, "bound": bound, "limit": limit},
    tokens_per_second=facts["tokens_per_step"] / bound,
    mfu_bound=model_flops / chip.peak / bound,
    compile_seconds=seconds,
    largest=[],
  )


def _model_flops(config: Config, mode: Mode) -> float:
  if mode == "train":
    return training_flops(config)
  tokens = config.train.batch_size * config.data.seq_len
  flops = token_flops(config.model, config.attention, config.ttt, config.data.seq_len)
  # A prefill computes the head for the last token of a piece only.
  return tokens * (flops.forward - flops.head)


def _by_part(
  collectives: list[Collective], mesh: Mesh, chip: Device, runs: int
) -> list[dict[str, Any]]:
  """Groups collectives by kind, mesh axes and part of the model; the most bytes come first.

  Bytes are those of the device that sends most: a permute between two neighbours burdens only one.
  """
  groups: dict[tuple[str, str, str], list[Collective]] = {}
  for x in collectives:
    groups.setdefault((x.kind, _axes(x, mesh), _part(x.scope)), []).append(x)
  entries = []
  for (kind, axes, part), members in groups.items():
    by_device: Counter = Counter()
    for x in members:
      by_device.update(dict.fromkeys(x.senders or range(mesh.size), runs * x.times * x.bytes))
    entries.append(
      {
        "kind": kind,
        "axis": axes,
        "part": part,
        "count": sum(runs * x.times for x in members),
        "bytes": max(by_device.values(), default=0),
        "seconds": sum(runs * x.times * _seconds(x, chip) for x in members),
      }
    )
  return sorted(entries, key=lambda entry: -entry["bytes"])


def _axes(x: Collective, mesh: Mesh) -> str:
  """Names the mesh axes along which the devices of a group differ."""
  sizes = list(mesh.shape.values())
  differ = set()
  for group in x.groups:
    coordinates = [_coordinates(device, sizes) for device in group]
    differ |= {i for i in range(len(sizes)) if len({c[i] for c in coordinates}) > 1}
  return " x ".join(name for i, name in enumerate(mesh.shape) if i in differ)


def _coordinates(device: int, sizes: list[int]) -> tuple[int, ...]:
  coordinates = []
  for size in reversed(sizes):
    device, i = divmod(device, size)
    coordinates.append(i)
  return tuple(reversed(coordinates))


def _part(scope: str) -> str:
  """Returns the part of the model that an instruction belongs to, by the scope it was traced in."""
  for mark, part in _SCOPES:
    if mark in scope:
      return part
  return "parameters" if "sharding_constraint" in scope else "other"


def _seconds(x: Collective, chip: Device) -> float:
  """Estimates one collective that runs alone, on a ring of two-way links or behind a switch."""
  p = len(x.groups[0])
  if x.kind == "collective-permute" or not chip.torus:
    return chip.latency + x.bytes / chip.link
  if x.kind == "all-to-all":
    # A part crosses a quarter of the ring on average, in both directions.
    return chip.latency + x.bytes * p / 8 / chip.link
  return chip.latency + x.bytes / 2 / chip.link


def _too_large(
  message: str, facts: dict[str, Any], arrays: list[TracedArray], seconds: float
) -> Plan:
  """Makes the plan of a program that the compiler could not fit into memory."""
  sizes = re.search(r"(?:[Uu]sed |required for .*?\()([\d.]+)([KMGT])", message)
  total = None if sizes is None else float(sizes.group(1)) * _UNITS[sizes.group(2)] / GIB
  return Plan(
    **facts,
    hbm_per_device_gib={"total": total},
    fits=False,
    collectives=[],
    step_seconds={},
    tokens_per_second=None,
    mfu_bound=None,
    compile_seconds=seconds,
    largest=[Buffer(x.bytes / GIB, x.shape, x.scope, _remedy(x.scope, facts)) for x in arrays],
  )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _remedy(scope: str, facts: dict[str, Any]) -> str:
  """Says what makes an array smaller, by the scope that makes it."""
  if facts["mode"] == "prefill":
    return "more mesh.tensor for keys, values and parameters; more mesh.context for activations"
  if "optimizer" in scope:
    return "parameters and optimiser state: more mesh.fsdp, or mesh.tensor"
  if "head" in scope:
    return "the head: mesh.tensor splits the vocabulary, mesh.fsdp and mesh.context the tokens"
  return "activations: more train.accumulate, mesh.context or mesh.fsdp; model.remat=layer"
