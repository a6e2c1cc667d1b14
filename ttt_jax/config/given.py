"""Which fields of a config section were given: a default that somebody wrote down counts, too."""

import dataclasses
import functools
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

_GIVEN = "_given_fields"


def records_given(cls: T) -> T:
  """Makes the instances of a frozen dataclass remember which fields their constructor was given.

  `dataclasses.replace` passes every field, so that all fields of its result count as given. Neither
  comparison nor `dataclasses.asdict` sees the difference.
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
  """The fields that a section's constructor was given, with their values, in the order of the class."""
  given = getattr(section, _GIVEN)
  return {
    field.name: getattr(section, field.name)
    for field in dataclasses.fields(section)
    if field.name in given
  }
