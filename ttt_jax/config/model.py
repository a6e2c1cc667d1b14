"""The model: its sizes, what mixes the tokens, which MLPs have fast weights and how these learn."""

from dataclasses import dataclass

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive
from ttt_jax.config.given import records_given

IMPLEMENTATIONS = ("associative", "dual", "sequential")
REMAT = ("none", "layer", "minimal")
MIXERS = ("attention", "gla", "delta_net")
COLLECTIVES = ("all_gather", "doubling", "all_to_all", "ring")


@records_given
@dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are stretched beyond the trained length (`ttt_jax.nn.rope`).

  Kinds, fields and their defaults are those of `rope_scaling` in `transformers`.
  """

  kind: str = "linear"
  """Which formula stretches the frequencies: "linear", "llama3" or "yarn"."""
  factor: float = 1.0
  """How many times the trained length is read."""
  original_max_positions: int | None = None
  """The trained length in tokens; "llama3" and "yarn" need it."""
  low_freq_factor: float = 1.0
  """With "llama3", wavelengths above the trained length / this are stretched by the whole factor."""
  high_freq_factor: float = 4.0
  """With "llama3", wavelengths below the trained length / this stay as they are."""
  beta_fast: float = 32.0
  """With "yarn", channels that turn more often than this in the trained length stay."""
  beta_slow: float = 1.0
  """With "yarn", channels that turn less often than this are stretched by the whole factor."""
  attention_factor: float | None = None
  """With "yarn", cos and sin are multiplied by this; None computes it from factor and mscale."""
  mscale: float | None = None
  """With "yarn", the weight of log(factor) in the attention factor; None is 1."""
  mscale_all_dim: float | None = None
  """With "yarn", the same for the denominator, as DeepSeek has it; None leaves it out."""
  truncate: bool = True
  """With "yarn", whether the ramp between both kinds of channel begins and ends at whole ones."""

  def check(self) -> None:
    """Raises UserError for a field out of range; `ModelConfig` calls it."""
    section = "model.rope_scaling"
    require_choice(f"{section}.kind", self.kind, ("linear", "llama3", "yarn"))
    require_positive(section, self, "factor")
    if self.kind != "linear":
      length = self.original_max_positions
      require(
        length is not None and length > 0,
        f"{section}.original_max_positions={length}: {section}.kind={self.kind!r} needs the length "
        "the model was trained on",
      )
    if self.kind == "llama3":
      require_positive(section, self, "low_freq_factor", "high_freq_factor")
      require(
        self.high_freq_factor > self.low_freq_factor,
        f"{section}.high_freq_factor={self.high_freq_factor} must be above "
        f"{section}.low_freq_factor={self.low_freq_factor}",
      )
    if self.kind == "yarn":
      require_positive(section, self, "beta_fast", "beta_slow")
      if self.attention_factor is not None:
        require_positive(section, self, "attention_factor")


@records_given
@dataclass(frozen=True)
class ModelConfig:
  """A decoder of the Llama / Qwen3 kind."""

  vocab_size: int = 256
  """Tokens that the model knows; 256 for bytes."""
  num_layers: int = 4
  """Decoder layers, each with attention and a gated MLP."""
  d_model: int = 96
  """Width D of the residual stream."""
  d_ff: int = 288
  """Hidden width F of the gated MLPs."""
  num_heads: int = 4
  """Query heads."""
  num_kv_heads: int = 4
  """Key and value heads; a divisor of num_heads (grouped-query attention)."""
  head_dim: int | None = None
  """Width of a head; None is d_model // num_heads."""
  rope_theta: float = 10000.0
  """Base of the rotary frequencies."""
  rope_scaling: RopeScaling | None = None
  """How rotary frequencies are stretched beyond the trained length; None leaves them as they are."""
  max_positions: int | None = None
  """The length the model was trained for; longer rows are read with a warning."""
  norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  qk_norm: bool = False
  """Whether every query and key head is RMS-normalised, as in Qwen3."""
  attention_bias: str | None = None
  """Biases of the attention projections: "qkv" as in Qwen2, "qkvo" on the output projection too,
  None for none.
  """
  tie_embeddings: bool = True
  """Whether the head is the token embedding."""
  bos_id: int | None = None
  """The token that begins a text, if there is one."""
  eos_ids: tuple[int, ...] = ()
  """The tokens that end a text: generation stops there."""
  param_dtype: str = "float32"
  """Dtype of the parameters."""
  dtype: str = "float32"
  """Dtype of the computation."""
  state_dtype: str = "float32"
  """Dtype of the fast weights and their prefix sums."""
  remat: str = "layer"
  """What the backward pass recomputes: "layer" everything but the input of each layer, "minimal"
  all but the results of the projections, "none" nothing.
  """

  def __post_init__(self):
    require_positive(
      "model", self, "vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads"
    )
    require_positive("model", self, "rope_theta", "norm_eps")
    if self.rope_scaling is not None:
      self.rope_scaling.check()
    if self.max_positions is not None:
      require_positive("model", self, "max_positions")
    require_choice("model.attention_bias", self.attention_bias, (None, "qkv", "qkvo"))
    for token in (*self.eos_ids, *(() if self.bos_id is None else (self.bos_id,))):
      require(
        0 <= token < self.vocab_size,
        f"model.bos_id={self.bos_id}, model.eos_ids={list(self.eos_ids)}: {token} is no token, "
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
    """Width of a head: head_dim, or what d_model leaves for each."""
    return self.d_model // self.num_heads if self.head_dim is None else self.head_dim


@records_given
@dataclass(frozen=True)
class AttentionConfig:
  """Which tokens a token sees: the last `window` ones, or in `full_layers` all earlier ones."""

  window: int | None = None
  """Tokens that a token attends to, itself included; None is full attention in every layer."""
  full_layers: tuple[int, ...] = ()
  """Layers with full attention although window is set."""
  implementation: str | None = None
  """"xla" (anywhere), "splash" (TPU) or "cudnn" (GPU); None takes the best one that can express the
  call.
  """
  balance: bool | None = None
  """Whether full attention over several shards swaps half of each shard's queries with its mirror
  shard, so that all devices have equal work; None does, false saves two exchanges.
  """
  mixer: str = "attention"
  """What mixes the tokens in mixer_layers: "attention", or a baseline with a state of fixed size
  and as many parameters: "gla" (gated linear attention) or "delta_net" (the delta rule).
  Baselines see their whole document and have no window.
  """
  mixer_layers: tuple[int, ...] | None = None
  """Layers of the baseline; None is all but full_layers."""
  short_conv: int | None = None
  """Tokens that the short convolution of a baseline's queries, keys and values spans, 1 for no
  convolution; None is as published: 4 in delta_net, 1 in gla.
  """

  def __post_init__(self):
    if self.window is not None:
      require_positive("attention", self, "window")
    require_choice("attention.mixer", self.mixer, MIXERS)
    if self.short_conv is not None:
      require_positive("attention", self, "short_conv")
      require(
        self.mixer != "attention",
        f"attention.short_conv={self.short_conv} belongs to attention.mixer 'gla' or 'delta_net', and "
        "attention.mixer is 'attention': leave one out",
      )
    if self.mixer_layers is not None:
      require(
        self.mixer != "attention",
        f"attention.mixer_layers={list(self.mixer_layers)} are attention layers as all others: set "
        "attention.mixer to 'gla' or 'delta_net', or leave attention.mixer_layers out",
      )
      both = sorted(set(self.mixer_layers) & set(self.full_layers))
      require(
        not both,
        f"attention.mixer_layers={list(self.mixer_layers)} and attention.full_layers="
        f"{list(self.full_layers)} both name {both}: a layer has {self.mixer!r} or full attention, not "
        "both",
      )
    require_choice(
      "attention.implementation", self.implementation, (None, "xla", "splash", "cudnn")
    )

  def mixer_of(self, layer: int) -> str:
    """What mixes the tokens in a layer, one of `MIXERS`."""
    if self.mixer_layers is None:
      return "attention" if layer in self.full_layers else self.mixer
    return self.mixer if layer in self.mixer_layers else "attention"


@records_given
@dataclass(frozen=True)
class TTTConfig:
  """Which MLPs have fast weights, and how these learn (docs of `ttt_jax.inplace_ttt`)."""

  layers: tuple[int, ...] = ()
  """Layers whose down projection is a fast weight, counted from 0."""
  chunk_size: int = 512
  """Tokens C per chunk: all are read with one fast weight, then update it."""
  target: str = "input_embed"
  """What the target is made of: "input_embed", the token embeddings (training from scratch), or
  "hidden_states", the input of the MLP (pretrained models).
  """
  normalize_target: bool = True
  """Whether the source of the target is RMS-normalised over the model width."""
  conv_width: int = 5
  """Width of the target's centred convolution; it looks (conv_width - 1) / 2 tokens ahead."""
  projection: bool = True
  """Whether the target has a learned projection [D, D]."""
  init: str | None = None
  """How the target starts. "next_token": convolution 1 at t+1, projection the identity; it learns
  from the first step. "identity": convolution 0, projection the identity; the model starts
  exactly as without fast weights. "current_token": convolution 1 at t, the target of
  reconstruction. None: "next_token" in a new model, "identity" in a pretrained one.
  """
  inner_lr: float = 0.05
  """Step size of the update."""
  inner_lr_scale: str = "1/F"
  """"1/F" divides inner_lr by d_ff, "fixed" takes it as it is."""
  learn_inner_lr: bool = True
  """Whether the step size is multiplied by exp(10 s), s learned per layer from 0."""
  decay: float | None = None
  """The factor of the state per chunk, in (0, 1]; None is 1, the paper's plain sum."""
  half_life: float | None = None
  """Tokens after which what was learned counts half, instead of decay: a decay of 2^(-chunk_size /
  half_life), whatever the chunk.
  """
  learn_half_life: bool = False
  """Whether the half-life is multiplied by exp(10 s), s learned per layer from 0; recommended from
  scratch, with half_life 400.
  """
  clip_norm: float | None = None
  """Frobenius norm to which the update of a chunk is rescaled where it is larger; None never
  rescales.
  """
  implementation: str | None = None
  """"sequential", "dual" or "associative"; None lets the cost model choose."""
  merge: bool | None = None
  """Whether a chunk is read in one product Z (W + S), rounded to model.dtype, instead of two; None
  does where that loses nothing.
  """
  collective: str | None = None
  """How shards exchange their states: "all_gather", "doubling", "all_to_all" or "ring"; None lets
  the cost model choose.
  """
  wire_dtype: str | None = None
  """Dtype to which states are rounded for the exchange; None sends them as they are."""

  def __post_init__(self):
    require_positive("ttt", self, "chunk_size", "conv_width", "inner_lr")
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
    require(
      not (self.merge and self.implementation not in (None, "sequential")),
      f"ttt.merge=true needs ttt.implementation='sequential', got {self.implementation!r}",
    )
    if self.decay is not None:
      require(0 < self.decay <= 1, f"ttt.decay={self.decay} must be in (0, 1]")
    if self.half_life is not None:
      require_positive("ttt", self, "half_life")
      require(
        self.decay is None,
        f"ttt.half_life={self.half_life} and ttt.decay={self.decay} both say what is forgotten: leave "
        "one out",
      )
    require(
      not (self.learn_half_life and self.half_life is None),
      "ttt.learn_half_life=true needs a ttt.half_life to start from, in tokens",
    )
    if self.clip_norm is not None:
      require_positive("ttt", self, "clip_norm")

  @property
  def chunk_decay(self) -> float | None:
    """The state's factor per chunk before anything is learned of it; None is 1."""
    return self.decay if self.half_life is None else 0.5 ** (self.chunk_size / self.half_life)
