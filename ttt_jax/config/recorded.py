"""The config that a run records in its directory, for whoever resumes or evaluates it."""

import dataclasses
from pathlib import Path
from typing import Any

from ttt_jax.config.run import Config
from ttt_jax.config.yaml import dump_config, flatten, load_config, read_yaml
from ttt_jax.errors import UserError
from ttt_jax.files import write_text

CONFIG_FILE = "config.yaml"
# The last line of a config that was written whole: what it lacks, its version of ttt_jax did not have.
_END = "# end of the config\n"
# Null in these is what the run began with; a version of ttt_jax that did not have them began with this.
_AS_BEGUN = {"data.start_of_text": None, "data.end_of_text": False}


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
  return with_beginning(load_config(file), beginning(run_dir))


def beginning(run_dir: str | Path) -> dict[str, Any]:
  """Fields whose null means what the run began with, and what that is; empty where no run was begun."""
  file = Path(run_dir) / CONFIG_FILE
  if not file.is_file() or not _is_whole(file):
    return {}
  recorded = dict(flatten(read_yaml(file)))
  return {name: recorded.get(name, before) for name, before in _AS_BEGUN.items()}


def with_beginning(config: Config, begun: dict[str, Any]) -> Config:
  """The config with these values where it has null."""
  for name, value in begun.items():
    section, field = name.split(".")
    values = getattr(config, section)
    if getattr(values, field) is None:
      values = dataclasses.replace(values, **{field: value})
      config = dataclasses.replace(config, **{section: values})
  return config


def _is_whole(file: Path) -> bool:
  return file.read_text(encoding="utf-8", errors="replace").endswith(_END)
