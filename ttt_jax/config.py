"""The configuration of a run: frozen dataclasses, their defaults and every check that needs no JAX.

A config file under `configs/` holds what differs from these defaults. Nothing here imports JAX, so a
config can be read and refused before a device is touched. Sizes in tokens unless said otherwise.
"""

import dataclasses
import math
from dataclasses import dataclass, field

DTYPES = ("float32", "bfloat16", "float64")
IMPLEMENTATIONS = ("associative", "dual", "sequential")
TRAINABLE = ("all", "ttt", "ttt+down")
REMAT = ("none", "layer", "minimal")
WRITERS = ("tensorboard", "wandb")
MIXERS = ("attention", "gla", "delta_net")
COLLECTIVES = ("all_gather", "doubling", "all_to_all", "ring")


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ValueError(message)


def _require_positive(section: str, config, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _require(value > 0, f"{section}.{name}={value} must be positive")


def _require_choice(name: str, value, choices) -> None:
  _require(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class RuntimeConfig:
  """What JAX must know before it starts."""

  cpu_devices: int | None = None  # split the CPU into this many devices; None leaves JAX's choice
  # Whether this is one of many processes. On TPU pods, SLURM and MPI they find each other; elsewhere
  # all are given the first one's address, how many there are, and which one they are.
  distributed: bool = False
  coordinator: str | None = None  # HOST:PORT
  num_processes: int | None = None
  process_id: int | None = None  # from 0

  def __post_init__(self):
    if self.cpu_devices is not None:
      _require_positive("runtime", self, "cpu_devices")
    given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [name for name, value in given.items() if value is None]
    _require(
      self.distributed or len(missing) == 3,
      f"runtime has {', '.join(name for name in given if name not in missing)}, which need "
      "runtime.distributed=true",
    )
    _require(
      len(missing) in (0, 3),
      f"runtime.{', runtime.'.join(missing)} missing: give all of coordinator, num_processes and "
      "process_id, or none where they are found by themselves (TPU pods, SLURM, MPI)",
    )
    if not missing:
      _require_positive("runtime", self, "num_processes")
      _require(
        0 <= self.process_id < self.num_processes,
        f"runtime.process_id={self.process_id} must be from 0 to {self.num_processes - 1} "
        "(runtime.num_processes - 1)",
      )


@dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; their product is the number of devices.

  One axis may be -1: what the others leave, as `filled` computes it.
  """

  data: int = 1  # rows of the batch
  fsdp: int = 1  # rows of the batch, parameters and optimiser state sharded
  context: int = 1  # the sequence
  tensor: int = 1  # heads, MLP hidden and vocabulary

  def __post_init__(self):
    for field_ in dataclasses.fields(self):
      size = getattr(self, field_.name)
      _require(
        size > 0 or size == -1, f"mesh.{field_.name}={size} must be positive, or -1: the rest"
      )
    _require(
      self.shape.count(-1) <= 1,
      f"mesh={list(self.shape)} has several -1: only one axis can be the rest",
    )

  def filled(self, devices: int) -> "MeshConfig":
    """The mesh with the axis of -1 filled, so that there are `devices` devices.

    Raises:
      ValueError: the other axes do not divide them.
    """
    if -1 not in self.shape:
      return self
    names = [field_.name for field_ in dataclasses.fields(self)]
    name, others = names[self.shape.index(-1)], -self.size
    _require(
      devices % others == 0,
      f"mesh.{name}=-1: the other axes need {others} devices or a multiple, but there are {devices}",
    )
    return dataclasses.replace(self, **{name: devices // others})

  @property
  def shape(self) -> tuple[int, int, int, int]:
    return (self.data, self.fsdp, self.context, self.tensor)

  @property
  def size(self) -> int:
    return self.data * self.fsdp * self.context * self.tensor


@dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained length (`ttt_jax.nn.rope`).

  Kinds, fields and their defaults are those of `rope_scaling` in `transformers`.
  """

  kind: str = "linear"  # "linear", "llama3" or "yarn"
  factor: float = 1.0
  original_max_positions: int | None = None  # the trained length, of llama3 and yarn
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float | None = None  # yarn: of cos and sin; None: from factor and mscale
  mscale: float | None = None  # yarn
  mscale_all_dim: float | None = None  # yarn
  truncate: bool = True  # yarn: whole channels as borders of the ramp

  def check(self) -> None:
    """Raises ValueError for a field out of range; `ModelConfig` calls it."""
    section = "model.rope_scaling"
    _require_choice(f"{section}.kind", self.kind, ("linear", "llama3", "yarn"))
    _require_positive(section, self, "factor")
    if self.kind != "linear":
      length = self.original_max_positions
      _require(
        length is not None and length > 0,
        f"{section}.original_max_positions={length}: {section}.kind={self.kind!r} needs the length "
        "the model was trained on",
      )
    if self.kind == "llama3":
      _require_positive(section, self, "low_freq_factor", "high_freq_factor")
      _require(
        self.high_freq_factor > self.low_freq_factor,
        f"{section}.high_freq_factor={self.high_freq_factor} must be above "
        f"{section}.low_freq_factor={self.low_freq_factor}",
      )
    if self.kind == "yarn":
      _require_positive(section, self, "beta_fast", "beta_slow")
      if self.attention_factor is not None:
        _require_positive(section, self, "attention_factor")


@dataclass(frozen=True)
class ModelConfig:
  """A decoder of the Llama / Qwen3 kind."""

  vocab_size: int = 256
  num_layers: int = 4
  d_model: int = 96
  d_ff: int = 288
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int | None = None  # None: d_model // num_heads
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  max_positions: int | None = None  # the length it was trained for; longer rows are not refused
  norm_eps: float = 1e-6
  qk_norm: bool = False  # RMSNorm on every query and key head, as Qwen3 has it
  attention_bias: str | None = None  # "qkv" as Qwen2 has it, "qkvo" on the output projection too
  tie_embeddings: bool = True
  bos_id: int | None = None  # the token that begins a text
  eos_ids: tuple[int, ...] = ()  # the tokens that end one
  param_dtype: str = "float32"
  dtype: str = "float32"  # of the computation
  state_dtype: str = "float32"  # of fast weights and their prefix sums
  # What the backward pass computes again: "layer" everything but a layer's input; "minimal" the cheap
  # part, as the results of the projections are kept; "none" nothing.
  remat: str = "layer"

  def __post_init__(self):
    _require_positive(
      "model", self, "vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads"
    )
    _require_positive("model", self, "rope_theta", "norm_eps")
    if self.rope_scaling is not None:
      self.rope_scaling.check()
    if self.max_positions is not None:
      _require_positive("model", self, "max_positions")
    _require_choice("model.attention_bias", self.attention_bias, (None, "qkv", "qkvo"))
    for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
      _require(
        0 <= token < self.vocab_size,
        f"model.bos_id={self.bos_id}, model.eos_ids={list(self.eos_ids)}: {token} is no token, "
        f"model.vocab_size={self.vocab_size}",
      )
    for name in ("param_dtype", "dtype", "state_dtype"):
      _require_choice(f"model.{name}", getattr(self, name), DTYPES)
    _require_choice("model.remat", self.remat, REMAT)
    _require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
    )
    if self.head_dim is None:
      _require(
        self.d_model % self.num_heads == 0,
        f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}: "
        "give model.head_dim",
      )
    _require(
      self.head_size > 0 and self.head_size % 2 == 0,
      f"model.head_dim={self.head_size} must be even and positive (rotary embedding pairs channels)",
    )

  @property
  def head_size(self) -> int:
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True)
class AttentionConfig:
  """Which tokens a token sees: the last `window` ones, or in `full_layers` all earlier ones."""

  window: int | None = None  # None: full attention in every layer
  full_layers: tuple[int, ...] = ()  # layers with full attention although `window` is set
  # "xla" anywhere, "splash" on TPU, "cudnn" on GPU; None: the best that can express the call.
  implementation: str | None = None
  # Full attention on several shards: swap half of the queries with the mirror shard, so that all
  # devices have equal work. None does; false saves two exchanges of queries and outputs.
  balance: bool | None = None
  # What mixes the tokens in `mixer_layers`: "attention"; or a baseline with a state of fixed size in its
  # place, of as many parameters: "gla", gated linear attention; "delta_net", the delta rule
  # (`ttt_jax.nn.linear_attention`). These see their whole document, and have no window.
  mixer: str = "attention"
  mixer_layers: tuple[int, ...] | None = None  # None: all but `full_layers`

  def __post_init__(self):
    if self.window is not None:
      _require_positive("attention", self, "window")
    _require_choice("attention.mixer", self.mixer, MIXERS)
    if self.mixer_layers is not None:
      _require(
        self.mixer != "attention",
        f"attention.mixer_layers={list(self.mixer_layers)} are attention layers as all others: set "
        "attention.mixer to 'gla' or 'delta_net', or leave attention.mixer_layers out",
      )
      both = sorted(set(self.mixer_layers) & set(self.full_layers))
      _require(
        not both,
        f"attention.mixer_layers={list(self.mixer_layers)} and attention.full_layers="
        f"{list(self.full_layers)} both name {both}: a layer has {self.mixer!r} or full attention, not "
        "both",
      )
    _require_choice(
      "attention.implementation", self.implementation, (None, "xla", "splash", "cudnn")
    )

  def mixer_of(self, layer: int) -> str:
    """What mixes the tokens in a layer, one of `MIXERS`."""
    if self.mixer_layers is None:
      return "attention" if layer in self.full_layers else self.mixer
    return self.mixer if layer in self.mixer_layers else "attention"


