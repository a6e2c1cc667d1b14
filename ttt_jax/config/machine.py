"""Defines the config sections of the machine: processes, mesh axes, and a TPU slice to plan for."""

import dataclasses
from dataclasses import dataclass

from ttt_jax.config.checks import require, require_choice, require_positive
from ttt_jax.config.given import section


@section("runtime")
@dataclass(frozen=True)
class RuntimeConfig:
  """Holds the settings that JAX needs before it starts."""

  cpu_devices: int | None = None
  """Number of devices that the CPU is split into; None leaves the choice to JAX."""
  distributed: bool = False
  """Whether this is one of several processes. On TPU pods and under SLURM or MPI the processes find
  each other; elsewhere give coordinator, num_processes and process_id.
  """
  coordinator: str | None = None
  """Address of the first process, as HOST:PORT."""
  num_processes: int | None = None
  """Number of processes."""
  process_id: int | None = None
  """Index of this process, from 0."""

  def __post_init__(self):
    if self.cpu_devices is not None:
      require_positive("runtime", self, "cpu_devices")
    addresses = {
      name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")
    }
    missing = [name for name, value in addresses.items() if value is None]
    require(
      self.distributed or len(missing) == 3,
      f"runtime.{', runtime.'.join(name for name in addresses if name not in missing)} need "
      "runtime.distributed=true: set it, or leave them out",
    )
    require(
      len(missing) in (0, 3),
      f"runtime.{', runtime.'.join(missing)} missing: give all of coordinator, num_processes and "
      "process_id, or none of them on TPU pods and under SLURM or MPI, where JAX finds them",
    )
    if not missing:
      require_positive("runtime", self, "num_processes")
      require(
        0 <= self.process_id < self.num_processes,
        f"runtime.process_id={self.process_id} must be from 0 to {self.num_processes - 1} "
        "(runtime.num_processes - 1)",
      )


@section("mesh")
@dataclass(frozen=True)
class MeshConfig:
  """Sets the number of devices along each mesh axis; the product is the number of all devices.

  One axis may be -1: `filled` gives it all devices that the other axes leave.
  """

  data: int = 1
  """Devices that split the rows of the batch; parameters are replicated along this axis."""
  fsdp: int = 1
  """Devices that split the rows of the batch and shard the parameters and the optimiser state."""
  context: int = 1
  """Devices that split the tokens of each row (context parallelism)."""
  tensor: int = 1
  """Devices that split attention heads, MLP hidden width and vocabulary."""

  def __post_init__(self):
    for field_ in dataclasses.fields(self):
      size = getattr(self, field_.name)
      require(
        size > 0 or size == -1,
        f"mesh.{field_.name}={size} must be positive, or -1 for all other devices",
      )
    require(
      self.shape.count(-1) <= 1,
      f"mesh={list(self.shape)} has several -1: at most one axis can take all other devices",
    )

  def filled(self, devices: int) -> "MeshConfig":
    """Returns the mesh with the axis of -1 filled, so that its size is `devices`.

    Raises:
      UserError: the product of the other axes does not divide `devices`.
    """
    if -1 not in self.shape:
      return self
    names = [field_.name for field_ in dataclasses.fields(self)]
    name, others = names[self.shape.index(-1)], -self.size
    require(
      devices % others == 0,
      f"mesh.{name}=-1: the other axes need {others} devices or a multiple, but there are {devices}",
    )
    return dataclasses.replace(self, **{name: devices // others})

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Returns the sizes of the axes, in the order data, fsdp, context, tensor."""
    return (self.data, self.fsdp, self.context, self.tensor)

  @property
  def size(self) -> int:
    """Returns the number of devices; it is negative while an axis is -1."""
    return self.data * self.fsdp * self.context * self.tensor


@section("plan")
@dataclass(frozen=True)
class PlanConfig:
  """Sets the defaults of `ttt-jax plan`."""

  topology: str | None = None
  """TPU slice to plan for, such as "v5p:4x4x4"."""
  mode: str = "train"
  """Program to plan: "train", a training step; or "prefill", the prefill of train.batch_size prompts
  of data.seq_len tokens.
  """

  def __post_init__(self):
    require_choice("plan.mode", self.mode, ("train", "prefill"))
