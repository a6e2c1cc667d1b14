"""Translates `TTTConfig` to keys of config.json and back: the published `ttt_*` keys and our own section.

The published code has one fixed inner rate, a convolution of width 5 on a source that is not normalised,
and no decay. A model that it cannot compute gets only our section, so that it cannot misread the model.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ttt_jax.config import TTTConfig
from ttt_jax.errors import UserError

SECTION = "ttt_jax"  # of config.json
PUBLISHED_KEYS = ("ttt_mode", "ttt_layers", "ttt_chunk", "ttt_lr", "ttt_proj", "ttt_target")
_CONV_WIDTH = 5  # of the published code


def parse_published(config: dict[str, Any], num_layers: int) -> tuple[TTTConfig | None, list[int]]:
  """Returns the `TTTConfig` of the `ttt_*` keys, None without `ttt_mode`, and layers beyond the depth.

  Raises:
    UserError: a key is missing or unknown.
  """
  if not config.get("ttt_mode"):
    return None, []
  missing = [key for key in PUBLISHED_KEYS if key not in config]
  allowed = (*PUBLISHED_KEYS, SECTION)
  unknown = [key for key in config if key.startswith("ttt_") and key not in allowed]
  if missing or unknown:
    raise UserError(
      f"config.json has ttt_mode but {'lacks' if missing else 'also'} "
      f"{', '.join(missing or unknown)}, which ttt_jax "
      f"{'does not guess' if missing else 'does not know'}: "
      "pass ttt=TTTConfig(...) to say how the fast weights learn"
    )
  if not isinstance(config["ttt_layers"], list) or not all(
    isinstance(layer, int) for layer in config["ttt_layers"]
  ):
    raise UserError(f"config.json: ttt_layers={config['ttt_layers']!r} must be a list of integers")
  named = sorted(set(config["ttt_layers"]))
  ttt = TTTConfig(
    layers=tuple(layer for layer in named if 0 <= layer < num_layers),
    chunk_size=config["ttt_chunk"],
    target=config["ttt_target"],
    projection=config["ttt_proj"],
    inner_lr=float(config["ttt_lr"]),
    inner_lr_scale="fixed",
    learn_inner_lr=False,
    normalize_target=False,
    conv_width=_CONV_WIDTH,
  )
  return ttt, [layer for layer in named if not 0 <= layer < num_layers]


def write_published(ttt: TTTConfig, rates: Iterable[float]) -> tuple[dict[str, Any], list[str]]:
  """Returns the published keys that mean the same, or no keys and the reasons why not.

  Args:
    ttt: the section of the model.
    rates: the learned inner rate of each TTT layer.
  """
  rates = sorted(set(rates))
  reasons = []
  if ttt.normalize_target:
    reasons.append("ttt.normalize_target=true (there the source of the targets is not normalised)")
  if ttt.conv_width != _CONV_WIDTH:
    reasons.append(f"ttt.conv_width={ttt.conv_width} (there it is {_CONV_WIDTH})")
  if ttt.decay not in (None, 1.0):
    reasons.append(f"ttt.decay={ttt.decay} (there is none)")
  if ttt.half_life is not None:
    reasons.append(f"ttt.half_life={ttt.half_life} (there is none)")
  if ttt.rule != "sum":
    reasons.append(f"ttt.rule={ttt.rule!r} (there it is the sum)")
  if ttt.clip_norm is not None:
    reasons.append(f"ttt.clip_norm={ttt.clip_norm} (there is none)")
  if len(rates) > 1:
    reasons.append(
      f"learned inner rates from {rates[0]:.3g} to {rates[-1]:.3g} (there all layers have one)"
    )
  if reasons:
    return {}, reasons
  keys = {
    "ttt_mode": True,
    "ttt_layers": sorted(ttt.layers),
    "ttt_chunk": ttt.chunk_size,
    "ttt_lr": rates[0],
    "ttt_proj": ttt.projection,
    "ttt_target": ttt.target,
  }
  return keys, []


def write_section(ttt: TTTConfig, published: dict[str, Any]) -> dict[str, Any]:
  """Returns our section of config.json: all of `TTTConfig`, and the published keys beside it."""
  return {"ttt": dataclasses.asdict(ttt), "published_as": published}


def parse_section(config: dict[str, Any]) -> TTTConfig | None:
  """Returns the `TTTConfig` of our section of config.json, None without this section.

  Raises:
    UserError: this version does not know a field, or the published keys beside the section have changed.
  """
  section = config.get(SECTION)
  if section is None:
    return None
  published = {key: config[key] for key in config if key.startswith("ttt_") and key != SECTION}
  if published != section.get("published_as"):
    raise UserError(
      f"config.json says two things: its keys {published} are not those that its section {SECTION} "
      f"was written with, {section.get('published_as')}: delete the section or restore the keys, or "
      "pass ttt=TTTConfig(...)"
    )
  fields = section["ttt"]
  names = {field.name for field in dataclasses.fields(TTTConfig)}
  if unknown := sorted(set(fields) - names):
    raise UserError(
      f"config.json: {SECTION}.ttt has {', '.join(unknown)}, unknown to this version of ttt_jax: "
      "pass ttt=TTTConfig(...), or use the version that wrote it"
    )
  return TTTConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