@dataclass(frozen=True)
class TTTConfig:
  """Which MLPs have fast weights, and how these learn (docs of `ttt_jax.inplace_ttt`)."""

  layers: tuple[int, ...] = ()  # layers whose down projection is a fast weight
  chunk_size: int = 512
  target: str = "input_embed"  # "input_embed": token embeddings; "hidden_states": the MLP's input
  normalize_target: bool = True  # RMS-normalise the target's source over the model width
  conv_width: int = 5  # centred; looks (conv_width - 1) / 2 tokens ahead
  projection: bool = True
  # "next_token": convolution 1 at t+1, projection the identity, learns from the first step.
  # "identity": convolution 0, projection the identity: the model starts exactly as without TTT.
  # "current_token": convolution 1 at t, the target of reconstruction; of conv_width 1 it stays that.
  # None: "next_token" in a new model, "identity" in one that `load_pretrained` gives fast weights.
  init: str | None = None
  inner_lr: float = 0.05
  inner_lr_scale: str = "1/F"  # "fixed": inner_lr as it is; "1/F": inner_lr / d_ff
  learn_inner_lr: bool = True  # multiply by exp(10 s), s learned per layer from 0
  decay: float | None = None  # the state's factor per chunk, in (0, 1]; None: 1, as in the paper
  # Tokens after which what was learned counts half: a decay of 2^(-chunk_size / half_life), which holds
  # when the chunk is changed; instead of `decay`.
  half_life: float | None = None
  # Multiply it by exp(10 s), s learned per layer from 0: recommended from scratch, with a half_life of 400.
  learn_half_life: bool = False
  clip_norm: float | None = None  # Frobenius norm a chunk's update is rescaled to; None: no clip
  implementation: str | None = None  # None: by the cost model
  # Read a chunk in one product, Z (W + S), rounded to model.dtype; None: where that loses nothing.
  merge: bool | None = None
  collective: str | None = None  # how shards exchange their states; None: by the cost model
  wire_dtype: str | None = None  # what states are rounded to for that; None: not at all

  def __post_init__(self):
    _require_positive("ttt", self, "chunk_size", "conv_width", "inner_lr")
    _require(self.conv_width % 2 == 1, f"ttt.conv_width={self.conv_width} must be odd (centred)")
    _require_choice("ttt.target", self.target, ("input_embed", "hidden_states"))
    _require_choice("ttt.init", self.init, (None, "next_token", "identity", "current_token"))
    _require_choice("ttt.inner_lr_scale", self.inner_lr_scale, ("1/F", "fixed"))
    _require(
      not (self.init in (None, "next_token") and self.conv_width < 3),
      f"ttt.init={self.init!r} needs ttt.conv_width >= 3, got {self.conv_width}",
    )
    _require_choice("ttt.implementation", self.implementation, (None, *IMPLEMENTATIONS))
    _require_choice("ttt.collective", self.collective, (None, *COLLECTIVES))
    _require_choice("ttt.wire_dtype", self.wire_dtype, (None, *DTYPES))
    _require(
      not (self.merge and self.implementation not in (None, "sequential")),
      f"ttt.merge=true needs ttt.implementation='sequential', got {self.implementation!r}",
    )
    if self.decay is not None:
      _require(0 < self.decay <= 1, f"ttt.decay={self.decay} must be in (0, 1]")
    if self.half_life is not None:
      _require_positive("ttt", self, "half_life")
      _require(
        self.decay is None,
        f"ttt.half_life={self.half_life} and ttt.decay={self.decay} both say what is forgotten: leave "
        "one out",
      )
    _require(
      not (self.learn_half_life and self.half_life is None),
      "ttt.learn_half_life=true needs a ttt.half_life to start from, in tokens",
    )
    if self.clip_norm is not None:
      _require_positive("ttt", self, "clip_norm")

  @property
  def chunk_decay(self) -> float | None:
    """The state's factor per chunk before anything is learned of it; None is 1."""
    return self.decay if self.half_life is None else 0.5 ** (self.chunk_size / self.half_life)


