"""Computes the rotary frequencies of models that read more tokens than they were trained on.

Implements the three methods of published Llama and Qwen checkpoints, in float32 and in the order of
operations of `transformers` (modeling_rope_utils), so that the angles agree at long positions too.
"""

import math

import numpy as np
from jaxtyping import Float

from ttt_jax.config import RopeScaling


def scaled_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[Float[np.ndarray, "half"], float]:
  """Returns the angle per position of every channel pair, and the factor of cos and sin.

  Args:
    head_dim: K, channels per head.
    theta: the base; plain frequencies are `theta^(-2 i / K)`.
    scaling: the method and its parameters; `RopeScaling.check` has checked them.
  """
  periods = np.float32(theta) ** (
    np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
  )
  if scaling.kind == "linear":
    return _plain(periods) / np.float32(scaling.factor), 1.0
  if scaling.kind == "llama3":
    return _llama3(_plain(periods), scaling), 1.0
  return _yarn(periods, head_dim, theta, scaling), _yarn_attention_factor(scaling)


def _plain(periods: Float[np.ndarray, "half"]) -> Float[np.ndarray, "half"]:
  return np.float32(1) / periods


def _llama3(plain: Float[np.ndarray, "half"], scaling: RopeScaling) -> Float[np.ndarray, "half"]:
  """Divides frequencies by the factor if their wavelength exceeds `L / low`, keeps them below `L / high`.

  L is the trained length. Frequencies between the two are blended, linearly in L / wavelength.
  """
  factor, low, high = (
    np.float32(x) for x in (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
  )
  length = np.float32(scaling.original_max_positions)
  wavelength = np.float32(2 * math.pi) / plain
  keep = (length / wavelength - low) / (high - low)
  blended = (1 - keep) * plain / factor + keep * plain
  stretched = np.where(wavelength > length / low, plain / factor, blended)
  return np.where(wavelength < length / high, plain, stretched).astype(np.float32)


def _yarn(
  periods: Float[np.ndarray, "half"], head_dim: int, theta: float, scaling: RopeScaling
) -> Float[np.ndarray, "half"]:
  """Keeps pairs that turn more than `beta_fast` times within L, stretches those below `beta_slow` times.

  The weight of the pairs between them is a linear ramp (Peng et al., YaRN, arXiv 2309.00071).
  """

  def pair_that_turns(times: float) -> float:
    turns = scaling.original_max_positions / (times * 2 * math.pi)
    return head_dim * math.log(turns) / (2 * math.log(theta))

  low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, head_dim - 1)
  if low == high:
    high += 0.001
  pairs = np.arange(head_dim // 2, dtype=np.float32)
  keep = 1 - np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)
  stretched = np.float32(1) / (np.float32(scaling.factor) * periods)
  return (stretched * (1 - keep) + _plain(periods) * keep).astype(np.float32)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
  """Returns `m(mscale) / m(mscale_all_dim)` with `m(c) = 1 + 0.1 c log factor`; without both, `m(1)`."""
  if scaling.attention_factor is not None:
    return scaling.attention_factor

  def magnitude(scale: float) -> float:
    return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

  if scaling.mscale and scaling.mscale_all_dim:
    return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
  return magnitude(1.0)
