"""Defines the config sections of the model: sizes, token mixers, and the fast weights of its MLPs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive
from ttt_jax.config.given import given_fields, section
from ttt_jax.names import ATTENTION_IMPLEMENTATIONS, COLLECTIVES, IMPLEMENTATIONS, RULES

# Fields of `TTTConfig` that belong to one rule only.
_OF_RULE = {
  "sum": ("inner_lr", "inner_lr_scale", "learn_inner_lr", "clip_norm", "merge"),
  "least_squares": (
    "ridge",
    "read_scale",
    "learn_read_scale",
    "read_gate",
    "gate_threshold",
    "gate_sharpness",
    "learn_gate",
    "key_rank",
  ),
}
_OF_GATE = ("gate_threshold", "gate_sharpness", "learn_gate")  # without a gate they mean nothing
# Fields of `RopeScaling` that belong to one kind only.
_OF_KIND = {
  "llama3": ("low_freq_factor", "high_freq_factor"),
  "yarn": (
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
  """Trained length in tokens; "llama3" and "yarn" need it."""
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
    for kind, names in _OF_KIND.items():
      if kind != self.kind:
        _require_defaults(section, self, names, f"{section}.kind={self.kind!r}")
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
  """Dtype of the parameters."""
  dtype: str = "float32"
  """Dtype of the computation."""
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


@section("ttt")
@dataclass(frozen=True)
class TTTConfig:
  """Sets which MLPs have fast weights, and how these learn (docs of `ttt_jax.inplace_ttt`)."""

  layers: tuple[int, ...] = ()
  """Layers whose down projection is a fast weight, counted from 0; empty means no fast weights."""
  chunk_size: int = 512
  """Tokens C per chunk; a chunk reads one fast weight, then updates it."""
  target: str = "input_embed"
  """Source of the target: "input_embed", the token embeddings (for training from scratch), or
  "hidden_states", the input of the MLP (for pretrained models).
  """
  normalize_target: bool = True
  """Whether the source of the target is RMS-normalised over the model width."""
  conv_width: int = 5
  """Width of the target's centred convolution, odd; it sees (conv_width - 1) / 2 tokens ahead."""
  projection: bool = True
  """Whether a learned projection [D, D] follows the target's convolution."""
  init: str | None = None
  """Initial convolution and projection of the target. "next_token": convolution 1 at t+1, projection
  the identity; fast weights act from the first step. "identity": convolution 0, projection the
  identity; the model starts exactly as without fast weights. "current_token": convolution 1 at t,
  which reconstructs the token itself. None means "next_token" in a new model, "identity" in a
  pretrained one.
  """
  inner_lr: float = 0.05
  """Inner rate: the step size of an update."""
  inner_lr_scale: str = "1/F"
  """Scale of the inner rate: "1/F" divides inner_lr by d_ff, "fixed" uses inner_lr unchanged."""
  learn_inner_lr: bool = True
  """Whether each layer multiplies the inner rate by exp(10 s), where s is learned and starts at 0."""
  decay: float | None = None
  """Factor of the state per chunk, in (0, 1]; None means 1, the paper's plain sum."""
  half_life: float | None = None
  """Half-life of an update in tokens, in place of decay: the decay is 2^(-chunk_size / half_life), so
  forgetting per token does not depend on chunk_size.
  """
  learn_half_life: bool = False
  """Whether each layer multiplies half_life by exp(10 s), where s is learned and starts at 0.
  Recommended for training from scratch, with half_life 400.
  """
  clip_norm: float | None = None
  """Largest Frobenius norm of one chunk's update; a larger update is rescaled to it. None means no
  limit.
  """
  implementation: str | None = None
  """Algorithm over chunks: "sequential", "dual" or "associative"; None lets the cost model choose."""
  merge: bool | None = None
  """Whether a chunk reads in one product Z (W + S), with W + S rounded to model.dtype, in place of
  Z W + Z S; None merges only where the rounding loses nothing.
  """
  collective: str | None = None
  """Algorithm of the exchange between context shards: "all_gather", "doubling", "all_to_all" or
  "ring"; None lets the cost model choose.
  """
  wire_dtype: str | None = None
  """Dtype to which states are rounded for the exchange; None sends them unrounded."""
  rule: str = "sum"
  """What a chunk reads of the chunks before it: "sum", the paper's sum of updates, or "least_squares", a
  ridge regression of their targets on their activations, which tells similar activations apart. The
  fields below belong to "least_squares"; inner_lr and clip_norm to "sum".
  """
  ridge: float = 0.01
  """Ridge of the regression, in units of the mean eigenvalue of its sum of keys."""
  read_scale: float = 1.0
  """Factor of what the regression gives."""
  learn_read_scale: bool = True
  """Whether each layer multiplies read_scale by exp(10 s), where s is learned and starts at 0."""
  read_gate: str = "none"
  """Whether a token reads as much as the memory knows of it: "leverage" multiplies what it reads by
  sigmoid(gate_sharpness (l - gate_threshold)), where l from 0 to 1 is the token's leverage; "key" adds
  a learned linear function of the token's normalised activations in the sigmoid, 0 at the start;
  "none" reads always.
  """
  gate_threshold: float = 0.9
  """Leverage at which the gate is half open."""
  gate_sharpness: float = 50.0
  """Slope of the gate."""
  learn_gate: bool = True
  """Whether each layer multiplies 1 - gate_threshold and gate_sharpness by exp(10 s), where both s are
  learned and start at 0.
  """

  key_rank: int | None = None
  """Dimensions R of the keys: the activations are multiplied by a learned projection [d_ff, R], random
  at the start, so that the state is [R, R + d_model] and solves cost R^3 / 3. None takes all of d_ff.
  """

  def __post_init__(self):
    require_positive("ttt", self, "chunk_size", "conv_width", "inner_lr")
    if self.key_rank is not None:
      require_positive("ttt", self, "key_rank")
    require_choice("ttt.rule", self.rule, RULES)
    require_choice("ttt.read_gate", self.read_gate, ("none", "leverage", "key"))
    require_positive("ttt", self, "ridge", "read_scale", "gate_sharpness")
    require(
      0 < self.gate_threshold < 1, f"ttt.gate_threshold={self.gate_threshold} must be in (0, 1)"
    )
    require(self.conv_width % 2 == 1, f"ttt.conv_width={self.conv_width} must be odd (centred)")
    require_choice("ttt.target", self.target, ("input_embed", "hidden_states"))
    require_choice("ttt.init", self.init, (None, "next_token", "identity", "current_token"))
    require_choice("ttt.inner_lr_scale", self.inner_lr_scale, ("1/F", "fixed"))
    require(
      not (self.init in (None, "next_token") and self.conv_width < 3),
      f"ttt.init={self.init!r} needs ttt.conv_width >= 3, got {self.conv_width}",
    )
    require_choice("ttt.implementation", self.implementation, (None, *IMPLEMENTATIONS))
    require_choice("ttt.collective", self.collective, (None, *COLLECTIVES))
    require_choice("ttt.wire_dtype", self.wire_dtype, (None, *DTYPES))
    if self.decay is not None:
      require(0 < self.decay <= 1, f"ttt.decay={self.decay} must be in (0, 1]")
    for name in ("half_life", "clip_norm"):
      if getattr(self, name) is not None:
        require_positive("ttt", self, name)
    self.check(given_fields(self))

  def check(self, given: Collection[str] | None = None) -> None:
    """Raises UserError for a field that contradicts another one, or has no effect beside it.

    Args:
      given: the fields that are known, where the others may come from a checkpoint; None: all.
    """

    def known(name: str) -> bool:
      return given is None or name in given

    if known("rule"):
      for rule, names in _OF_RULE.items():
        if rule != self.rule:
          _require_defaults("ttt", self, names, f"ttt.rule={self.rule!r}")
    if known("read_gate") and self.read_gate == "none":
      _require_defaults("ttt", self, _OF_GATE, "ttt.read_gate='none'")
    require(
      not (self.merge and self.implementation not in (None, "sequential")),
      f"ttt.merge=true needs ttt.implementation='sequential', got {self.implementation!r}",
    )
    require(
      self.half_life is None or self.decay is None,
      f"ttt.half_life={self.half_life} and ttt.decay={self.decay} both set the decay: leave one out",
    )
    require(
      not (known("half_life") and self.learn_half_life and self.half_life is None),
      "ttt.learn_half_life=true needs a ttt.half_life to start from, in tokens",
    )

  @property
  def chunk_decay(self) -> float | None:
    """Returns the initial factor of the state per chunk; None means 1."""
    return self.decay if self.half_life is None else 0.5 ** (self.chunk_size / self.half_life)


