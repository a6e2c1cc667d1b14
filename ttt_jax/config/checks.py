"""Checks the values of config fields; every mistake is a UserError that names the field and its value."""

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