@dataclass(frozen=True)
class WeightedSource:
  """One of several sources of text."""

  path: str | None  # as data.path
  weight: float = 1.0  # its part of the tokens, against the weights of the others; 0 leaves it out


@dataclass(frozen=True)
class DataConfig:
  """Where the text comes from. Every row holds `seq_len` tokens of one or more documents."""

  # A directory that `ttt-jax data prepare` made; or a directory or glob of .txt, .md, .py, .jsonl files,
  # each also .gz, .parquet and .array_record files, which every process reads into memory. None: the
  # Python standard library's own sources.
  path: str | None = None
  mixture: tuple[WeightedSource, ...] = ()  # several sources, instead of `path`
  text_field: str = "text"  # of .jsonl, parquet and JSON in ArrayRecord files
  # Where `ttt_jax.load_tokenizer` finds one, or "bytes". None: the one of `init_from`, else bytes.
  tokenizer: str | None = None
  seq_len: int = 4096
  heldout_fraction: float = 0.05  # of the documents, chosen by a hash of their path
  # Pad rows so that every document begins with a chunk of the fast weights: none then shares a chunk with
  # the end of another one.
  align_documents: bool = False
  max_bad_records: int = 0  # corrupt records of parquet and ArrayRecord files that are left out

  @property
  def sources(self) -> tuple[tuple[str, str | None, float], ...]:
    """(field, path, weight) of every source that counts."""
    if not self.mixture:
      return (("data.path", self.path, 1.0),)
    return tuple(
      (f"data.mixture[{i}].path", source.path, source.weight)
      for i, source in enumerate(self.mixture)
      if source.weight > 0
    )

  def __post_init__(self):
    _require_positive("data", self, "seq_len")
    _require(
      self.max_bad_records >= 0,
      f"data.max_bad_records={self.max_bad_records} must not be negative",
    )
    _require(
      not (self.mixture and self.path is not None),
      f"data.path={self.path!r} and data.mixture exclude each other: name the path in the mixture, or "
      "leave one out",
    )
    for i, source in enumerate(self.mixture):
      _require(
        source.weight >= 0 and math.isfinite(source.weight),
        f"data.mixture[{i}].weight={source.weight} must be a number from 0 on",
      )
    _require(
      len(self.sources) > 0,
      "data.mixture has no weight above 0: give one to each source that is to be read",
    )
    _require(
      0 < self.heldout_fraction < 1,
      f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 1",
    )


