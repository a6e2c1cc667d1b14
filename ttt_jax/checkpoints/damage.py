"""Tells damage of a checkpoint's files from all else that Orbax raises when it restores one."""

import json
import re

# TensorStore raises one class for everything, whose text begins with the status; for contents that cannot
# be decoded it has none.
_DAMAGE = re.compile(r"(?:DATA_LOSS|NOT_FOUND|OUT_OF_RANGE): |Error (?:opening|reading|decoding) ")


def cause_of(error: BaseException) -> BaseException:
  """Returns what happened: Orbax wraps all that a handler raises, even a lack of memory or Ctrl-C."""
  while error.__cause__ is not None and (type(error) is Exception or isinstance(error, KeyError)):
    error = error.__cause__
  return error


def is_damage(error: BaseException) -> bool:
  """Tells whether a restore raises this for files that are missing, cut short or changed."""
  if type(error) is ValueError:
    return _DAMAGE.match(str(error)) is not None
  return isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError)


def reason(error: BaseException) -> str:
  """Returns the first line of a message; messages of Orbax and TensorStore fill pages."""
  return (str(error) or type(error).__name__).splitlines()[0][:300]
