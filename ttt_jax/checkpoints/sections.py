"""What a model that exists already is, and what may be said over it.

A checkpoint or a run decides the sections model, attention and ttt. One rule holds wherever a model is
opened: a field that was given counts, whatever its value. In `ttt` it takes the place of the model's own;
in `model` and `attention` it says how the model is computed, stretches its positions, or agrees with it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ttt_jax.config import (
  AttentionConfig,
  Config,
  ModelConfig,
  RopeScaling,
  TTTConfig,
  check_ttt_fields,
)
from ttt_jax.config.given import given_fields
from ttt_jax.errors import UserError

SECTIONS = ("model", "attention", "ttt")
# Fields that say how a model is computed, which a checkpoint has no say in.
_HOW_COMPUTED = ("param_dtype", "dtype", "state_dtype", "remat", "implementation", "balance")
# Fields that may differ from the checkpoint's, so that it reads further than it was trained for.
_READS_FURTHER = ("rope_theta", "rope_scaling", "max_positions")

Fields = Mapping[str, Mapping[str, Any]]


class Sections(NamedTuple):
  """What a model is."""

  model: ModelConfig
  attention: AttentionConfig
  ttt: TTTConfig


def given_sections(config: Config) -> dict[str, dict[str, Any]]:
  """The fields of the three sections that a config was given."""
  return {name: given_fields(getattr(config, name)) for name in SECTIONS}


def agreed(own: Sections, given: Fields, *, source: str) -> Sections:
  """The sections of a model with the given fields over them.

  Args:
    own: what the model says of itself.
    given: by section, the fields that somebody gave.
    source: the model in messages, as "the model of init_from='a'".

  Raises:
    UserError: an unknown field; a given field of `model` or `attention` that contradicts the model; one
      of `ttt` where no layer has fast weights; a combination that a section refuses.
  """
  if unknown := sorted(given.keys() - set(SECTIONS)):
    raise UserError(
      f"{', '.join(unknown)} cannot be given for {source}, only {', '.join(SECTIONS)}"
    )
  ttt = dataclasses.replace(own.ttt, **_values("ttt", own.ttt, given.get("ttt", {})))
  check_ttt_fields(ttt, given.get("ttt", {}), source)
  return Sections(
    _computed("model", own.model, given.get("model", {}), source),
    _computed("attention", own.attention, given.get("attention", {}), source),
    ttt,
  )


def _computed(name: str, own: Any, given: Mapping[str, Any], source: str) -> Any:
  """The model's section, but for how it is computed and how far it reads."""
  kept = {}
  for field, value in _values(name, own, given).items():
    stored = getattr(own, field)
    if field in _HOW_COMPUTED or field in _READS_FURTHER:
      kept[field] = value
    elif field == "head_dim" and (value or own.d_model // own.num_heads) == own.head_size:
      continue  # one of them spells out what the other leaves to the default
    elif not _equal(value, stored):
      raise UserError(f"{name}.{field}={value!r}, but {source} has {stored!r}: leave the field out")
  return dataclasses.replace(own, **kept)


def _values(name: str, own: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """The given fields of a section, lists as tuples, a section inside of it over the model's own."""
  known = {field.name for field in dataclasses.fields(own)}
  if unknown := sorted(given.keys() - known):
    raise UserError(f"{name} has no field {', '.join(unknown)}, only {', '.join(sorted(known))}")
  values = {}
  for field, value in given.items():
    if field == "rope_scaling" and value is not None:
      inner = value if isinstance(value, Mapping) else given_fields(value)
      base = RopeScaling() if own.rope_scaling is None else own.rope_scaling
      value = dataclasses.replace(base, **_values("model.rope_scaling", base, inner))
    values[field] = tuple(value) if isinstance(value, list) else value
  return values


def _equal(value: Any, stored: Any) -> bool:
  if isinstance(value, float) and isinstance(stored, float):
    return math.isclose(value, stored, rel_tol=1e-6)  # GGUF stores float32
  return value == stored