@dataclass(frozen=True)
class TrainConfig:
  """AdamW with warm-up and cosine decay to `learning_rate * final_lr_ratio`."""

  # "all" parameters; "ttt": convolution, projection and inner rate of the TTT layers; "ttt+down":
  # also their down projections. The others stay as they are and take no optimiser state.
  trainable: str = "all"
  steps: int = 400
  batch_size: int = 1  # rows per step, over all devices
  learning_rate: float = 4e-3
  final_lr_ratio: float = 0.1
  warmup_steps: int = 20
  weight_decay: float = 0.1  # not on norms, convolutions, inner rates
  beta1: float = 0.9
  beta2: float = 0.95
  clip_grad_norm: float = 1.0
  accumulate: int = 1  # a step's rows are read in so many parts, one after another
  z_loss: float = 0.0  # weight of the mean of logsumexp(logits)^2, added to the loss
  # Of the parameters that the optimiser keeps where model.param_dtype is narrower; it then rounds them
  # to that after every step.
  master_dtype: str = "float32"
  max_bad_steps: int = 10  # steps in a row without a finite loss or gradient, which change nothing
  log_every: int = 10
  writers: tuple[str, ...] = ()  # "tensorboard", "wandb", besides metrics.jsonl
  profile: tuple[int, int] | None = None  # the first and the last step of a trace for jax.profiler

  def __post_init__(self):
    _require_positive(
      "train", self, "steps", "batch_size", "learning_rate", "clip_grad_norm", "log_every"
    )
    _require_positive("train", self, "accumulate", "max_bad_steps")
    _require_choice("train.master_dtype", self.master_dtype, DTYPES)
    for writer in self.writers:
      _require_choice("train.writers", writer, WRITERS)
    if self.profile is not None:
      first, last = self.profile
      _require(
        1 <= first <= last,
        f"train.profile={list(self.profile)} must be the first and the last step, from 1 on",
      )
    _require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative")
    _require_choice("train.trainable", self.trainable, TRAINABLE)
    _require(self.warmup_steps >= 0, f"train.warmup_steps={self.warmup_steps} must not be negative")
    _require(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay} must not be negative")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"train.{name}={value} must be in [0, 1)")
    _require(
      0 <= self.final_lr_ratio <= 1,
      f"train.final_lr_ratio={self.final_lr_ratio} must be in [0, 1]",
    )
    _require(
      self.warmup_steps < self.steps,
      f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}",
    )


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = 100  # steps
  keep: int = 2  # the newest ones
  keep_every: int | None = None  # also those of every so many steps, for ever

  def __post_init__(self):
    _require_positive("checkpoint", self, "every", "keep")
    if self.keep_every is not None:
      _require_positive("checkpoint", self, "keep_every")
      _require(
        self.keep_every % self.every == 0,
        f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}",
      )


