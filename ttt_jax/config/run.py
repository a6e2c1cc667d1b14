"""Defines the config of a whole run, and checks its sections against each other."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ttt_jax.config.checks import require
from ttt_jax.config.given import given_fields, section
from ttt_jax.config.machine import MeshConfig, PlanConfig, RuntimeConfig
from ttt_jax.config.model import AttentionConfig, ModelConfig
from ttt_jax.config.training import CheckpointConfig, DataConfig, EvalConfig, TrainConfig
from ttt_jax.config.ttt import TTTConfig
from ttt_jax.errors import UserError


@section()
@dataclass(frozen=True)
class Config:
  """Holds all settings of a run; `ttt-jax train FILE` loads one."""

  name: str = "run"
  """Name of the run."""
  run_dir: str | None = None
  """Directory of the run; None means runs/NAME."""
  init_from: str | None = None
  """Model to start from, as ttt_jax.load_pretrained takes it. Its checkpoint sets the sections model,
  attention and ttt. Given fields of ttt override the checkpoint; given fields of model and attention
  set how it is computed (dtypes, remat, implementation) or stretch its positions, and others may not
  contradict it.
  """
  seed: int = 0
  """Seed of the parameters, the data order and the samples."""
  runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
  """Settings that JAX needs before it starts."""
  mesh: MeshConfig = field(default_factory=MeshConfig)
  """Devices along each mesh axis."""
  model: ModelConfig = field(default_factory=ModelConfig)
  """The decoder."""
  attention: AttentionConfig = field(default_factory=AttentionConfig)
  """Attention, or the baseline that replaces it."""
  ttt: TTTConfig = field(default_factory=TTTConfig)
  """MLPs that have fast weights, and how these learn."""
  data: DataConfig = field(default_factory=DataConfig)
  """Sources of text."""
  train: TrainConfig = field(default_factory=TrainConfig)
  """The optimiser and the training loop."""
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  """Saving and verifying of checkpoints."""
  eval: EvalConfig = field(default_factory=EvalConfig)
  """Evaluation during and after training."""
  plan: PlanConfig = field(default_factory=PlanConfig)
  """Defaults of `ttt-jax plan`."""

  def __post_init__(self):
    # With init_from `ttt_jax.checkpoints.resolve.resolve` makes these checks, once it has the model.
    if self.init_from is None:
      check_layers(self.model, self.attention, self.ttt)
      check_ttt_fields(self.ttt, given_fields(self.ttt), "the model")
      check_trainable(self.ttt, self.train)
      check_mesh(self.model, self.ttt, self.mesh)
    check_mixer(self.attention, self.mesh)
    check_rows("data.seq_len", self.data.seq_len, self.mesh.context, self.ttt)
    check_rows("eval.seq_len", self.eval_seq_len, self.mesh.context, self.ttt)
    if self.init_from is None:
      check_attend(self.data, self.ttt)
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
      f"{self.train.trainable!r} selects no parameters: leave it false; with train.trainable='ttt' the "
      "model with its updates off is the model without TTT",
    )
    require(
      self.eval_seq_len > self.eval.buckets,
      f"eval.buckets={self.eval.buckets} is more than the {self.eval_seq_len - 1} losses of a document of "
      f"eval.seq_len={self.eval_seq_len} tokens",
    )

  @property
  def eval_seq_len(self) -> int:
    """Returns the number of tokens per held-out document."""
    return self.data.seq_len if self.eval.seq_len is None else self.eval.seq_len

  @property
  def tokenizer(self) -> str | None:
    """Returns the path or hub name of the tokenizer; None for bytes."""
    path = self.init_from if self.data.tokenizer is None else self.data.tokenizer
    return None if path == "bytes" else path

  @property
  def resolved_run_dir(self) -> str:
    """Returns the directory of the run."""
    return f"runs/{self.name}" if self.run_dir is None else self.run_dir

  def without_ttt(self) -> "Config":
    """Returns the config of the twin: no fast weights, all else equal."""
    return dataclasses.replace(self, ttt=dataclasses.replace(self.ttt, layers=()))


def check_layers(model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig) -> None:
  """Raises UserError if the fields of complete sections contradict each other.

  So it is if a layer does not exist or is named twice, if no layer has the baseline mixer, and as
  `TTTConfig.check` and `RopeScaling.check`.
  """
  ttt.check()
  if model.rope_scaling is not None:
    model.rope_scaling.check()
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
    ttt.rule == "sum" or model.state_dtype in ("float32", "float64"),
    f"model.state_dtype={model.state_dtype!r} cannot hold the sums of ttt.rule={ttt.rule!r}, which a "
    "factorisation reads: use 'float32'",
  )
  require(
    attention.mixer in map(attention.mixer_of, range(model.num_layers))
    or attention.mixer == "attention",
    f"attention.mixer={attention.mixer!r} is in no layer: name layers in attention.mixer_layers, or "
    "leave attention.mixer out",
  )


def check_ttt_fields(ttt: TTTConfig, given: Mapping[str, Any], model: str) -> None:
  """Raises UserError if fields of `ttt`, but not `layers`, were given and no layer has fast weights."""
  if given and "layers" not in given and not ttt.layers:
    name, value = next(iter(given.items()))
    raise UserError(
      f"ttt.{name}={value!r} is given, but {model} has no fast weights: give ttt.layers too, or leave "
      f"ttt.{name} out"
    )


def check_trainable(ttt: TTTConfig, train: TrainConfig) -> None:
  """Raises UserError if `train.trainable` selects no parameters."""
  require(
    train.trainable == "all" or len(ttt.layers) > 0,
    f"train.trainable={train.trainable!r} trains the TTT layers, but ttt.layers=[] names none: give "
    "ttt.layers, or train 'all'",
  )


def check_attend(data: DataConfig, ttt: TTTConfig) -> None:
  """Raises UserError if `data.attend` cuts a chunk of fast weights, or no row."""
  if data.attend_blocks is None:
    return
  block, chunk = list(data.attend_blocks.block), ttt.chunk_size
  require(
    block[0] < data.seq_len,
    f"data.attend.block={block} cuts no row of data.seq_len={data.seq_len}: use smaller blocks",
  )
  require(
    not ttt.layers or all(n % chunk == 0 for n in block),
    f"data.attend.block={block} is not whole chunks of ttt.chunk_size={chunk}, and a cut inside of a chunk "
    f"would lose what is not yet learned: use [{max(1, round(block[0] / chunk)) * chunk}, "
    f"{max(1, round(block[1] / chunk)) * chunk}]",
  )


def check_mesh(model: ModelConfig, ttt: TTTConfig, mesh: MeshConfig) -> None:
  """Raises UserError if an axis of the mesh does not divide a size that it splits."""
  if ttt.layers and ttt.key_rank is not None:
    require(
      mesh.tensor == -1 or ttt.key_rank % mesh.tensor == 0,
      f"mesh.tensor={mesh.tensor} does not divide ttt.key_rank={ttt.key_rank}: choose a divisor, and use "
      "another axis of the mesh for the rest",
    )
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
  """Raises UserError if a baseline mixer would need its state from another shard of the sequence."""
  require(
    attention.mixer == "attention" or mesh.context in (1, -1),  # -1: checked once it is filled
    f"attention.mixer={attention.mixer!r} with mesh.context={mesh.context}: the mixer's state is not "
    "exchanged between shards of the sequence; set mesh.context=1 and use another mesh axis",
  )


def check_rows(name: str, seq_len: int, context: int, ttt: TTTConfig) -> None:
  """Raises UserError unless `context` equal shards of whole chunks make up a row of `seq_len` tokens."""
  if context == -1:
    return  # checked once it is filled
  require(
    seq_len % context == 0,
    f"mesh.context={context} does not divide {name}={seq_len}: a row is split into equal shards",
  )
  if ttt.layers:
    unit = context * ttt.chunk_size
    require(
      seq_len % unit == 0,
      f"{name}={seq_len} is not a multiple of mesh.context * ttt.chunk_size = "
      f"{context} * {ttt.chunk_size} = {unit}: shards hold whole chunks; "
      f"use {name}={max(1, round(seq_len / unit)) * unit} or another chunk size",
    )
