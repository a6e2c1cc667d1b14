"""Defines the config section of the fast weights of MLPs."""

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
from ttt_jax.names import COLLECTIVES, IMPLEMENTATIONS, RULES

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
  fields below belong to "least_squares"; inner_lr, inner_lr_scale, learn_inner_lr, clip_norm and merge
  to "sum".
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

    def is_given(name: str) -> bool:
      return given is None or name in given

    if is_given("rule"):
      for rule, names in _OF_RULE.items():
        if rule != self.rule:
          require_defaults("ttt", self, names, f"ttt.rule={self.rule!r}")
    if is_given("read_gate") and self.read_gate == "none":
      require_defaults("ttt", self, _OF_GATE, "ttt.read_gate='none'")
    require(
      not (self.merge and self.implementation not in (None, "sequential")),
      f"ttt.merge=true needs ttt.implementation='sequential', got {self.implementation!r}",
    )
    require(
      self.half_life is None or self.decay is None,
      f"ttt.half_life={self.half_life} and ttt.decay={self.decay} both set the decay: leave one out",
    )
    require(
      not (is_given("half_life") and self.learn_half_life and self.half_life is None),
      "ttt.learn_half_life=true needs a ttt.half_life to start from, in tokens",
    )

  @property
  def chunk_decay(self) -> float | None:
    """Returns the initial factor of the state per chunk; None means 1."""
    return self.decay if self.half_life is None else 0.5 ** (self.chunk_size / self.half_life)

  @staticmethod
  def ended_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that have no effect once the given ones override others, with their defaults.

    A given rule, gate, decay or half-life ends the fields of another one, and a given implementation that
    cannot merge ends `merge`.
    """
    names: list[str] = []
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
    return {name: default_of(TTTConfig, name) for name in names}
