"""The model: its sizes, what mixes the tokens, which MLPs have fast weights and how these learn."""

from dataclasses import dataclass

from ttt_jax.config.checks import DTYPES, require, require_choice, require_positive

IMPLEMENTATIONS = ("associative", "dual", "sequential")
REMAT = ("none", "layer", "minimal")
MIXERS = ("attention", "gla", "delta_net")
COLLECTIVES = ("all_gather", "doubling", "all_to_all", "ring")


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
  # Tokens that the short convolution of a baseline's queries, keys and values sees; 1: none. None: as
  # published, 4 in delta_net and none in gla.
  short_conv: int | None = None

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
