"""The errors that tell a user what to change.

Whatever a user can get wrong or ask for in vain is raised as one of these two. Any other exception that
leaves the library is a fault of the library or of the machine, and the command line shows its traceback.
"""


class UserError(ValueError):
  """A value, a file or a combination of them is not valid; the message names it and the remedy."""


class UnsupportedError(NotImplementedError):
  """The request is valid, but the library does not support it; the message names what is supported."""
