"""Saves and restores the checkpoints of a run: one directory per step, written by Orbax in the background.

Arrays are stored under their path in the pytree, `model/blocks/0/w/value`, so that a checkpoint depends on
no Python class and can be restored onto any mesh. The trainer decides when to save.

A restore first verifies the files. It always compares sizes, which costs nothing and finds files that are
missing, cut short or of another save. With `verify="checksums"` it also finds changed bits;
for that, every process loads the files that it wrote again after each save, and its share of all files
before each restore. Without checksums changed bits are found in the index and in arrays small enough to be
stored in it, whose checksums TensorStore compares; larger arrays come back changed.
"""

import base64
import json
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import SingleDeviceSharding

from ttt_jax.checkpoints.damage import cause_of, is_damage, reason
from ttt_jax.config import CheckpointConfig
from ttt_jax.config.training import VERIFY
from ttt_jax.errors import UserError
from ttt_jax.files import write_text
from ttt_jax.parallel.processes import is_main, on_every_process
from ttt_jax.parallel.trees import named_leaves

# Since format 2 a file's checksum may be null, or be in the file of the process that wrote it.
_FORMAT, _READABLE = "ttt_jax/2", ("ttt_jax/1", "ttt_jax/2")
_ARRAYS = "arrays"  # Orbax's directory in a checkpoint
# Our record: the data state, dtype and shape of the arrays, size and checksum of every file.
_RECORD = "ttt_jax.json"
_CHECKSUMS = "ttt_jax.checksums.{}.json"  # written by each process except the first
_WRITER = re.compile(r"ocdbt\.process_(\d+)/")  # in a file's path: the process that wrote it
_TMP_SUFFIX = ".orbax-checkpoint-tmp"
_SMALL = 1 << 16  # bytes of a file whose checksum costs nothing: it is always compared
_MAX_NAMED = 10  # mismatches that an error lists


