"""Checkpoints of a run: one directory per step, written by Orbax in the background.

Arrays are stored under their path in the pytree, `model/blocks/0/w/value`, so that a checkpoint
depends on no Python class and can be restored onto any mesh. When to save is the trainer's business.
"""

import base64
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from jax.sharding import SingleDeviceSharding

_FORMAT = "ttt_jax/1"  # in the metadata of every checkpoint of ours
_ARRAYS = "arrays"  # the one item of a checkpoint
_MAX_NAMED = 10  # how many misfits an error spells out


class Checkpoints:
  """The checkpoints in a directory, of which the newest `keep` stay; a context manager.

  Orbax writes a step beside the others and renames it when it is complete, then deletes those too
  many: a killed process or a full disk leaves the older ones as they were. Until the first `save`
  nothing in the directory is created, changed or deleted.
  """

  def __init__(self, directory: str | Path, *, keep: int):
    self._directory = Path(directory).resolve()
    self._shown = str(directory)  # in messages: as the user wrote it
    self._keep = keep
    self._writer: ocp.training.Checkpointer | None = None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  @property
  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, ascending; waits for a save under way."""
    self.wait()
    if not self._directory.is_dir():
      return []
    # Orbax's unfinished directories are called 300.orbax-checkpoint-tmp.
    return sorted(
      int(path.name)
      for path in self._directory.iterdir()
      if path.name.isdecimal() and path.name == str(int(path.name))
    )

  @property
  def latest_step(self) -> int | None:
    """The newest complete checkpoint; waits for a save under way."""
    steps = self.steps
    return steps[-1] if steps else None

  def save(self, step: int, *, arrays: Any, data_state: dict[str, Any] | bytes) -> None:
    """Starts to write a checkpoint and returns once the arrays may be donated; see `wait`.

    A step that is there already is left as it is.

    Args:
      step: the number of steps done, which names the checkpoint.
      arrays: any pytree of arrays, none of them empty.
      data_state: where the data iterator stands: what its `get_state` gives, JSON-able or bytes.
    """
    if step in self.steps:
      return
    if self._writer is None:
      self._writer = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # reads no older checkpoint, so a damaged one does no harm
      )
    self._writer.save_checkpointables_async(
      step,
      {_ARRAYS: dict(_named_leaves(arrays))},
      force=True,
      custom_metadata={"format": _FORMAT, "data_state": _to_json(data_state)},
    )

  def restore(
    self, abstract_arrays: Any, step: int | None = None, *, partial: bool = False
  ) -> tuple[int, Any, dict[str, Any] | bytes]:
    """The step, the arrays and the data state of a checkpoint, by default the newest.

    Args:
      abstract_arrays: the pytree to fill, of `jax.ShapeDtypeStruct` or arrays. Each array is read
        onto the sharding of its leaf; without one, onto the first device.
      step: which checkpoint.
      partial: allow arrays in the checkpoint that `abstract_arrays` does not have, and leave them.

    Raises:
      ValueError: there is no such checkpoint, it is damaged or not ours, or its arrays are not
        those of `abstract_arrays`. Nothing has been changed.
    """
    steps = self.steps
    if not steps:
      raise ValueError(f"there is no checkpoint in {self._shown}")
    step = steps[-1] if step is None else step
    if step not in steps:
      raise ValueError(
        f"there is no checkpoint of step {step} in {self._shown}, but of {', '.join(map(str, steps))}"
      )
    path = self._directory / str(step)
    try:
      metadata = ocp.checkpointables_metadata(path)
      custom = metadata.custom_metadata or {}
      if custom.get("format") != _FORMAT or _ARRAYS not in metadata.metadata:
        raise ValueError("it has no metadata of ttt_jax")
      data_state = _from_json(custom["data_state"])
      saved = metadata.metadata[_ARRAYS]
    except Exception as error:
      raise self._unreadable(step, steps, error) from error

    wanted = {name: _abstract(leaf) for name, leaf in _named_leaves(abstract_arrays)}
    misfits = _misfits(saved, wanted, partial=partial)
    if misfits:
      more = len(misfits) - _MAX_NAMED
      raise ValueError(
        f"checkpoint {step} in {self._shown} is of another model or optimizer, {len(misfits)} "
        f"array{'s do' if len(misfits) > 1 else ' does'} not fit:\n  "
        + "\n  ".join(misfits[:_MAX_NAMED] + ([f"and {more} more"] if more > 0 else []))
        + "\nuse the config it was trained with, or another run_dir"
      )
    try:
      names = {name: wanted.get(name, ocp.PLACEHOLDER) for name in saved}
      arrays = ocp.load_checkpointables(path, {_ARRAYS: names})[_ARRAYS]
    except (jax.errors.JaxRuntimeError, MemoryError):
      raise  # out of memory, say: no fault of the checkpoint
    except Exception as error:
      raise self._unreadable(step, steps, error) from error
    return (
      step,
      jax.tree.unflatten(jax.tree.structure(abstract_arrays), [arrays[name] for name in wanted]),
      data_state,
    )

  def wait(self) -> None:
    """Returns when the last `save` is complete; raises what went wrong with it."""
    if self._writer is not None:
      self._writer.wait()

  def close(self) -> None:
    """Waits for the last `save`."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def _unreadable(self, step: int, steps: list[int], error: Exception) -> ValueError:
    earlier = [s for s in steps if s < step]
    then = f"to go on from step {earlier[-1]}" if earlier else "to start from step 0"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
      f"checkpoint {step} in {self._shown} is damaged or was not written by this version of ttt_jax "
      f"({reason[:200]}): delete {Path(self._shown) / str(step)} {then}, or choose another run_dir"
    )


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
  leaves = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
  assert len(dict(leaves)) == len(leaves), "two leaves with one path"
  return leaves


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _misfits(saved: dict[str, Any], wanted: dict[str, Any], *, partial: bool) -> list[str]:
  """A line for every array that is missing, too many, or of another shape or dtype."""

  def kind(x: Any) -> str:
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"

  lines = []
  for name, leaf in wanted.items():
    if name not in saved:
      lines.append(f"{name}: {kind(leaf)} expected, missing in the checkpoint")
    elif kind(saved[name]) != kind(leaf):
      lines.append(f"{name}: {kind(leaf)} expected, {kind(saved[name])} in the checkpoint")
  if not partial:
    lines += [
      f"{name}: not expected, {kind(leaf)} in the checkpoint"
      for name, leaf in saved.items()
      if name not in wanted
    ]
  return lines


def _to_json(state: dict[str, Any] | bytes) -> dict[str, Any]:
  if isinstance(state, bytes):
    return {"base64": base64.b64encode(state).decode("ascii")}
  return {"json": state}


def _from_json(data: dict[str, Any]) -> dict[str, Any] | bytes:
  return base64.b64decode(data["base64"]) if "base64" in data else data["json"]
