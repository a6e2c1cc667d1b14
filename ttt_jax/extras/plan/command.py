"""Runs `ttt-jax plan`: prints one plan as text or JSON, or a table over several meshes."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.resolve import resolve
from ttt_jax.config import Config, MeshConfig
from ttt_jax.config.given import given_fields
from ttt_jax.errors import UserError
from ttt_jax.extras.plan.planner import Mode, Plan, plan
from ttt_jax.extras.plan.topology import open_topology

_SWEPT_CONTEXTS = (1, 2, 4, 8, 16)


def run(
  config: Config,
  *,
  topology: str | None,
  mode: Mode | None,
  as_json: bool,
  sweep: bool,
  console: Console | None = None,
) -> int:
  """Plans a run and prints the plan; returns 0 if the run fits, 1 if it does not.

  Raises:
    UserError: no topology is given; a mesh fits neither the topology nor the model.
  """
  console = Console() if console is None else console
  topology = config.plan.topology if topology is None else topology
  mode = config.plan.mode if mode is None else mode
  if topology is None:
    raise UserError(
      "plan.topology is not set: give --topology, such as v5p:4x4x4 (64 chips) or v5e:16x16"
    )
  devices = len(open_topology(topology).devices)
  if sweep:
    plans = []
    for mesh in swept_meshes(config, devices):
      plans.append(_plan(dataclasses.replace(config, mesh=mesh), topology, mode, devices))
      if not as_json:
        console.print(_summary_line(plans[-1]), highlight=False, soft_wrap=True)
    if as_json:
      print(json.dumps([as_dict(p) for p in plans], indent=2))
    else:
      console.print(_table(plans))
    return 0 if any(p.fits for p in plans) else 1
  planned = _plan(config, topology, mode, devices)
  if as_json:
    print(json.dumps(as_dict(planned), indent=2))
  else:
    _print(planned, console)
  return 0 if planned.fits else 1


# Without a checkpoint, a plan for another model's shapes or dtypes would say nothing of it.
_FROM_CHECKPOINT = (
  "vocab_size",
  "num_layers",
  "d_model",
  "d_ff",
  "num_heads",
  "num_kv_heads",
  "dtype",
  "param_dtype",
)


def _plan(config: Config, topology: str, mode: Mode, devices: int) -> Plan:
  """Plans with the shapes of the config's `model` section if the checkpoint of `init_from` is not here."""
  if config.init_from is not None and not Path(config.init_from).expanduser().exists():
    missing = [name for name in _FROM_CHECKPOINT if name not in given_fields(config.model)]
    if missing:
      raise UserError(
        f"init_from={config.init_from!r} does not exist here, and the config does not give "
        f"{', '.join(f'model.{name}' for name in missing)}: give them, or download the checkpoint"
      )
    config = dataclasses.replace(config, init_from=None)
  return plan(resolve(config, devices), topology, mode=mode)


def as_dict(planned: Plan) -> dict:
  """Returns a plan as it is printed in JSON."""
  return planned._asdict() | {"largest": [buffer._asdict() for buffer in planned.largest]}


def swept_meshes(config: Config, devices: int) -> list[MeshConfig]:
  """Lists meshes of so many devices, with the config's `tensor`, over sizes of `context`.

  `fsdp` takes the largest part of the other devices that divides `model.d_model`, `data` the rest.
  """
  meshes = []
  tensor = max(1, config.mesh.tensor)
  rows = config.train.batch_size // config.train.accumulate
  for context in _SWEPT_CONTEXTS:
    others, rest = divmod(devices, context * tensor)
    chunks = context * config.ttt.chunk_size if config.ttt.layers else context
    if rest or not others or rows % others or config.data.seq_len % chunks:
      continue
    fsdp = max(f for f in range(1, others + 1) if others % f == 0 and config.model.d_model % f == 0)
    meshes.append(MeshConfig(data=others // fsdp, fsdp=fsdp, context=context, tensor=tensor))
  if not meshes:
    raise UserError(
      f"--sweep finds no mesh: {devices} devices with mesh.tensor={tensor} do not divide "
      f"train.batch_size={config.train.batch_size} rows for any context of {_SWEPT_CONTEXTS}"
    )
  return meshes


def _mesh(planned: Plan) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in planned.mesh.items() if size > 1) or "1"


def _summary_line(planned: Plan) -> str:
  fits = "fits" if planned.fits else "does not fit"
  return (
    f"{_mesh(planned)}: {_memory(planned)}, {fits}; compiled in {planned.compile_seconds:.0f} s"
  )


def _memory(planned: Plan) -> str:
  total = planned.hbm_per_device_gib["total"]
  needed = "more than there is" if total is None else f"{total:.2f}"
  return f"{needed} of {planned.hbm_limit_gib:.2f} GiB"


def _table(plans: Sequence[Plan]) -> Table:
  table = Table()
  for title in (
    "mesh",
    "memory of a device",
    "fits",
    "step",
    "limited by",
    "tokens/s",
    "MFU at most",
  ):
    table.add_column(title, justify="left" if title in ("mesh", "limited by") else "right")
  for planned in plans:
    step = planned.step_seconds
    table.add_row(
      _mesh(planned),
      _memory(planned),
      "yes" if planned.fits else "no",
      f"{step['bound']:.3g} s" if step else "",
      step.get("limit", ""),
      f"{planned.tokens_per_second:,.0f}" if step else "",
      f"{100 * planned.mfu_bound:.0f} %" if step else "",
    )
  return table


def _print(planned: Plan, console: Console) -> None:
  def line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)

  name = "training step" if planned.mode == "train" else "prefill"
  line(
    f"{name} of {planned.params:,} parameters, {planned.tokens_per_step:,} tokens, on {planned.topology}: "
    f"{planned.devices} devices ({_mesh(planned)}); compiled in {planned.compile_seconds:.0f} s"
  )
  parts = {k: v for k, v in planned.hbm_per_device_gib.items() if k != "total"}
  parts = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items())
  line(f"memory of a device: {_memory(planned)}" + (f" ({parts})" if parts else ""))
  if not planned.fits:
    line("it does not fit; its largest buffers:")
    for buffer in planned.largest:
      line(f"  {buffer.gib:.2f} GiB  {buffer.shape}  {buffer.scope}\n    {buffer.remedy}")
  if not planned.step_seconds:
    return
  step = planned.step_seconds
  terms = ", ".join(f"{name} {step[name]:.3g} s" for name in ("compute", "memory", "communication"))
  line(
    f"a step takes at least {step['bound']:.3g} s, limited by {step['limit']} ({terms}): "
    f"{planned.tokens_per_second:,.0f} tokens/s, {100 * planned.mfu_bound:.0f} % MFU"
  )
  table = Table(
    "collective", "axis", "of", title="what a device sends in a step", title_justify="left"
  )
  for title in ("count", "MB", "s"):
    table.add_column(title, justify="right")
  for entry in planned.collectives:
    table.add_row(
      entry["kind"],
      entry["axis"],
      entry["part"],
      f"{entry['count']:,}",
      f"{entry['bytes'] / 1e6:,.1f}",
      f"{entry['seconds']:.3g}",
    )
  console.print(table)
