"""Writes a run's config to its directory, and loads that config to resume or evaluate the run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ttt_jax.config.given import given_fields
from ttt_jax.config.run import Config
from ttt_jax.config.yaml import dump_config, load_fields, make_config
from ttt_jax.errors import UserError
from ttt_jax.files import write_text

CONFIG_FILE = "config.yaml"
# The last line of a complete file. A field missing above it did not exist in the version that wrote it.
_END = "# end of the config\n"
# Fields of `data` in which null means the recorded value of the run, and the value of runs that a version
# of ttt_jax without these fields recorded.
_DATA_FIELDS = {"start_of_text": None, "end_of_text": False, "text_field": None}


def record_config(run_dir: str | Path, config: Config) -> None:
  """Writes `config.yaml`."""
  write_text(Path(run_dir) / CONFIG_FILE, dump_config(config) + _END)


def recorded_config(run_dir: str | Path) -> Config:
  """Loads the config that a run recorded; fields unknown to its version keep that version's behaviour.

  Raises:
    UserError: there is no such file, or it was cut short.
  """
  file = Path(run_dir) / CONFIG_FILE
  if not file.is_file():
    raise UserError(f"run_dir={str(run_dir)!r} has no checkpoints: train there first")
  if not _is_complete(file):
    # Fields that were cut off must not silently become defaults.
    raise UserError(
      f"{file} is damaged, its last line is not {_END.strip()!r}: give another --run_dir, or add that "
      "line if the file is complete otherwise"
    )
  config = make_config(recorded_fields(run_dir))
  return with_recorded(config, recorded_data_of(config))


def recorded_fields(run_dir: str | Path) -> dict[str, Any]:
  """Loads the fields that a run recorded, as nested mappings; what older versions wrote is translated."""
  fields = load_fields(Path(run_dir) / CONFIG_FILE)
  if fields.get("train", {}).get("clip_grad_norm") == math.inf:
    fields["train"]["clip_grad_norm"] = None
  return fields


def recorded_data(run_dir: str | Path) -> dict[str, Any]:
  """Returns the fields of `data` that stand for null in a run's config; empty without a run."""
  file = Path(run_dir) / CONFIG_FILE
  if not file.is_file() or not _is_complete(file):
    return {}
  return recorded_data_of(make_config(recorded_fields(run_dir)))


def recorded_data_of(recorded: Config) -> dict[str, Any]:
  """Returns the fields of `data` that stand for null in the config of a run that recorded this one."""
  given = given_fields(recorded.data)
  return {name: given.get(name, older) for name, older in _DATA_FIELDS.items()}


def with_recorded(config: Config, fields: dict[str, Any]) -> Config:
  """Returns the config with these values of `data` in place of null."""
  missing = {name: value for name, value in fields.items() if getattr(config.data, name) is None}
  if not missing:
    return config
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **missing))


def _is_complete(file: Path) -> bool:
  return file.read_text(encoding="utf-8", errors="replace").endswith(_END)
