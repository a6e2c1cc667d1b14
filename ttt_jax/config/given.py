"""Makes dataclasses sections of the config, which know what the user gave and hold finite numbers."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

from ttt_jax.errors import UserError

T = TypeVar("T", bound=type)

_GIVEN = "_given_fields"


def section(name: str | None = None) -> Callable[[T], T]:
  """Makes a frozen dataclass a section of the config; one inside another section has no name.

  Its instances remember which fields were passed to their constructor; a given value may equal the
  default. `dataclasses.replace` passes every field, so all fields of its result count as given. Comparison
  and `dataclasses.asdict` ignore the record. A section with a name refuses numbers that are not finite,
  which would pass a check like `x > 0`, also for the sections inside it.
  """

  def decorate(cls: T) -> T:
    init = cls.__init__
    names = [field.name for field in dataclasses.fields(cls)]

    @functools.wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
      given = dict(zip(names, args)) | kwargs
      if name is not None:
        for field, value in given.items():
          _check_finite(f"{name}.{field}", value)
      object.__setattr__(self, _GIVEN, frozenset(given))
      init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls

  return decorate


def _check_finite(name: str, value: Any) -> None:
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(
      f"{name}={value} is not finite: give a finite number, or null where it may be null"
    )
  if isinstance(value, tuple | list):
    for i, item in enumerate(value):
      _check_finite(f"{name}[{i}]", item)
  if dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      _check_finite(f"{name}.{field.name}", getattr(value, field.name))


def given_fields(section: Any) -> dict[str, Any]:
  """Returns the fields that were passed to a section's constructor, with values, in the class's order."""
  names = getattr(section, _GIVEN)
  return {
    field.name: getattr(section, field.name)
    for field in dataclasses.fields(section)
    if field.name in names
  }