class Checkpoints:
  """Manages the checkpoints in a directory: keeps the newest `keep` and those of every `keep_every` steps.

  This class is a context manager. Orbax writes a checkpoint beside the others, renames it when complete and
  then deletes old ones, so a killed process or a full disk leaves the older checkpoints intact. Until the
  first `save` nothing in the directory is created, changed or deleted. If several processes share the
  directory, all must call every method, and each saves and restores its own parts of the arrays.

  Args:
    directory: the directory of the checkpoints.
    keep, keep_every: which checkpoints are kept, as in `CheckpointConfig`.
    verify: "sizes" or "checksums": what a save records of the files, and what a restore compares.
  """

  def __init__(
    self,
    directory: str | Path,
    *,
    keep: int,
    keep_every: int | None = None,
    verify: str = "sizes",
  ):
    if verify not in VERIFY:
      raise UserError(f"verify={verify!r} is not one of {', '.join(map(repr, VERIFY))}")
    self._with_checksums = verify == "checksums"
    self._directory = Path(directory).resolve()
    self._shown_path = Path(directory)  # for messages, as the user wrote it
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if keep_every is not None:
      kept.append(policies.EveryNSteps(keep_every))
    self._preservation = policies.AnyPreservationPolicy(kept)
    self._writer: ocp.training.Checkpointer | None = None
    self._saving: tuple[int, dict[str, Any]] | None = None  # the last save's step and record
    self._checksums_pending = False  # for this process's files of the last save

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  @property
  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, ascending, after a running save has ended."""
    self.wait()
    if not self._directory.is_dir():
      return []
    names = [path.name for path in self._directory.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

  @property
  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint, after a running save has ended."""
    steps = self.steps
    return steps[-1] if steps else None

  def save(
    self,
    step: int,
    *,
    arrays: Any,
    data_state: dict[str, Any] | bytes,
    config: dict[str, Any] | None = None,
  ) -> None:
    """Starts to write a checkpoint and returns once the arrays may be donated; see `wait`.

    An existing checkpoint of the step is not overwritten.

    Args:
      step: the number of completed steps, which names the checkpoint.
      arrays: a pytree of arrays, none of them empty.
      data_state: the state of the data iterator (`get_state`), JSON-able or bytes.
      config: the run's config, stored as information.
    """
    if step in self.steps:
      return
    named = named_leaves(arrays)
    record = {
      "format": _FORMAT,
      "data_state": _to_json(data_state),
      "config": config,
      "arrays": {name: _dtype_and_shape(leaf) for name, leaf in named.items()},
    }
    json.dumps(record)  # a data state that is not JSON-able fails here, not in the background
    self._saving = (step, record)
    self._checksums_pending = self._with_checksums and not is_main()
    if self._writer is None:
      self._writer = self._open_writer()
    self._writer.save_checkpointables_async(step, {_ARRAYS: named}, force=True)

  def restore(
    self, abstract_arrays: Any, step: int | None = None, *, partial: bool = False
  ) -> tuple[int, Any, dict[str, Any] | bytes]:
    """Returns the step, the arrays and the data state of a checkpoint, by default the newest.

    Args:
      abstract_arrays: the pytree to fill, of `jax.ShapeDtypeStruct` or arrays. Each array is restored
        onto the sharding of its leaf; without a sharding, onto the first device.
      step: the step of the checkpoint.
      partial: ignore arrays of the checkpoint that `abstract_arrays` does not have.

    Raises:
      UserError: there is no such checkpoint, it is damaged or not ours, or its arrays do not match
        `abstract_arrays`. If one process finds this, all raise. Nothing has been changed.
    """
    steps = self.steps
    if not steps:
      raise UserError(f"there is no checkpoint in {self._shown_path}")
    step = steps[-1] if step is None else step
    if step not in steps:
      raise UserError(
        f"there is no checkpoint of step {step} in {self._shown_path}, only of {', '.join(map(str, steps))}"
      )
    path = self._directory / str(step)
    try:
      record = on_every_process(lambda: _load_record(path))
      on_every_process(lambda: self._verify(path, record["files"]))
    except UserError as error:
      raise self._damaged(step, steps, error) from error

    wanted = named_leaves(abstract_arrays)
    mismatches = _mismatches(record["arrays"], wanted, partial=partial)
    if mismatches:
      rest = len(mismatches) - _MAX_NAMED
      lines = mismatches[:_MAX_NAMED] + ([f"and {rest} more"] if rest > 0 else [])
      raise UserError(
        f"checkpoint {step} in {self._shown_path} is of another model or optimizer: {len(mismatches)} "
        f"array{'s do' if len(mismatches) > 1 else ' does'} not fit\n  "
        + "\n  ".join(lines)
        + "\nuse the config it was trained with, or another run_dir"
      )
    targets = {
      name: _abstract_leaf(wanted[name]) if name in wanted else ocp.PLACEHOLDER
      for name in record["arrays"]
    }
    try:
      arrays = ocp.load_checkpointables(path, {_ARRAYS: targets})[_ARRAYS]
    except Exception as error:
      cause = cause_of(error)
      if is_damage(cause):
        raise self._damaged(step, steps, cause) from error
      # For example a lack of memory or another mesh: nothing to delete.
      cause.add_note(f"while checkpoint {step} in {self._shown_path} was restored")
      raise cause from None
    restored = jax.tree.unflatten(
      jax.tree.structure(abstract_arrays), [arrays[name] for name in wanted]
    )
    return step, restored, _from_json(record["data_state"])

  def wait(self) -> None:
    """Waits until the last `save` is complete.

    Raises:
      UserError: the checkpoint could not be written, for example because the disk is full.
    """
    if self._writer is not None:
      try:
        self._writer.wait()
      except (OSError, ValueError) as error:
        raise UserError(
          f"checkpoint {self._saving[0]} could not be written to {self._shown_path}, the "
          f"earlier ones are intact: {reason(error)}"
        ) from error
      if self._checksums_pending:
        self._checksums_pending = False
        self._write_checksums(self._directory / str(self._saving[0]))

  def close(self) -> None:
    """Waits for the last `save`, with the errors of `wait`."""
    try:
      self.wait()
    finally:
      if self._writer is not None:
        writer, self._writer = self._writer, None
        writer.close()

  def _open_writer(self) -> ocp.training.Checkpointer:
    context = ocp.Context()
    # A lambda, since Orbax deep-copies its options, and with a bound method its object.
    context.asynchronous.post_finalization_callback = lambda: self._write_record()
    return ocp.training.Checkpointer(
      self._directory,
      context=context,
      preservation_policy=self._preservation,
      cleanup_tmp_directories=True,
    )

  def _write_record(self) -> None:
    """Writes our record; Orbax calls this on the first process before it renames the complete directory.

    The record has the checksums of small files, such as Orbax's descriptions of the arrays, and of those
    that the first process wrote; the other processes write theirs later (`_write_checksums`).
    """
    step, record = self._saving
    path = self._directory / f"{step}{_TMP_SUFFIX}"
    files = {}
    for name, file in _array_files(path).items():
      size = file.stat().st_size
      is_checked = size <= _SMALL or (self._with_checksums and _writing_process(name) == 0)
      files[name] = [size, _crc(file) if is_checked else None]
    (path / _RECORD).write_text(json.dumps({**record, "files": files}, indent=1))

  def _write_checksums(self, path: Path) -> None:
    """Writes the checksums of the files that this process wrote, unless the checkpoint is deleted."""
    if not path.is_dir():
      return
    process = jax.process_index()
    checksums = {
      name: _crc(file)
      for name, file in _array_files(path).items()
      if _writing_process(name) == process
    }
    write_text(path / _CHECKSUMS.format(process), json.dumps(checksums))

  def _verify(self, path: Path, files: dict[str, tuple[int, int | None]]) -> None:
    """Compares this process's share of a checkpoint's files with its record.

    Raises:
      UserError: a file has changed, is missing or cannot be read.
    """
    unchecked = [name for name, (_, crc) in files.items() if crc is None]
    if self._with_checksums and unchecked and is_main():
      warnings.warn(
        f"{len(unchecked)} of the {len(files)} files of {path} have no checksum "
        "(checkpoint.verify was 'sizes' when they were written, or the run was killed): only their "
        "sizes are compared",
        stacklevel=5,
      )
    # Dealt out from the largest file on, so that all processes load about as many bytes.
    by_size = sorted(files.items(), key=lambda item: (-item[1][0], item[0]))
    for name, (size, crc) in by_size[jax.process_index() :: jax.process_count()]:
      file = path / name
      try:
        if not file.is_file():
          raise UserError(f"{name} is missing")
        if file.stat().st_size != size:
          raise UserError(f"{name} has {file.stat().st_size} bytes instead of {size}")
        is_checked = crc is not None and (self._with_checksums or size <= _SMALL)
        if is_checked and _crc(file) != crc:
          raise UserError(f"{name} has changed")
      except OSError as error:
        raise UserError(f"{name} cannot be read: {reason(error)}") from error

  def _damaged(self, step: int, steps: list[int], error: BaseException) -> UserError:
    earlier = [s for s in steps if s < step]
    consequence = f"to go on from step {earlier[-1]}" if earlier else "to start from step 0"
    return UserError(
      f"checkpoint {step} in {self._shown_path} is damaged or was not written by this version of ttt_jax "
      f"({reason(error)}): delete {self._shown_path / str(step)} {consequence}, or choose another run_dir"
    )


