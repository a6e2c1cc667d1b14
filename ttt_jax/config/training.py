"""What is read, how it is trained, kept and evaluated."""

import math
from dataclasses import dataclass

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive
from ttt_jax.config.given import records_given

TRAINABLE = ("all", "ttt", "ttt+down")
WRITERS = ("tensorboard", "wandb")


@records_given
@dataclass(frozen=True)
class WeightedSource:
  """One of several sources of text."""

  path: str | None
  """What data.path can be."""
  weight: float = 1.0
  """Its part of the tokens, against the weights of the other sources; 0 leaves it out."""


@records_given
@dataclass(frozen=True)
class DataConfig:
  """Where the text comes from. Every row holds `seq_len` tokens of one or more documents."""

  path: str | None = None
  """A directory that `ttt-jax data prepare` made; or a directory or glob of .txt, .md, .py and
  .jsonl files, each also .gz, and of .parquet and .array_record files, which every process
  reads into memory. None is the Python standard library's own sources.
  """
  mixture: tuple[WeightedSource, ...] = ()
  """Several sources, instead of path."""
  text_field: str = "text"
  """The field with the text in .jsonl, parquet and JSON in ArrayRecord files."""
  tokenizer: str | None = None
  """Where `ttt_jax.load_tokenizer` finds one, or "bytes". None is the one of init_from, else
  bytes.
  """
  seq_len: int = 4096
  """Tokens per row."""
  heldout_fraction: float = 0.05
  """Part of the documents that is kept for evaluation, chosen by a hash of their path."""
  align_documents: bool = False
  """Whether rows are padded so that every document begins with a chunk of its own: none then
  shares a chunk with the end of another one.
  """
  max_bad_records: int = 0
  """How many corrupt records of parquet, ArrayRecord and prepared files are left out before
  reading them is an error.
  """

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


@records_given
@dataclass(frozen=True)
class TrainConfig:
  """AdamW with warm-up and cosine decay to `learning_rate * final_lr_ratio`."""

  trainable: str = "all"
  """Which parameters train: "all"; "ttt", the convolution, projection and inner rate of the TTT
  layers; or "ttt+down", also their down projections. The others stay as they are and take no
  optimiser state.
  """
  steps: int = 400
  """Optimiser steps."""
  batch_size: int = 1
  """Rows per step, over all devices."""
  learning_rate: float = 4e-3
  """Peak learning rate, after the warm-up."""
  final_lr_ratio: float = 0.1
  """What is left of the learning rate at the last step, as a part of its peak."""
  warmup_steps: int = 20
  """Steps over which the learning rate rises from 0."""
  weight_decay: float = 0.1
  """Weight decay of AdamW; norms, convolutions, inner rates, half-lives and biases have none."""
  beta1: float = 0.9
  """Decay of AdamW's first moment."""
  beta2: float = 0.95
  """Decay of AdamW's second moment."""
  clip_grad_norm: float = 1.0
  """Norm to which the gradient is rescaled where it is larger."""
  accumulate: int = 1
  """Parts into which the rows of a step are cut, read one after another: the same gradient, less
  memory.
  """
  z_loss: float = 0.0
  """Weight of the mean of logsumexp(logits)^2, added to the loss."""
  master_dtype: str = "float32"
  """Dtype of the copy of the parameters that the optimiser updates where model.param_dtype is
  narrower; the model's are rounded from it after every step.
  """
  max_bad_steps: int = 10
  """Steps in a row without a finite loss or gradient, which change nothing, before the run ends
  with an error.
  """
  log_every: int = 10
  """Steps from one line of metrics.jsonl to the next."""
  writers: tuple[str, ...] = ()
  """Where metrics go besides metrics.jsonl: "tensorboard", "wandb"."""
  profile: tuple[int, int] | None = None
  """First and last step of a trace for `jax.profiler`; None makes no trace."""

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


@records_given
@dataclass(frozen=True)
class CheckpointConfig:
  """When a run is saved, and which checkpoints are kept."""

  every: int = 100
  """Steps from one checkpoint to the next."""
  keep: int = 2
  """How many of the newest checkpoints are kept."""
  keep_every: int | None = None
  """Checkpoints of every so many steps are kept for ever; None keeps none beyond the newest."""

  def __post_init__(self):
    require_positive("checkpoint", self, "every", "keep")
    if self.keep_every is not None:
      require_positive("checkpoint", self, "keep_every")
      require(
        self.keep_every % self.every == 0,
        f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}",
      )


@records_given
@dataclass(frozen=True)
class EvalConfig:
  """Loss by position on held-out documents of at least `seq_len` tokens."""

  baseline: bool = False
  """Whether a twin without fast weights is trained on the same batches, to compare with."""
  before: bool = False
  """Whether the model is also evaluated as it was before the first step."""
  seq_len: int | None = None
  """Tokens per held-out document, which may be more than the rows trained on have; None is
  data.seq_len.
  """
  documents: int = 32
  """Held-out documents, at most."""
  buckets: int = 8
  """Parts of a document that the loss is reported for."""
  prompt_tokens: int = 512
  """Tokens of a held-out document that the sample text continues."""
  sample_tokens: int = 200
  """Tokens of the sample text."""
  temperature: float = 0.7
  """Temperature of the sample text; 0 takes the likeliest token."""

  def __post_init__(self):
    if self.seq_len is not None:
      require_positive("eval", self, "seq_len")
    require_positive("eval", self, "documents", "buckets", "prompt_tokens", "sample_tokens")
    require(self.temperature >= 0, f"eval.temperature={self.temperature} must not be negative")
