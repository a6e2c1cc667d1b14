"""Checks the values of config fields; every mistake is a UserError that names the field and its value."""

from collections.abc import Iterable
from typing import Any

from ttt_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float64")


def require(ok: bool, message: str) -> None:
  if not ok:
    raise UserError(message)


def require_positive(section: str, config, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(value > 0, f"{section}.{name}={value} must be positive")


def require_choice(name: str, value, choices) -> None:
  require(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def require_defaults(section: str, config, names: Iterable[str], other: str) -> None:
  """Raises UserError for a field that has no effect beside `other`, the value of another field."""
  for name in names:
    value = getattr(config, name)
    require(
      value == default_of(type(config), name),
      f"{section}.{name}={value!r} does not belong to {other}: leave it out, or change "
      f"{other.partition('=')[0]}",
    )


def default_of(section: type, name: str) -> Any:
  """Returns the default of a section's field."""
  return section.__dataclass_fields__[name].default
