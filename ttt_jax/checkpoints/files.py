"""Reads and writes the files of a checkpoint: safetensors tensor by tensor, JSON, paths and hub names.

The `safetensors` library checks every file. We read bytes by seeking, because the pages of the library's
memory map count as memory of the process, and write without the library, which needs all tensors at once.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.files import write_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_OTHER_MODELS = (CONFIG, WEIGHTS, INDEX, "config.yaml")  # config.yaml is a run's
SHARD_BYTES = 5_000_000_000  # largest file that is written, as in transformers

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)  # as llama.cpp names split files
_HEADER_LENGTH = struct.Struct("<Q")  # the first bytes of a safetensors file
_ALIGNMENT = 64  # bytes; JAX uses arrays aligned like this on a CPU without a copy


class StoredTensor(NamedTuple):
  """Describes a tensor in a file; `read` loads its numbers."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def load_json(path: Path) -> dict[str, Any]:
  """Loads the object in a JSON file; a byte order mark is ignored.

  Raises:
    UserError: the file does not exist or holds no JSON object.
  """
  try:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
  except FileNotFoundError:
    raise UserError(f"{path} does not exist") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON: {error}") from None
  if not isinstance(data, dict):
    raise UserError(f"{path} holds no JSON object but {type(data).__name__}")
  return data


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a directory's `model.safetensors`, or of the files that its index names.

  Raises:
    UserError: the directory has no tensors, a file is missing or damaged, or the index names a file
      outside of the directory.
  """
  if (directory / WEIGHTS).is_file():
    return open_safetensors(directory / WEIGHTS)
  if not (directory / INDEX).is_file():
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    remedy = ""
    if pickled:
      remedy = (
        f"; {', '.join(pickled[:3])} is a pickle, which could execute code: load it in transformers "
        "and save it with safe_serialization=True"
      )
    raise UserError(f"{directory} has neither {WEIGHTS} nor {INDEX}{remedy}")
  weight_map = load_json(directory / INDEX).get("weight_map")
  if not isinstance(weight_map, dict):
    raise UserError(f"{directory / INDEX} has no weight_map: it is not an index of tensors")
  tensors = {}
  for name in sorted(set(map(str, weight_map.values()))):
    for tensor, stored in open_safetensors(_indexed_file(directory, name)).items():
      if tensor in tensors:
        raise UserError(f"{directory / INDEX}: {tensor} is in two files, one is {name}: delete one")
      tensors[tensor] = stored
  lost = sorted(set(weight_map) - set(tensors))
  if lost:
    raise UserError(
      f"{directory / INDEX} names {len(lost)} tensors that are in none of its files, "
      f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: the download is incomplete, repeat it"
    )
  return tensors


def _indexed_file(directory: Path, name: str) -> Path:
  """Returns the file an index names; it must lie in the directory, or in the blobs of a hub cache."""
  path = directory / name
  root = directory.resolve()
  allowed = [root]
  if root.parent.name == "snapshots":  # a hub cache: snapshots/REVISION/NAME -> blobs/HASH
    allowed.append(root.parent.parent / "blobs")
  inside = any(path.resolve().is_relative_to(place) for place in allowed)
  if Path(name).is_absolute() or ".." in Path(name).parts or not inside:
    raise UserError(
      f"{directory / INDEX} names {name!r}, which lies outside of {directory}: it is not read"
    )
  if not path.is_file():
    raise UserError(f"{directory / INDEX} names {name!r}, which is not there: download it too")
  return path


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
  """Returns the tensors of a file.

  Raises:
    UserError: the file is cut short or damaged.
    UnsupportedError: a tensor does not hold floats.
  """
  check_safetensors(path)
  with path.open("rb") as file:
    (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
    header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  foreign = sorted({entry["dtype"] for entry in header.values()} - set(_DTYPES))
  if foreign:
    raise UnsupportedError(
      f"{path} holds tensors of dtype {', '.join(foreign)}: there are {', '.join(_DTYPES)}; "
      "load a checkpoint that is not quantised"
    )
  start = _HEADER_LENGTH.size + length
  return {name: _stored(path, start, entry) for name, entry in header.items()}


def check_safetensors(path: Path) -> None:
  """Raises UserError if the library finds the file cut short or damaged, or cannot read it."""
  try:
    with safe_open(path, framework="numpy"):
      pass
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  except SafetensorError as error:
    raise UserError(
      f"{path} is cut short or damaged ({error}): download or write it again"
    ) from error


def _stored(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
  shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
  begin, _ = entry["data_offsets"]

  def read() -> np.ndarray:
    array = aligned_empty(shape, dtype)
    with path.open("rb", buffering=0) as file:
      file.seek(start + begin)
      unread = memoryview(array.reshape(-1).view(np.uint8))
      while unread:
        count = file.readinto(unread)
        if not count:
          raise UserError(f"{path} has been cut short while it was loaded: download it again")
        unread = unread[count:]
    return array

  return StoredTensor(shape, dtype, read)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Allocates an array at an address that JAX on a CPU can use in place."""
  size = int(np.prod(shape)) * dtype.itemsize
  buffer = np.empty(size + _ALIGNMENT, np.uint8)
  offset = -buffer.ctypes.data % _ALIGNMENT
  return buffer[offset : offset + size].view(dtype).reshape(shape)


