"""Where it runs: processes, devices along the axes of the mesh, a slice that is not here."""

import dataclasses
from dataclasses import dataclass

from ttt_jax.config.checks import require, require_choice, require_positive
from ttt_jax.config.given import records_given


@records_given
@dataclass(frozen=True)
class RuntimeConfig:
  """What JAX must know before it starts."""

  cpu_devices: int | None = None
  """Devices that the CPU is split into; None leaves JAX's choice."""
  distributed: bool = False
  """Whether this is one of many processes. On TPU pods, under SLURM and MPI they find each other;
  elsewhere give coordinator, num_processes and process_id.
  """
  coordinator: str | None = None
  """HOST:PORT of the first process."""
  num_processes: int | None = None
  """How many processes there are."""
  process_id: int | None = None
  """Which of the processes this one is, from 0."""

  def __post_init__(self):
    if self.cpu_devices is not None:
      require_positive("runtime", self, "cpu_devices")
    given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    require(
      self.distributed or len(missing) == 3,
      f"runtime has {', '.join(name for name in given if name not in missing)}, which need "
      "runtime.distributed=true",
    )
    require(
      len(missing) in (0, 3),
      f"runtime.{', runtime.'.join(missing)} missing: give all of coordinator, num_processes and "
      "process_id, or none where they are found by themselves (TPU pods, SLURM, MPI)",
    )
    if not missing:
      require_positive("runtime", self, "num_processes")
      require(
        0 <= self.process_id < self.num_processes,
        f"runtime.process_id={self.process_id} must be from 0 to {self.num_processes - 1} "
        "(runtime.num_processes - 1)",
      )


@records_given
@dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; their product is the number of devices.

  One axis may be -1: what the others leave, as `filled` computes it.
  """

  data: int = 1
  """Devices along the rows of the batch."""
  fsdp: int = 1
  """Devices along the rows of the batch, over which parameters and optimiser state are sharded."""
  context: int = 1
  """Devices along the sequence."""
  tensor: int = 1
  """Devices along heads, MLP hidden width and vocabulary."""

  def __post_init__(self):
    for field_ in dataclasses.fields(self):
      size = getattr(self, field_.name)
      require(
        size > 0 or size == -1, f"mesh.{field_.name}={size} must be positive, or -1: the rest"
      )
    require(
      self.shape.count(-1) <= 1,
      f"mesh={list(self.shape)} has several -1: only one axis can be the rest",
    )

  def filled(self, devices: int) -> "MeshConfig":
    """The mesh with the axis of -1 filled, so that there are `devices` devices.

    Raises:
      UserError: the other axes do not divide them.
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
    """The sizes of the axes, in the order data, fsdp, context, tensor."""
    return (self.data, self.fsdp, self.context, self.tensor)

  @property
  def size(self) -> int:
    """How many devices the mesh has; negative while an axis is -1."""
    return self.data * self.fsdp * self.context * self.tensor


@records_given
@dataclass(frozen=True)
class PlanConfig:
  """What `ttt-jax plan` compiles for, unless told otherwise."""

  topology: str | None = None
  """A TPU slice to plan for, such as "v5p:4x4x4"."""
  mode: str = "train"
  """"train", a training step; or "prefill", the reading of train.batch_size prompts of data.seq_len
  tokens.
  """

  def __post_init__(self):
    require_choice("plan.mode", self.mode, ("train", "prefill"))