def defaults_implied(section: RopeScaling | TTTConfig, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields that given values leave without a meaning, with their defaults.

  Where one of these values overrides another section, that section's fields of the other rule, kind, gate
  or decay end with it, unless they are given too.
  """
  names: list[str] = []
  if isinstance(section, RopeScaling):
    for kind, fields in _OF_KIND.items():
      if given.get("kind", kind) != kind:
        names += fields
  else:
    for rule, fields in _OF_RULE.items():
      if given.get("rule", rule) != rule:
        names += fields
    if given.get("read_gate") == "none":
      names += _OF_GATE
    if given.get("decay") is not None:
      names += ["half_life", "learn_half_life"]
    if "half_life" in given:
      names += ["learn_half_life"] if given["half_life"] is None else ["decay"]
    if given.get("implementation") not in (None, "sequential"):
      names.append("merge")
  return {name: _default(section, name) for name in names}


def _require_defaults(section: str, config, names: tuple[str, ...], other: str) -> None:
  """Raises UserError for a field that has no effect beside the value `other` of another field."""
  for name in names:
    value = getattr(config, name)
    require(
      value == _default(config, name),
      f"{section}.{name}={value!r} does not belong to {other}: leave it out, or change "
      f"{other.partition('=')[0]}",
    )


def _default(config, name: str) -> Any:
  return type(config).__dataclass_fields__[name].default
