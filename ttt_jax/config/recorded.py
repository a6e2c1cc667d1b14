"""The config that a run records in its directory, for whoever resumes or evaluates it."""

import dataclasses
from pathlib import Path
from typing import Any

from ttt_jax.config.given import given_fields
from ttt_jax.config.run import Config
from ttt_jax.config.yaml import dump_config, load_config
from ttt_jax.errors import UserError
from ttt_jax.files import write_text

CONFIG_FILE = "config.yaml"
# The last line of a config that was written whole: what it lacks, its version of ttt_jax did not have.
_END = "# end of the config\n"
# Null in these fields of `data` is what the run began with; a version of ttt_jax that did not have them
# began with this.
_AS_BEGUN = {"start_of_text": None, "end_of_text": False}


def record_config(run_dir: str | Path, config: Config) -> None:
  """Writes `config.yaml`, with what a run that is there already began with."""
  config = with_beginning(config, beginning(run_dir))
  write_text(Path(run_dir) / CONFIG_FILE, dump_config(config) + _END)


def recorded_config(run_dir: str | Path) -> Config:
  """The config that a run recorded; what an earlier version of ttt_jax did not have is what it did.

  Raises:
    UserError: there is none, or it was cut short.
  """
  file = Path(run_dir) / CONFIG_FILE
  if not file.is_file():
    raise UserError(f"run_dir={str(run_dir)!r} has no checkpoints: train there first")
  if not _is_whole(file):
    raise UserError(  # what it lacks must not pass for defaults
      f"{file} is damaged, its last line is not {_END.strip()!r}: give another --run_dir, or add that "
      "line if all the rest is there"
    )
  config = load_config(file)
  return with_beginning(config, _beginning_of(config))


def beginning(run_dir: str | Path) -> dict[str, Any]:
  """Fields of `data` whose null means what the run began with, and what that is; empty without a run."""
  file = Path(run_dir) / CONFIG_FILE
  if not file.is_file() or not _is_whole(file):
    return {}
  return _beginning_of(load_config(file))


def _beginning_of(recorded: Config) -> dict[str, Any]:
  given = given_fields(recorded.data)
  return {name: given.get(name, before) for name, before in _AS_BEGUN.items()}


def with_beginning(config: Config, begun: dict[str, Any]) -> Config:
  """The config with these values of `data` where it has null."""
  missing = {name: value for name, value in begun.items() if getattr(config.data, name) is None}
  if not missing:
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **missing))


def _is_whole(file: Path) -> bool:
  return file.read_text(encoding="utf-8", errors="replace").endswith(_END)