def open_checkpoints(config: CheckpointConfig, run_dir: Path) -> Checkpoints:
  """Opens the checkpoints of a run."""
  return Checkpoints(
    run_dir / "checkpoints", keep=config.keep, keep_every=config.keep_every, verify=config.verify
  )


def _load_record(path: Path) -> dict[str, Any]:
  """Loads the record of a checkpoint; `files` maps each file name to size and checksum.

  Raises:
    UserError: the checkpoint has no record of this library.
  """
  record = _load_json(path / _RECORD)
  if record.get("format") not in _READABLE:
    raise UserError(f"{_RECORD} is not of the format {_FORMAT}")
  files = {name: tuple(size_and_crc) for name, size_and_crc in record["files"].items()}
  for others in sorted(path.glob(_CHECKSUMS.format("*"))):
    for name, crc in _load_json(others).items():
      if name in files:
        files[name] = (files[name][0], crc)
  return {**record, "files": files}


def _load_json(file: Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text())
  except FileNotFoundError:
    raise UserError(f"it has no {file.name}") from None
  except OSError as error:
    raise UserError(f"{file.name} cannot be read: {reason(error)}") from error
  except ValueError:
    raise UserError(f"{file.name} is not JSON") from None
  if not isinstance(value, dict):
    raise UserError(f"{file.name} is not of the format {_FORMAT}")
  return value


def _array_files(path: Path) -> dict[str, Path]:
  """Returns the files of the arrays by their name in the record."""
  return {
    file.relative_to(path).as_posix(): file
    for file in sorted((path / _ARRAYS).rglob("*"))
    if file.is_file()
  }


def _writing_process(name: str) -> int:
  """Returns the process that wrote a file and checks it; for a file of several, the first process."""
  found = _WRITER.search(name)
  process = int(found[1]) if found else 0
  return process if process < jax.process_count() else 0


def _crc(file: Path) -> int:
  crc = 0
  with file.open("rb") as stream:
    while chunk := stream.read(1 << 20):
      crc = zlib.crc32(chunk, crc)
  return crc


def _dtype_and_shape(x: Any) -> str:
  return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _mismatches(saved: dict[str, str], wanted: dict[str, Any], *, partial: bool) -> list[str]:
  """Returns a line for every array that is missing, unexpected, or of another shape or dtype."""
  lines = []
  for name, leaf in wanted.items():
    if name not in saved:
      lines.append(f"{name}: {_dtype_and_shape(leaf)} expected, missing in the checkpoint")
    elif saved[name] != _dtype_and_shape(leaf):
      lines.append(f"{name}: {_dtype_and_shape(leaf)} expected, {saved[name]} in the checkpoint")
  if not partial:
    lines += [
      f"{name}: {kind} in the checkpoint, not expected"
      for name, kind in saved.items()
      if name not in wanted
    ]
  return lines


def _to_json(state: dict[str, Any] | bytes) -> dict[str, Any]:
  if isinstance(state, bytes):
    return {"base64": base64.b64encode(state).decode("ascii")}
  return {"json": state}


def _from_json(data: dict[str, Any]) -> dict[str, Any] | bytes:
  return base64.b64decode(data["base64"]) if "base64" in data else data["json"]
