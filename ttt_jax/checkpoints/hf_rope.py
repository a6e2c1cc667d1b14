"""Translates the rotary embedding of config.json, its base and its scaling, as `transformers` 5 does."""

import warnings
from typing import Any

from ttt_jax.config import RopeScaling
from ttt_jax.errors import UnsupportedError, UserError

# Fields of RopeScaling by their names in `rope_scaling`.
_ROPE_FIELDS = {
  "factor": "factor",
  "original_max_position_embeddings": "original_max_positions",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention_factor",
  "mscale": "mscale",
  "mscale_all_dim": "mscale_all_dim",
  "truncate": "truncate",
}
_ROPE_KINDS = {
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
  ),
}
_TRAINED = "original_max_position_embeddings"


def need_float(value: Any, key: str) -> float:
  """Returns a number of config.json as a float; raises UserError if it is not a number."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(f"config.json: {key}={value!r} must be a number")
  return float(value)  # JSON may write 32 for 32.0


def parse_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
  """Returns the base and the scaling of the rotary frequencies.

  Both are in `rope_parameters`, or in `rope_theta` and `rope_scaling` as before transformers 5; if
  config.json has both dictionaries, `rope_scaling` counts. The trained length is
  `original_max_position_embeddings` of config.json, else of the dictionary, else
  `max_position_embeddings`.

  Raises:
    UnsupportedError: the scaling is not supported.
    UserError: a key is missing, is not a number, or contradicts another.
  """
  scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
  theta = _theta(config, scaling)
  if any(isinstance(value, dict) for value in scaling.values()):
    raise UnsupportedError(
      f"config.json: rope_parameters of {', '.join(scaling)}: only one for all layers is supported"
    )
  kind = _kind(scaling)
  if kind == "default":
    return theta, None
  keys = _ROPE_KINDS[kind]
  if unknown := [key for key in scaling if key not in keys]:
    warnings.warn(
      f"config.json: {', '.join(unknown)} has no effect on rope_type={kind!r}, as in transformers",
      stacklevel=4,
    )
  if _TRAINED in keys and config.get(_TRAINED) is not None:
    scaling[_TRAINED] = config[_TRAINED]
  if kind == "yarn":
    _complete_yarn(config, scaling)
  required = ("factor",) if kind == "yarn" else keys
  missing = [key for key in required if scaling.get(key) is None]
  if missing == [_TRAINED] or kind == "yarn":
    scaling.setdefault(_TRAINED, config.get("max_position_embeddings"))
    missing = [key for key in missing if scaling.get(key) is None]
  if missing:
    raise UserError(f"config.json: rope_type={kind!r} needs {', '.join(missing)}")
  fields = {_ROPE_FIELDS[key]: scaling[key] for key in keys if scaling.get(key) is not None}
  for name, value in fields.items():
    if name not in ("original_max_positions", "truncate"):
      fields[name] = need_float(value, name)
  return theta, RopeScaling(kind=kind, **fields)


def write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
  """Returns the `rope_scaling` of config.json for `parse_rope` and `transformers`."""
  if scaling is None:
    return None
  written = {key: getattr(scaling, _ROPE_FIELDS[key]) for key in _ROPE_KINDS[scaling.kind]}
  return {"rope_type": scaling.kind} | {k: v for k, v in written.items() if v is not None}


def _theta(config: dict[str, Any], scaling: dict[str, Any]) -> float:
  """Removes the base from `scaling` and returns it."""
  outer, inner = config.get("rope_theta"), scaling.pop("rope_theta", None)
  if outer is not None and inner is not None and outer != inner:
    raise UserError(
      f"config.json says rope_theta={outer} and rope_parameters.rope_theta={inner}: delete one"
    )
  bases = [theta for theta in (inner, outer, 10000.0) if theta is not None]
  return need_float(bases[0], "rope_theta")


def _kind(scaling: dict[str, Any]) -> str:
  """Removes the type from `scaling` and returns it; also removes keys that must have no effect."""
  names = [scaling.pop(key, None) for key in ("rope_type", "type")]
  kind = names[0] or names[1] or "default"
  if scaling.pop("partial_rotary_factor", None) not in (None, 1.0):
    raise UnsupportedError("config.json: partial_rotary_factor is not supported, only 1.0")
  if kind != "default" and kind not in _ROPE_KINDS:
    raise UnsupportedError(
      f"config.json: rope_type={kind!r} is not supported, only default, " + ", ".join(_ROPE_KINDS)
    )
  return kind


def _complete_yarn(config: dict[str, Any], scaling: dict[str, Any]) -> None:
  """Replaces a factor of null by the ratio of the two lengths, a beta of 0 or null by the default."""
  for key in ("beta_fast", "beta_slow"):
    if not scaling.get(key):
      scaling.pop(key, None)
  if "truncate" in scaling:
    scaling["truncate"] = bool(scaling["truncate"])
  length, trained = config.get("max_position_embeddings"), scaling.get(_TRAINED)
  if "factor" in scaling and scaling["factor"] is None and length and trained:
    scaling["factor"] = length / trained
