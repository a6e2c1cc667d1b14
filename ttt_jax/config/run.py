"""A whole run, and what its sections must agree on."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt_jax.config.checks import require
from ttt_jax.config.given import given_fields, records_given
from ttt_jax.config.machine import MeshConfig, PlanConfig, RuntimeConfig
from ttt_jax.config.model import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.config.training import CheckpointConfig, DataConfig, EvalConfig, TrainConfig
from ttt_jax.errors import UserError


@records_given
@dataclass(frozen=True)
class Config:
  """Everything a run needs; `ttt-jax train FILE` reads one."""

  name: str = "run"
  """Name of the run."""
  run_dir: str | None = None
  """Directory of the run; None is runs/NAME."""
  init_from: str | None = None
  """A model to start from: whatever ttt_jax.load_pretrained reads. It decides the sections model,
  attention and ttt; fields that are given there count over it, and may not contradict it.
  """
  seed: int = 0
  """Seed of parameters, data order and samples."""
  runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
  """What JAX must know before it starts."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """Devices along each mesh axis."""
  model: ModelConfig = field(default_factory=ModelConfig)
  """The decoder."""
  attention: AttentionConfig = field(default_factory=AttentionConfig)
  """Which tokens a token sees."""
  ttt: TTTConfig = field(default_factory=TTTConfig)
  """Which MLPs have fast weights, and how they learn."""
  data: DataConfig = field(default_factory=DataConfig)
  """Where the text comes from."""
  train: TrainConfig = field(default_factory=TrainConfig)
  """The optimiser and the training loop."""
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  """When a run is saved, and what is kept."""
  eval: EvalConfig = field(default_factory=EvalConfig)
  """The evaluation after training."""
  plan: PlanConfig = field(default_factory=PlanConfig)
  """What `ttt-jax plan` compiles for."""

  def __post_init__(self):
    if (
      self.init_from is None
    ):  # else `ttt_jax.checkpoints.resolve.resolve` has the model to check against
      check_layers(self.model, self.attention, self.ttt)
      check_given(self.ttt, given_fields(self.ttt), "the model")
      check_trainable(self.ttt, self.train)
      check_mesh(self.model, self.mesh)
    check_mixer(self.attention, self.mesh)
    check_rows("data.seq_len", self.data.seq_len, self.mesh.context, self.ttt)
    check_rows("eval.seq_len", self.eval_seq_len, self.mesh.context, self.ttt)
    rows = max(1, self.mesh.data) * max(1, self.mesh.fsdp) * self.train.accumulate
    require(
      self.train.batch_size % rows == 0,
      f"train.batch_size={self.train.batch_size} is not a multiple of mesh.data * mesh.fsdp * "
      f"train.accumulate = {rows}",
    )
    if self.attention.window is not None and self.init_from is None:
      require(
        self.attention.window <= self.data.seq_len,
        f"attention.window={self.attention.window} is larger than data.seq_len="
        f"{self.data.seq_len}: use a smaller window, or none for full attention",
      )
    require(
      not (self.eval.baseline and self.train.trainable != "all"),
      f"eval.baseline=true trains a twin without TTT, in which train.trainable="
      f"{self.train.trainable!r} names nothing: leave it false; where train.trainable is 'ttt', the "
      "model with its updates off is the one without TTT",
    )
    require(
      self.eval_seq_len > self.eval.buckets,
      f"eval.buckets={self.eval.buckets} is more than the {self.eval_seq_len - 1} losses of a document of "
      f"eval.seq_len={self.eval_seq_len} tokens",
    )

  @property
  def eval_seq_len(self) -> int:
    """Tokens per held-out document."""
    return self.data.seq_len if self.eval.seq_len is None else self.eval.seq_len

  @property
  def tokenizer(self) -> str | None:
    """Where the tokenizer is; None for bytes."""
    path = self.init_from if self.data.tokenizer is None else self.data.tokenizer
    return None if path == "bytes" else path

  @property
  def resolved_run_dir(self) -> str:
    """Directory of the run."""
    return f"runs/{self.name}" if self.run_dir is None else self.run_dir

  def without_ttt(self) -> "Config":
    """The twin without fast weights, everything else equal."""
    return dataclasses.replace(self, ttt=dataclasses.replace(self.ttt, layers=()))


def check_layers(model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig) -> None:
  """Raises UserError if a layer index does not exist or is named twice, or a mixer is in no layer."""
  for name, layers in (
    ("ttt.layers", ttt.layers),
    ("attention.full_layers", attention.full_layers),
    ("attention.mixer_layers", attention.mixer_layers or ()),
  ):
    for layer in layers:
      require(
        0 <= layer < model.num_layers,
        f"{name}={list(layers)} names layer {layer}, but model.num_layers={model.num_layers}: "
        f"use 0 to {model.num_layers - 1}",
      )
    require(len(set(layers)) == len(layers), f"{name}={list(layers)} names a layer twice")
  require(
    attention.mixer in map(attention.mixer_of, range(model.num_layers))
    or attention.mixer == "attention",
    f"attention.mixer={attention.mixer!r} is in no layer: name some in attention.mixer_layers, or leave "
    "attention.mixer out",
  )


def check_given(ttt: TTTConfig, given: Mapping[str, Any], whose: str) -> None:
  """Raises UserError if fields of `ttt` were given, but no layer has fast weights and none was denied."""
  if given and "layers" not in given and not ttt.layers:
    name, value = next(iter(given.items()))
    raise UserError(
      f"ttt.{name}={value!r} is given, but {whose} has no fast weights: give ttt.layers too, or leave it "
      "out"
    )


def check_trainable(ttt: TTTConfig, train: TrainConfig) -> None:
  """Raises UserError if nothing would train."""
  require(
    train.trainable == "all" or len(ttt.layers) > 0,
    f"train.trainable={train.trainable!r} trains the TTT layers, but ttt.layers=[] names none",
  )


def check_mesh(model: ModelConfig, mesh: MeshConfig) -> None:
  """Raises UserError if an axis does not divide what it splits."""
  for axis, names in (
    ("tensor", ("num_heads", "num_kv_heads", "d_ff", "vocab_size")),
    ("fsdp", ("d_model",)),
  ):
    parts = getattr(mesh, axis)
    for name in names:
      size = getattr(model, name)
      require(
        parts == -1 or size % parts == 0,
        f"mesh.{axis}={parts} does not divide model.{name}={size}: choose a divisor, and use another "
        "axis of the mesh for the rest",
      )


def check_mixer(attention: AttentionConfig, mesh: MeshConfig) -> None:
  """Raises UserError if a mixer would need a state of another shard of the sequence."""
  require(
    attention.mixer == "attention" or mesh.context in (1, -1),  # -1: checked when it is known
    f"attention.mixer={attention.mixer!r} with mesh.context={mesh.context}: its state is not exchanged "
    "between shards of the sequence; set mesh.context=1 and use mesh.data, mesh.fsdp or mesh.tensor",
  )


def check_rows(name: str, seq_len: int, context: int, ttt: TTTConfig) -> None:
  """Raises UserError unless `context` shards of whole chunks make up a row of `seq_len` tokens."""
  if context == -1:
    return  # checked when it is known
  require(
    seq_len % context == 0,
    f"mesh.context={context} does not divide {name}={seq_len}: the row is cut into equal shards",
  )
  if ttt.layers:
    unit = context * ttt.chunk_size
    require(
      seq_len % unit == 0,
      f"{name}={seq_len} is not a multiple of mesh.context * ttt.chunk_size = "
      f"{context} * {ttt.chunk_size} = {unit}: shards hold whole chunks; "
      f"use {name}={max(1, round(seq_len / unit)) * unit} or another chunk size",
    )
