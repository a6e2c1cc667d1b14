"""Defines the config sections of data, training, checkpoints and evaluation."""

from dataclasses import dataclass

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive
from ttt_jax.config.given import section

TRAINABLE = ("all", "ttt", "ttt+down", "ttt+above")
WRITERS = ("tensorboard", "wandb")
VERIFY = ("sizes", "checksums")


@section()
@dataclass(frozen=True)
class WeightedSource:
  """Names one source of a mixture and its weight."""

  path: str | None
  """Path of the source, as in data.path."""
  weight: float = 1.0
  """Share of the tokens, relative to the weights of the other sources; 0 leaves the source out."""


@section()
@dataclass(frozen=True)
class AttendBlocks:
  """Lets attention start again within a row while fast weights carry on."""

  block: tuple[int, int]
  """Least and largest number of tokens after which attention starts again, both whole chunks; the seed
  draws each number.
  """


@section("data")
@dataclass(frozen=True)
class DataConfig:
  """Sets the sources of text, packed into rows of `seq_len` tokens of one or more documents."""

  path: str | None = None
  """Source of text: a directory that `ttt-jax data prepare` made, or a directory or glob of files that
  every process loads into memory: .txt, .md, .py, .jsonl and .json, each also with .gz, .zst, .bz2
  or .xz, and .parquet and .array_record. Hidden files are left out. None means the sources of the
  Python standard library.
  """
  mixture: tuple[WeightedSource, ...] = ()
  """Several sources in place of path, as [{path: a, weight: 0.7}, {path: b, weight: 0.3}]."""
  text_field: str | None = None
  """Field that holds the text in JSON, parquet and JSON in ArrayRecord files; `meta.text` names the
  field `text` inside the field `meta`. None means "text", and in a prepared corpus the field that
  it was prepared from.
  """
  tokenizer: str | None = None
  """Path or hub name of a tokenizer for ttt_jax.load_tokenizer, or "bytes"; None means the tokenizer
  of init_from, or bytes without init_from.
  """
  end_of_text: bool | None = None
  """Whether every document ends with the tokenizer's end-of-text token, which teaches a model to
  stop. None follows a prepared corpus; for other text it means true if the tokenizer has such a
  token (bytes have none). False adds no token to those that the tokenizer itself puts around a text.
  """
  start_of_text: bool | None = None
  """Whether every document begins with the tokenizer's start-of-text token. None follows a prepared
  corpus; other text begins as the tokenizer itself begins a text.
  """
  seq_len: int = 4096
  """Tokens T per row."""
  heldout_fraction: float = 0.05
  """Fraction of the documents that is held out, chosen by a hash of the document's path."""
  align_documents: bool = False
  """Whether rows are padded so that every document begins at the start of a chunk, so that no chunk
  holds tokens of two documents.
  """
  attend: AttendBlocks | str = "document"
  """What attention sees of a row: "document", all of a document, or {block: [a, b]}: it starts again
  after a to b tokens, whole chunks, while fast weights carry on to the document's end. What came
  before a cut is then known to the fast weights alone.
  """
  attend_fraction: float = 1.0
  """Share of the rows that attend cuts into blocks; in the others attention sees whole documents."""
  max_bad_records: int = 0
  """Largest number of corrupt records to skip, over parquet, ArrayRecord and prepared files."""

  @property
  def attend_blocks(self) -> AttendBlocks | None:
    """Returns the blocks of `attend`; None where attention sees whole documents."""
    return None if isinstance(self.attend, str) else self.attend

  @property
  def sources(self) -> tuple[tuple[str, str | None, float], ...]:
    """Returns (field, path, weight) of every source with a weight above 0."""
    if not self.mixture:
      return (("data.path", self.path, 1.0),)
    return tuple(
      (f"data.mixture[{i}].path", source.path, source.weight)
      for i, source in enumerate(self.mixture)
      if source.weight > 0
    )

  def __post_init__(self):
    require_positive("data", self, "seq_len")
    if isinstance(self.attend, str):
      require(
        self.attend == "document",
        f"data.attend={self.attend!r} is neither 'document' nor {{block: [a, b]}}",
      )
      require(
        self.attend_fraction == 1,
        f"data.attend_fraction={self.attend_fraction} is the share of rows that data.attend cuts into "
        "blocks, but data.attend='document' cuts none: give data.attend={block: [a, b]} too",
      )
    else:
      low, high = self.attend.block
      require(
        0 < low <= high,
        f"data.attend.block={[low, high]} must be [a, b] with 0 < a <= b",
      )
    require(
      0 < self.attend_fraction <= 1,
      f"data.attend_fraction={self.attend_fraction} must be above 0 and at most 1: leave data.attend "
      "out to cut no row",
    )
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
        source.weight >= 0,
        f"data.mixture[{i}].weight={source.weight} must be at least 0",
      )
    require(
      len(self.sources) > 0,
      "data.mixture has no weight above 0: give each source to use one",
    )
    require(
      0 < self.heldout_fraction < 1,
      f"data.heldout_fraction={self.heldout_fraction} must lie between 0 and 1",
    )