@dataclass(frozen=True)
class EvalConfig:
  """Loss by position on held-out documents of at least `seq_len` tokens."""

  baseline: bool = False  # also train a twin without TTT on the same batches
  before: bool = False  # also evaluate the model as it was before the first step
  seq_len: int | None = None  # may be longer than the rows trained on; None: data.seq_len
  documents: int = 32
  buckets: int = 8
  prompt_tokens: int = 512  # of the sample text
  sample_tokens: int = 200
  temperature: float = 0.7

  def __post_init__(self):
    if self.seq_len is not None:
      _require_positive("eval", self, "seq_len")
    _require_positive("eval", self, "documents", "buckets", "prompt_tokens", "sample_tokens")
    _require(self.temperature >= 0, f"eval.temperature={self.temperature} must not be negative")


@dataclass(frozen=True)
class PlanConfig:
  """What `ttt-jax plan` compiles for, unless told otherwise."""

  topology: str | None = None  # a TPU slice, such as "v5p:4x4x4"
  mode: str = (
    "train"  # "train", or "prefill": prompts of data.seq_len tokens, train.batch_size rows
  )

  def __post_init__(self):
    _require_choice("plan.mode", self.mode, ("train", "prefill"))


def check_layers(model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig) -> None:
  """Raises ValueError if a layer index does not exist or is named twice, or a mixer is in no layer."""
  for name, layers in (
    ("ttt.layers", ttt.layers),
    ("attention.full_layers", attention.full_layers),
    ("attention.mixer_layers", attention.mixer_layers or ()),
  ):
    for layer in layers:
      _require(
        0 <= layer < model.num_layers,
        f"{name}={list(layers)} names layer {layer}, but model.num_layers={model.num_layers}: "
        f"use 0 to {model.num_layers - 1}",
      )
    _require(len(set(layers)) == len(layers), f"{name}={list(layers)} names a layer twice")
  _require(
    attention.mixer in map(attention.mixer_of, range(model.num_layers))
    or attention.mixer == "attention",
    f"attention.mixer={attention.mixer!r} is in no layer: name some in attention.mixer_layers, or leave "
    "attention.mixer out",
  )


def check_trainable(ttt: TTTConfig, train: TrainConfig) -> None:
  """Raises ValueError if nothing would train."""
  _require(
    train.trainable == "all" or len(ttt.layers) > 0,
    f"train.trainable={train.trainable!r} trains the TTT layers, but ttt.layers=[] names none",
  )


def check_mesh(model: ModelConfig, mesh: MeshConfig) -> None:
  """Raises ValueError if an axis does not divide what it splits."""
  for axis, names in (
    ("tensor", ("num_heads", "num_kv_heads", "d_ff", "vocab_size")),
    ("fsdp", ("d_model",)),
  ):
    parts = getattr(mesh, axis)
    for name in names:
      size = getattr(model, name)
      _require(
        parts == -1 or size % parts == 0,
        f"mesh.{axis}={parts} does not divide model.{name}={size}: choose a divisor, and use another "
        "axis of the mesh for the rest",
      )


