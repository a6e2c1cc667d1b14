"""`TTTConfig` in config.json: the published `ttt_*` keys, and a section of our own that says all of it.

The published code has one fixed inner rate, a convolution of width 5 on a source that is not normalised, no
decay. What it cannot express it must not read as something else: then only our section is written.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ttt_jax.config import TTTConfig
from ttt_jax.errors import UserError

SECTION = "ttt_jax"  # of config.json
PUBLISHED_KEYS = ("ttt_mode", "ttt_layers", "ttt_chunk", "ttt_lr", "ttt_proj", "ttt_target")
_CONV_WIDTH = 5  # of the published code


def read_published(config: dict[str, Any], num_layers: int) -> tuple[TTTConfig | None, list[int]]:
  """The `TTTConfig` of the `ttt_*` keys, None without `ttt_mode`, and layers named beyond the depth.

  Raises:
    UserError: a key is missing or unknown.
  """
  if not config.get("ttt_mode"):
    return None, []
  missing = [key for key in PUBLISHED_KEYS if key not in config]
  known = (*PUBLISHED_KEYS, SECTION)
  unknown = [key for key in config if key.startswith("ttt_") and key not in known]
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
  """The published keys that mean the same, or none and the reasons why not.

  Args:
    ttt: what the model does.
    rates: the inner rate of each of its TTT layers, with what they have learned.
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
  """Our section, from which `read_section` has the same `TTTConfig`, beside these published keys."""
  return {"ttt": dataclasses.asdict(ttt), "published_as": published}


def read_section(config: dict[str, Any]) -> TTTConfig | None:
  """The `TTTConfig` of our section, None if there is none.

  Raises:
    UserError: fields unknown to this version, or published keys beside it that have been changed.
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
  known = {field.name for field in dataclasses.fields(TTTConfig)}
  if unknown := sorted(set(fields) - known):
    raise UserError(
      f"config.json: {SECTION}.ttt has {', '.join(unknown)}, unknown to this version of ttt_jax: "
      "pass ttt=TTTConfig(...), or use the version that wrote it"
    )
  return TTTConfig(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
