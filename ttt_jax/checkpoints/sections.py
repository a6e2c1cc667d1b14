"""Merges the fields that a user gives with the sections of an existing model.

A checkpoint or a run sets the sections model, attention and ttt. One rule holds where a model is opened: a
given field counts, whatever its value, and a field that is not given is the model's own. A given field of
`ttt` overrides the model's; fields of another rule, gate or decay than the given one end. A given field of
`model` or `attention` sets how the model is computed, stretches its positions, or must equal the model's.
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
# Fields that set how a model is computed: they may differ from the checkpoint.
_COMPUTATION_FIELDS = ("param_dtype", "dtype", "state_dtype", "remat", "implementation", "balance")
# Fields that may differ from the checkpoint, so that a model takes longer rows than it was trained on.
_POSITION_FIELDS = ("rope_theta", "rope_scaling", "max_positions")

Fields = Mapping[str, Mapping[str, Any]]  # field values by section name and field name


class Sections(NamedTuple):
  """Describes a model by three sections of the config."""

  model: ModelConfig
  attention: AttentionConfig
  ttt: TTTConfig


def given_sections(config: Config) -> dict[str, dict[str, Any]]:
  """Returns the fields of the three sections that a config was given."""
  return {name: given_fields(getattr(config, name)) for name in SECTIONS}


def with_given_fields(sections: Sections, given: Fields, *, source: str) -> Sections:
  """Returns the sections of a model with the given fields over them.

  Args:
    sections: the model's sections.
    given: the fields that the user gave, by section.
    source: the model in messages, as "the model of init_from='a'".

  Raises:
    UserError: an unknown field; a given field of `model` or `attention` that contradicts the model; a field
      of `ttt` where no layer has fast weights; an invalid combination within a section.
  """
  if unknown := sorted(given.keys() - set(SECTIONS)):
    raise UserError(
      f"{', '.join(unknown)} cannot be given for {source}, only {', '.join(SECTIONS)}"
    )
  ttt = _merged(sections.ttt, _checked_values("ttt", sections.ttt, given.get("ttt", {})))
  check_ttt_fields(ttt, given.get("ttt", {}), source)
  return Sections(
    _checked_section("model", sections.model, given.get("model", {}), source),
    _checked_section("attention", sections.attention, given.get("attention", {}), source),
    ttt,
  )


def check_init(given: Mapping[str, Any], trained: str, source: str) -> None:
  """Raises UserError if a given `ttt.init` is not the one that a model's parameters started from.

  Args:
    given: the given fields of `ttt`.
    trained: the model's own `ttt.init`.
    source: the model in messages; it has the parameters of all its TTT layers.
  """
  init = given.get("init")
  if init not in (None, trained):
    raise UserError(
      f"ttt.init={init!r} sets how parameters start, but {source} has those of all its TTT layers: leave "
      "ttt.init out"
    )


def _checked_section(name: str, section: Any, given: Mapping[str, Any], source: str) -> Any:
  """Returns the model's section with given fields for computation and positions; others must be equal."""
  kept = {}
  for field, value in _checked_values(name, section, given).items():
    stored = getattr(section, field)
    if field in _COMPUTATION_FIELDS or field in _POSITION_FIELDS:
      kept[field] = value
    elif (
      field == "head_dim" and (value or section.d_model // section.num_heads) == section.head_size
    ):
      continue  # one names the size that the other leaves to the default
    elif not _equal(value, stored):
      raise UserError(f"{name}.{field}={value!r}, but {source} has {stored!r}: leave the field out")
  return dataclasses.replace(section, **kept)


def _checked_values(name: str, section: Any, given: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the given fields of a section, lists as tuples, `rope_scaling` merged with the model's."""
  names = {field.name for field in dataclasses.fields(section)}
  if unknown := sorted(given.keys() - names):
    raise UserError(f"{name} has no field {', '.join(unknown)}, only {', '.join(sorted(names))}")
  values = {}
  for field, value in given.items():
    if field == "rope_scaling" and value is not None:
      inner = value if isinstance(value, Mapping) else given_fields(value)
      base = RopeScaling() if section.rope_scaling is None else section.rope_scaling
      value = _merged(base, _checked_values("model.rope_scaling", base, inner))
    values[field] = tuple(value) if isinstance(value, list) else value
  return values


def _merged(section: Any, given: Mapping[str, Any]) -> Any:
  """Returns the section with the given fields; fields that these leave without a meaning are defaults."""
  return dataclasses.replace(section, **{**section.ended_by(given), **given})


def _equal(value: Any, stored: Any) -> bool:
  if isinstance(value, float) and isinstance(stored, float):
    return math.isclose(value, stored, rel_tol=1e-6)  # GGUF stores float32
  return value == stored
