"""Defines the config sections of the model: sizes, rotary positions and token mixers."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ttt_jax.config.checks import (
  DTYPES,
  default_of,
  require,
  require_choice,
  require_defaults,
  require_positive,
)
from ttt_jax.config.given import given_fields, section
from ttt_jax.names import ATTENTION_IMPLEMENTATIONS

# Fields of `RopeScaling` beside the factor, by kind.
_OF_KIND = {
  "linear": (),
  "llama3": ("original_max_positions", "low_freq_factor", "high_freq_factor"),
  "yarn": (
    "original_max_positions",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
  ),
}
REMAT = ("none", "layer", "minimal")
MIXERS = ("attention", "gla", "delta_net")


@section()
@dataclass(frozen=True)
class RopeScaling:
  """Stretches rotary frequencies so that a model reads beyond its trained length (`ttt_jax.nn.rope`).

  Kinds, fields and defaults are those of `rope_scaling` in `transformers`.
  """

  kind: str = "linear"
  """Formula that stretches the frequencies: "linear", "llama3" or "yarn"."""
  factor: float = 1.0
  """Ratio of the new length to the trained length."""
  original_max_positions: int | None = None
  """With "llama3" and "yarn", which need it, the trained length in tokens."""
  low_freq_factor: float = 1.0
  """With "llama3", wavelengths above trained length / low_freq_factor are stretched by factor."""
  high_freq_factor: float = 4.0
  """With "llama3", wavelengths below trained length / high_freq_factor do not change."""
  beta_fast: float = 32.0
  """With "yarn", channels that make more than beta_fast turns in the trained length do not change."""
  beta_slow: float = 1.0
  """With "yarn", channels that make fewer than beta_slow turns are stretched by factor."""
  attention_factor: float | None = None
  """With "yarn", the factor of cos and sin; None computes it from factor and mscale."""
  mscale: float | None = None
  """With "yarn", the weight of log(factor) in the attention factor; None means 1."""
  mscale_all_dim: float | None = None
  """With "yarn", the weight of log(factor) in a denominator of the attention factor, as in DeepSeek;
  None means no denominator.
  """
  truncate: bool = True
  """With "yarn", whether the ramp between unchanged and stretched channels begins and ends at whole
  channel numbers.
  """

  def check(self, given: Collection[str] | None = None) -> None:
    """Raises UserError for a field out of range, or without effect on the kind.

    Args:
      given: the fields that are known, where the others may come from a checkpoint; None: all.
    """
    section = "model.rope_scaling"
    require_choice(f"{section}.kind", self.kind, ("linear", "llama3", "yarn"))
    require_positive(
      section, self, "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"
    )
    if self.attention_factor is not None:
      require_positive(section, self, "attention_factor")
    length = self.original_max_positions
    require(
      length is None or length > 0, f"{section}.original_max_positions={length} must be positive"
    )
    if given is not None and "kind" not in given:
      return
    require_defaults(section, self, _not_of_kind(self.kind), f"{section}.kind={self.kind!r}")
    if given is None:
      require(
        self.kind == "linear" or length is not None,
        f"{section}.original_max_positions={length}: {section}.kind={self.kind!r} needs the trained "
        "length in tokens",
      )
    if self.kind == "llama3":
      require(
        self.high_freq_factor > self.low_freq_factor,
        f"{section}.high_freq_factor={self.high_freq_factor} must be above "
        f"{section}.low_freq_factor={self.low_freq_factor}",
      )

  @staticmethod
  def ended_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that have no effect once the given ones override others, with their defaults."""
    names = _not_of_kind(given["kind"]) if given.get("kind") in _OF_KIND else ()
    return {name: default_of(RopeScaling, name) for name in names}


def _not_of_kind(kind: str) -> tuple[str, ...]:
  """Returns the fields of `RopeScaling` that have no effect on a kind."""
  names = dict.fromkeys(name for fields in _OF_KIND.values() for name in fields)
  return tuple(name for name in names if name not in _OF_KIND[kind])


