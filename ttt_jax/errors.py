"""Defines the errors that tell a user what to change.

Every mistake of a user and every unsupported request raises one of these two. Any other exception is a
fault of the library or of the machine, and the command line shows its traceback.
"""


class UserError(ValueError):
  """Reports an invalid value, file or combination; the message names it and the remedy."""


class UnsupportedError(NotImplementedError):
  """Reports a valid request that the library does not support; the message names what is supported."""
