"""What is read, how it is trained, kept and evaluated."""

import math
from dataclasses import dataclass

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive

TRAINABLE = ("all", "ttt", "ttt+down")
WRITERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class WeightedSource:
  """One of several sources of text."""

  path: str | None  # as data.path
  weight: float = 1.0  # its part of the tokens, against the weights of the others; 0 leaves it out


@dataclass(frozen=True)
class DataConfig:
  """Where the text comes from. Every row holds `seq_len` tokens of one or more documents."""

  # A directory that `ttt-jax data prepare` made; or a directory or glob of .txt, .md, .py, .jsonl and .json
  # files, each also .gz, .zst, .bz2 or .xz, of .parquet and .array_record files, which every process
  # reads into memory. Hidden files are left out. None: the Python standard library's own sources.
  path: str | None = None
  mixture: tuple[WeightedSource, ...] = ()  # several sources, instead of `path`
  # The field of JSON records, or the column of parquet, that is read; `meta.text` is `text` in `meta`.
  text_field: str = "text"
  # Where `ttt_jax.load_tokenizer` finds one, or "bytes". None: the one of `init_from`, else bytes.
  tokenizer: str | None = None
  # Whether every document ends with the tokenizer's end-of-text token, which teaches a model to stop. None:
  # as a prepared corpus has it, else where the tokenizer has such a token; bytes have none. False: none is
  # added to what the tokenizer itself makes.
  end_of_text: bool | None = None
  # Whether every document begins with the tokenizer's start-of-text token. None: as a prepared corpus has
  # it, else as the tokenizer itself begins a text.
  start_of_text: bool | None = None
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
    require_positive("data", self, "seq_len")
    require(
      self.max_bad_records >= 0,
      f"data.max_bad_records={self.max_bad_records} must not be negative",
    )
    require(
      not (self.mixture and self.path is not None),
      f"data.path={self.path!r} and data.mixture exclude each other: name the path in the mixture, or "
      "leave one out",
    )
    for i, source in enumerate(self.mixture):
      require(
        source.weight >= 0 and math.isfinite(source.weight),
        f"data.mixture[{i}].weight={source.weight} must be a number from 0 on",
      )
    require(
      len(self.sources) > 0,
      "data.mixture has no weight above 0: give one to each source that is to be read",
    )
    require(
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
    require_positive(
      "train", self, "steps", "batch_size", "learning_rate", "clip_grad_norm", "log_every"
    )
    require_positive("train", self, "accumulate", "max_bad_steps")
    require_choice("train.master_dtype", self.master_dtype, DTYPES)
    for writer in self.writers:
      require_choice("train.writers", writer, WRITERS)
    if self.profile is not None:
      first, last = self.profile
      require(
        1 <= first <= last,
        f"train.profile={list(self.profile)} must be the first and the last step, from 1 on",
      )
    require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative")
    require_choice("train.trainable", self.trainable, TRAINABLE)
    require(self.warmup_steps >= 0, f"train.warmup_steps={self.warmup_steps} must not be negative")
    require(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay} must not be negative")
    for name in ("beta1", "beta2"):
      value = getattr(self, name)
      require(0 <= value < 1, f"train.{name}={value} must be in [0, 1)")
    require(
      0 <= self.final_lr_ratio <= 1,
      f"train.final_lr_ratio={self.final_lr_ratio} must be in [0, 1]",
    )
    require(
      self.warmup_steps < self.steps,
      f"train.warmup_steps={self.warmup_steps} must be below train.steps={self.steps}",
    )


@dataclass(frozen=True)
class CheckpointConfig:
  every: int = 100  # steps
  keep: int = 2  # the newest ones
  keep_every: int | None = None  # also those of every so many steps, for ever

  def __post_init__(self):
    require_positive("checkpoint", self, "every", "keep")
    if self.keep_every is not None:
      require_positive("checkpoint", self, "keep_every")
      require(
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
      require_positive("eval", self, "seq_len")
    require_positive("eval", self, "documents", "buckets", "prompt_tokens", "sample_tokens")
    require(self.temperature >= 0, f"eval.temperature={self.temperature} must not be negative")
