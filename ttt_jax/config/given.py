"""Records which fields of a config section the user gave; a given value may equal the default."""

import dataclasses
import functools
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_GIVEN = "_given_fields"


def records_given(cls: T) -> T:
  """Makes instances of a frozen dataclass remember which fields were passed to their constructor.

  `dataclasses.replace` passes every field, so all fields of its result count as given. Comparison and
  `dataclasses.asdict` ignore the record.
  """
  init = cls.__init__
  names = [field.name for field in dataclasses.fields(cls)]

  @functools.wraps(init)
  def __init__(self, *args: Any, **kwargs: Any) -> None:
    object.__setattr__(self, _GIVEN, frozenset(names[: len(args)]) | frozenset(kwargs))
    init(self, *args, **kwargs)

  cls.__init__ = __init__
  return cls


def given_fields(section: Any) -> dict[str, Any]:
  """Returns the fields that were passed to a section's constructor, with values, in the class's order."""
  names = getattr(section, _GIVEN)
  return {
    field.name: getattr(section, field.name)
    for field in dataclasses.fields(section)
    if field.name in names
  }