@section("model")
@dataclass(frozen=True)
class ModelConfig:
  """Sets the sizes and dtypes of a decoder of the Llama / Qwen3 kind."""

  vocab_size: int = 256
  """Number of tokens V in the vocabulary; 256 for bytes."""
  num_layers: int = 4
  """Number of decoder layers, each with attention and a gated MLP."""
  d_model: int = 96
  """Width D of the residual stream."""
  d_ff: int = 288
  """Hidden width F of the gated MLPs."""
  num_heads: int = 4
  """Number of query heads H."""
  num_kv_heads: int = 4
  """Number of key and value heads; it divides num_heads (grouped-query attention)."""
  head_dim: int | None = None
  """Channels K per head; None means d_model // num_heads."""
  rope_theta: float = 10000.0
  """Base of the rotary frequencies."""
  rope_scaling: RopeScaling | None = None
  """Stretching of the rotary frequencies beyond the trained length; None leaves them unchanged."""
  max_positions: int | None = None
  """Trained length in tokens; longer rows cause a warning."""
  norm_eps: float = 1e-6
  """Epsilon added to the mean square in RMSNorm."""
  qk_norm: bool = False
  """Whether every query and key head is RMS-normalised, as in Qwen3."""
  attention_bias: str | None = None
  """Attention projections with a bias: "qkv" as in Qwen2, "qkvo" for the output projection too, or
  None.
  """
  tie_embeddings: bool = True
  """Whether the output head shares the table of the token embedding."""
  bos_id: int | None = None
  """Id of the token that begins a text; None means no such token."""
  eos_ids: tuple[int, ...] = ()
  """Ids of the tokens that end a text; generation stops at any of them."""
  param_dtype: str = "float32"
  """Dtype of the parameters; a model of init_from or a run has its own where none is given."""
  dtype: str = "float32"
  """Dtype of the computation; a model of init_from or a run has its own where none is given."""
  state_dtype: str = "float32"
  """Dtype of the fast-weight states and their prefix sums."""
  remat: str = "layer"
  """Rematerialisation, which trades time for memory: in the backward pass "layer" recomputes all but
  each layer's input, "minimal" all but the results of the projections, "none" nothing.
  """

  def __post_init__(self):
    require_positive(
      "model", self, "vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads"
    )
    require_positive("model", self, "rope_theta", "norm_eps")
    if self.rope_scaling is not None:
      self.rope_scaling.check(given_fields(self.rope_scaling))
    if self.max_positions is not None:
      require_positive("model", self, "max_positions")
    require_choice("model.attention_bias", self.attention_bias, (None, "qkv", "qkvo"))
    for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
      require(
        0 <= token < self.vocab_size,
        f"model.bos_id={self.bos_id}, model.eos_ids={list(self.eos_ids)}: token {token} is outside of "
        f"model.vocab_size={self.vocab_size}",
      )
    for name in ("param_dtype", "dtype", "state_dtype"):
      require_choice(f"model.{name}", getattr(self, name), DTYPES)
    require_choice("model.remat", self.remat, REMAT)
    require(
      self.num_heads % self.num_kv_heads == 0,
      f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
    )
    if self.head_dim is None:
      require(
        self.d_model % self.num_heads == 0,
        f"model.num_heads={self.num_heads} does not divide model.d_model={self.d_model}: "
        "give model.head_dim",
      )
    require(
      self.head_size > 0 and self.head_size % 2 == 0,
      f"model.head_dim={self.head_size} must be even and positive (rotary embedding pairs channels)",
    )

  @property
  def head_size(self) -> int:
    """Returns the channels per head: head_dim, or d_model // num_heads."""
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim


@section("attention")
@dataclass(frozen=True)
class AttentionConfig:
  """Sets how layers mix tokens: attention to the last `window` or all earlier tokens, or a baseline."""

  window: int | None = None
  """Number of tokens that a token attends to, itself included; None means full attention everywhere."""
  full_layers: tuple[int, ...] = ()
  """Layers that keep full attention when window or mixer is set, counted from 0."""
  implementation: str | None = None
  """Attention kernel: "xla" (any device), "splash" (TPU) or "cudnn" (GPU); None takes the best kernel
  that supports the call.
  """
  balance: bool | None = None
  """Whether full attention over several context shards swaps half of each shard's queries with its
  mirror shard, so that all devices have equal work; None means true, false saves two exchanges.
  """
  mixer: str = "attention"
  """Token mixer in mixer_layers: "attention", or a baseline with a state of fixed size and as many
  parameters: "gla" (gated linear attention) or "delta_net" (the delta rule). A baseline sees the
  whole document and has no window.
  """
  mixer_layers: tuple[int, ...] | None = None
  """Layers that use the baseline mixer; None means all but full_layers."""
  short_conv: int | None = None
  """Width in tokens of the short convolution on a baseline's queries, keys and values; 1 means no
  convolution, None the published width (4 in delta_net, 1 in gla).
  """

  def __post_init__(self):
    if self.window is not None:
      require_positive("attention", self, "window")
    require_choice("attention.mixer", self.mixer, MIXERS)
    if self.short_conv is not None:
      require_positive("attention", self, "short_conv")
      require(
        self.mixer != "attention",
        f"attention.short_conv={self.short_conv} needs attention.mixer 'gla' or 'delta_net', but "
        "attention.mixer is 'attention': change the mixer, or leave attention.short_conv out",
      )
    if self.mixer_layers is not None:
      require(
        self.mixer != "attention",
        f"attention.mixer_layers={list(self.mixer_layers)} needs a baseline: set attention.mixer to "
        "'gla' or 'delta_net', or leave attention.mixer_layers out",
      )
      both = sorted(set(self.mixer_layers) & set(self.full_layers))
      require(
        not both,
        f"attention.mixer_layers={list(self.mixer_layers)} and attention.full_layers="
        f"{list(self.full_layers)} both name {both}: a layer has either {self.mixer!r} or full "
        "attention; remove it from one list",
      )
    require_choice(
      "attention.implementation", self.implementation, (None, *ATTENTION_IMPLEMENTATIONS)
    )

  def mixer_of(self, layer: int) -> str:
    """Returns the token mixer of a layer, one of `MIXERS`."""
    if self.mixer_layers is None:
      return "attention" if layer in self.full_layers else self.mixer
    return self.mixer if layer in self.mixer_layers else "attention"