def write_safetensors(
  directory: Path,
  kinds: dict[str, tuple[tuple[int, ...], np.dtype]],
  arrays: Iterable[np.ndarray],
) -> None:
  """Writes tensors in files of at most `SHARD_BYTES`, with an index if there are several.

  Args:
    directory: the directory of the files.
    kinds: shape and dtype of every tensor, by name.
    arrays: the tensors in the order of `kinds`; each is written before the next is requested.
  """
  shards = _split(kinds, SHARD_BYTES)
  names = [WEIGHTS]
  if len(shards) > 1:
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
  arrays = iter(arrays)
  for name, shard in zip(names, shards):
    with (directory / name).open("wb") as file:
      file.write(_header({tensor: kinds[tensor] for tensor in shard}))
      for _, array in zip(shard, arrays):
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
      file.flush()
      os.fsync(file.fileno())
    check_safetensors(directory / name)
  if len(shards) > 1:
    total = sum(_size(*kind) for kind in kinds.values())
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX, index)


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
  return int(np.prod(shape)) * dtype.itemsize


def _split(kinds: dict[str, tuple[tuple[int, ...], np.dtype]], limit: int) -> list[list[str]]:
  shards, filled = [[]], 0
  for name, kind in kinds.items():
    if shards[-1] and filled + _size(*kind) > limit:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += _size(*kind)
  return shards


def _header(kinds: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
  end = 0
  for name, (shape, dtype) in kinds.items():
    begin, end = end, end + _size(shape, dtype)
    header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)  # tensors begin aligned
  return _HEADER_LENGTH.pack(len(text)) + text


def is_gguf(path: Path) -> bool:
  """Tells whether a path has the suffix of a GGUF file."""
  return path.suffix.lower() == ".gguf"


def gguf_parts(path: Path) -> list[Path]:
  """Returns the paths of all parts of a split GGUF file, existing or not; for any other file, its path."""
  named = _PART.search(path.name)
  if named is None:
    return [path]
  stem, ending = path.name[: named.start()], path.suffix
  count = int(named[2])
  return [path.with_name(f"{stem}-{i:05}-of-{count:05}{ending}") for i in range(1, count + 1)]


def gguf_models(directory: Path) -> list[Path]:
  """Returns the GGUF files in a directory; of a split file, the first part."""
  files = (path for path in directory.iterdir() if is_gguf(path) and path.is_file())
  return sorted({gguf_parts(path)[0] for path in files})


def local_path(path: str | Path) -> Path:
  """Returns the path, or the download directory of the hub model of that name.

  If a directory is neither a Hugging Face model nor a run but holds one GGUF model, returns that file.

  Raises:
    UserError: the path does not exist, and no model of that name can be downloaded.
  """
  local = Path(path).expanduser()
  if local.exists():
    return _model_path(local)
  parts = str(path).split("/")
  if len(parts) != 2 or not all(parts) or parts[0].startswith((".", "~")):
    raise UserError(f"{str(path)!r} does not exist: give a directory, a .gguf file or a hub name")
  try:
    from huggingface_hub import snapshot_download
  except ImportError:
    raise UserError(
      f"{str(path)!r} does not exist; if it is a model on the hub: pip install huggingface_hub"
    ) from None
  try:
    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
  except (OSError, ValueError) as error:
    raise UserError(
      f"{str(path)!r} does not exist here, and could not be downloaded from the hub: "
      f"{str(error).splitlines()[0]}"
    ) from error


def _model_path(path: Path) -> Path:
  if not path.is_dir() or any((path / name).is_file() for name in _OTHER_MODELS):
    return path
  models = gguf_models(path)
  return models[0] if len(models) == 1 else path