@section("train")
@dataclass(frozen=True)
class TrainConfig:
  """Trains with AdamW, linear warm-up and cosine decay to `learning_rate * final_lr_ratio`."""

  trainable: str = "all"
  """Parameters to train: "all"; "ttt", what the TTT layers have more than others: the convolution and
  projection of the target, rate, half-life, scale and gate; "ttt+down", which adds their down
  projections; or "ttt+above", all of the first TTT layer and of the layers above it, with the last
  norm (layers that share stacked arrays with one below stay frozen). Other parameters are frozen,
  have no optimiser state, and no backward pass runs below the first TTT layer.
  """
  steps: int = 400
  """Number of optimiser steps of the run."""
  batch_size: int = 1
  """Rows B per step, over all devices."""
  learning_rate: float = 4e-3
  """Peak learning rate, reached after warm-up."""
  final_lr_ratio: float = 0.1
  """Final learning rate as a fraction of the peak."""
  warmup_steps: int = 20
  """Number of steps over which the learning rate rises from 0 to its peak."""
  weight_decay: float = 0.1
  """Decoupled weight decay; norms, convolutions and inner rates are not decayed."""
  beta1: float = 0.9
  """AdamW's decay of the first moment."""
  beta2: float = 0.95
  """AdamW's decay of the second moment."""
  clip_grad_norm: float | None = 1.0
  """Largest global norm of the gradient; a larger gradient is rescaled to it. None means no limit."""
  accumulate: int = 1
  """Number of microbatches per step, whose gradients are accumulated; the result is the same."""
  z_loss: float = 0.0
  """Weight of the z-loss, mean(logsumexp(logits)^2), added to the loss."""
  master_dtype: str = "float32"
  """Dtype of the optimiser's master copy of the parameters, kept if model.param_dtype is narrower and
  rounded to model.param_dtype after every step.
  """
  max_bad_steps: int = 10
  """Largest number of successive steps whose loss or gradient is not finite: such a step is skipped,
  and one step more stops the run.
  """
  log_every: int = 10
  """Number of steps between two records in metrics.jsonl."""
  writers: tuple[str, ...] = ()
  """Further outputs of the records: "tensorboard", "wandb"."""
  profile: tuple[int, int] | None = None
  """First and last step that jax.profiler traces, as [10, 12]; None means no trace."""

  def __post_init__(self):
    require_positive("train", self, "steps", "batch_size", "learning_rate", "log_every")
    require_positive("train", self, "accumulate", "max_bad_steps")
    if self.clip_grad_norm is not None:
      require_positive("train", self, "clip_grad_norm")
    require_choice("train.master_dtype", self.master_dtype, DTYPES)
    for writer in self.writers:
      require_choice("train.writers", writer, WRITERS)
    if self.profile is not None:
      first, last = self.profile
      require(
        1 <= first <= last,
        f"train.profile={list(self.profile)} must be [first, last] with 1 <= first <= last",
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


@section("checkpoint")
@dataclass(frozen=True)
class CheckpointConfig:
  """Sets when checkpoints are saved, which are kept, and how a restore verifies them."""

  every: int = 100
  """Number of steps between two checkpoints."""
  keep: int = 2
  """Number of newest checkpoints to keep."""
  keep_every: int | None = None
  """Checkpoints at multiples of this number of steps are never deleted; None means no such checkpoints."""
  verify: str = "sizes"
  """Comparison before a restore: "sizes" finds files that are missing or cut short, and bits that
  changed in files of up to 64 KiB; "checksums" also finds bits that changed in larger files. For
  checksums each process loads the files that it wrote again after every save, and its share of all
  files before a restore.
  """

  def __post_init__(self):
    require_positive("checkpoint", self, "every", "keep")
    require_choice("checkpoint.verify", self.verify, VERIFY)
    if self.keep_every is not None:
      require_positive("checkpoint", self, "keep_every")
      require(
        self.keep_every % self.every == 0,
        f"checkpoint.keep_every={self.keep_every} must be a multiple of checkpoint.every={self.every}",
      )


@section("eval")
@dataclass(frozen=True)
class EvalConfig:
  """Measures the loss by position on held-out documents of at least `seq_len` tokens."""

  baseline: bool = False
  """Whether a twin without fast weights is trained on the same batches for comparison."""
  before: bool = False
  """Whether the model before the first step is evaluated too."""
  every: int | None = None
  """Number of steps between two held-out losses during training (`heldout_loss` in metrics.jsonl);
  None means none.
  """
  seq_len: int | None = None
  """Tokens per held-out row, which may be longer than a training row; None means data.seq_len."""
  documents: int = 32
  """Largest number of held-out documents to evaluate."""
  buckets: int = 8
  """Number of equal parts of a row that each have a loss of their own."""
  prompt_tokens: int = 512
  """Length in tokens of the prompt, from a held-out document, that the sample of text continues."""
  sample_tokens: int = 200
  """Largest number of tokens that the sample adds."""
  temperature: float = 0.7
  """Temperature of the sample; 0 takes the most likely token."""

  def __post_init__(self):
    for name in ("seq_len", "every"):
      if getattr(self, name) is not None:
        require_positive("eval", self, name)
    require_positive("eval", self, "documents", "buckets", "prompt_tokens", "sample_tokens")
    require(self.temperature >= 0, f"eval.temperature={self.temperature} must not be negative")