def check_mixer(attention: AttentionConfig, mesh: MeshConfig) -> None:
  """Raises ValueError if a mixer would need a state of another shard of the sequence."""
  _require(
    attention.mixer == "attention" or mesh.context in (1, -1),  # -1: checked when it is known
    f"attention.mixer={attention.mixer!r} with mesh.context={mesh.context}: its state is not exchanged "
    "between shards of the sequence; set mesh.context=1 and use mesh.data, mesh.fsdp or mesh.tensor",
  )


def check_rows(name: str, seq_len: int, context: int, ttt: TTTConfig) -> None:
  """Raises ValueError unless `context` shards of whole chunks make up a row of `seq_len` tokens."""
  if context == -1:
    return  # checked when it is known
  _require(
    seq_len % context == 0,
    f"mesh.context={context} does not divide {name}={seq_len}: the row is cut into equal shards",
  )
  if ttt.layers:
    unit = context * ttt.chunk_size
    _require(
      seq_len % unit == 0,
      f"{name}={seq_len} is not a multiple of mesh.context * ttt.chunk_size = "
      f"{context} * {ttt.chunk_size} = {unit}: shards hold whole chunks; "
      f"use {name}={max(1, round(seq_len / unit)) * unit} or another chunk size",
    )


@dataclass(frozen=True)
class Config:
  """Everything a run needs; `ttt-jax train FILE` reads one."""

  name: str = "run"
  run_dir: str | None = None  # None: runs/NAME
  # A model to start from: whatever `ttt_jax.load_pretrained` reads. The sections model and attention
  # are then the checkpoint's (`ttt_jax.initial`) but for dtypes, remat and how things are computed.
  init_from: str | None = None
  seed: int = 0
  runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  model: ModelConfig = field(default_factory=ModelConfig)
  attention: AttentionConfig = field(default_factory=AttentionConfig)
  ttt: TTTConfig = field(default_factory=TTTConfig)
  data: DataConfig = field(default_factory=DataConfig)
  train: TrainConfig = field(default_factory=TrainConfig)
  checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
  eval: EvalConfig = field(default_factory=EvalConfig)
  plan: PlanConfig = field(default_factory=PlanConfig)

  def __post_init__(self):
    if self.init_from is None:  # else `ttt_jax.initial.resolve` has the model to check against
      check_layers(self.model, self.attention, self.ttt)
      check_trainable(self.ttt, self.train)
      check_mesh(self.model, self.mesh)
    check_mixer(self.attention, self.mesh)
    check_rows("data.seq_len", self.data.seq_len, self.mesh.context, self.ttt)
    check_rows("eval.seq_len", self.eval_seq_len, self.mesh.context, self.ttt)
    rows = max(1, self.mesh.data) * max(1, self.mesh.fsdp) * self.train.accumulate
    _require(
      self.train.batch_size % rows == 0,
      f"train.batch_size={self.train.batch_size} is not a multiple of mesh.data * mesh.fsdp * "
      f"train.accumulate = {rows}",
    )
    if self.attention.window is not None and self.init_from is None:
      _require(
        self.attention.window <= self.data.seq_len,
        f"attention.window={self.attention.window} is larger than data.seq_len="
        f"{self.data.seq_len}: use a smaller window, or none for full attention",
      )
    _require(
      not (self.eval.baseline and self.train.trainable != "all"),
      f"eval.baseline=true trains a twin without TTT, in which train.trainable="
      f"{self.train.trainable!r} names nothing: leave it false; where train.trainable is 'ttt', the "
      "model with its updates off is the one without TTT",
    )
    _require(
      self.eval_seq_len >= self.eval.buckets,
      f"eval.buckets={self.eval.buckets} is more than eval.seq_len={self.eval_seq_len}",
    )

  @property
  def eval_seq_len(self) -> int:
    return self.data.seq_len if self.eval.seq_len is None else self.eval.seq_len

  @property
  def tokenizer(self) -> str | None:
    """Where the tokenizer is; None for bytes."""
    path = self.init_from if self.data.tokenizer is None else self.data.tokenizer
    return None if path == "bytes" else path

  @property
  def resolved_run_dir(self) -> str:
    return f"runs/{self.name}" if self.run_dir is None else self.run_dir

  def without_ttt(self) -> "Config":
    """The twin without fast weights, everything else equal."""
    return dataclasses.replace(self, ttt=dataclasses.replace(self.ttt, layers=()))
