"""Tokenises a corpus to disk once, so that it need not fit in memory (`ttt-jax data prepare`).

The metadata is written first, as unfinished, and again when all other files are on disk. So a directory
shows whether it is complete, and the next `prepare` replaces the files of one that was killed.
"""

import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Integer
from rich.console import Console

from ttt_jax.checkpoints.tokenizer import BYTES, load_tokenizer
from ttt_jax.data.boundaries import boundaries
from ttt_jax.data.files import METADATA, find_files
from ttt_jax.data.formats import checked_text_field, has_text_field, load_texts
from ttt_jax.data.prepared import (
  FORMAT,
  INDEX,
  INDEX_DTYPE,
  RECORD_TOKENS,
  SHARD_SUFFIX,
  load_metadata,
)
from ttt_jax.data.skipped import Skipped, stable_hash
from ttt_jax.data.tokens import fingerprint, token_dtype, tokenized
from ttt_jax.errors import UserError
from ttt_jax.files import unfinished_path, write_json
from ttt_jax.progress import Progress

_LINE_SECONDS = 10  # between two progress lines without a terminal


def prepare(
  source: str | None,
  destination: str | Path,
  *,
  tokenizer: str = BYTES,
  text_field: str | None = None,
  start_of_text: bool | None = None,
  end_of_text: bool | None = None,
  shard_bytes: int = 1 << 28,
  max_bad_records: int = 0,
  console: Console | None = None,
) -> dict[str, Any]:
  """Tokenises the texts of `source` into `destination`, for use as `data.path`; returns its metadata.

  Args:
    source: as `data.path`; files are loaded in the order of their names.
    destination: a directory that is new, empty, or left unfinished by an earlier call.
    tokenizer: as `data.tokenizer`.
    text_field: as `data.text_field`.
    start_of_text, end_of_text: as `data.start_of_text` and `data.end_of_text`; the metadata records
      the choice and the tokens.
    shard_bytes: the bytes of tokens in one file.
    max_bad_records: as `data.max_bad_records`.
    console: shows the progress.

  Raises:
    UserError: the destination is not such a directory; `source` cannot be loaded, or holds fewer than two
      texts or too many corrupt records; the tokenizer has no token for a requested boundary.
  """
  if shard_bytes <= 0:
    raise UserError(f"shard_bytes={shard_bytes} must be positive")
  console = Console(stderr=True) if console is None else console
  loaded = None if tokenizer == BYTES else load_tokenizer(tokenizer)
  added = boundaries(loaded, start_of_text=start_of_text, end_of_text=end_of_text, name=tokenizer)
  skipped = Skipped(max_bad_records)
  files = find_files(source, skipped, field="source")
  directory = Path(destination).expanduser()
  has_records = any(map(has_text_field, files.paths))
  text_field = checked_text_field(text_field, files)
  _clear(directory)
  metadata = {
    "format": FORMAT,
    "complete": False,
    "source": files.source,
    "tokenizer": tokenizer,
    "fingerprint": fingerprint(loaded),
    "text_field": text_field if has_records else "",
    "start_of_text": added.start is not None,
    "start_of_text_id": added.start,
    "end_of_text": added.end is not None,
    "end_of_text_id": added.end,
  }
  _write_metadata(directory, metadata)

  def texts() -> Iterator[tuple[str, bytes]]:
    for path in files.paths:
      yield from load_texts(path, files.name_of(path), text_field=text_field, skipped=skipped)
      progress.file_done()

  with (
    _Writer(directory, token_dtype(loaded).newbyteorder("<"), shard_bytes) as writer,
    _Progress(console, len(files.paths)) as progress,
  ):
    for name, tokens in tokenized(texts(), loaded, added):
      writer.add(name, tokens)
      progress.show(writer.documents, writer.tokens)
  if writer.documents < 2:
    raise UserError(
      f"source={source!r} holds {writer.documents} readable documents (skipped: {skipped}): give two or "
      "more, one to train on and one to hold out"
    )
  metadata |= {
    "complete": True,
    "documents": writer.documents,
    "tokens": writer.tokens,
    "shards": writer.shards,
    "index_crc": writer.index_crc,
    "skipped": skipped.counts(),
  }
  _write_metadata(directory, metadata)
  console.print(
    f"{directory}: {writer.documents:,} documents, {writer.tokens:,} tokens in {len(writer.shards)} "
    f"file{'s' if len(writer.shards) > 1 else ''}; skipped: {skipped}",
    highlight=False,
  )
  return metadata


def _clear(directory: Path) -> None:
  """Makes the directory, or deletes the files of an unfinished corpus in it."""
  if directory.exists() and not directory.is_dir():
    raise UserError(f"destination={str(directory)!r} is a file: give another one")
  directory.mkdir(parents=True, exist_ok=True)
  names = {path.name for path in directory.iterdir()} - {unfinished_path(directory / METADATA).name}
  if not names:
    return
  if METADATA not in names:
    raise UserError(f"destination={str(directory)!r} is not empty: give another one")
  if load_metadata(directory)["complete"]:
    raise UserError(
      f"destination={str(directory)!r} holds a prepared corpus already: delete it, or give another one"
    )
  for path in [*directory.glob(f"*{SHARD_SUFFIX}"), directory / INDEX]:
    path.unlink(missing_ok=True)


def _write_metadata(directory: Path, metadata: dict[str, Any]) -> None:
  write_json(directory / METADATA, metadata)


def _shard_name(number: int) -> str:
  return f"{number:05d}{SHARD_SUFFIX}"


class _Writer:
  """Writes shards and index, and counts for the metadata; all is on disk when the context ends."""

  def __init__(self, directory: Path, dtype: np.dtype, shard_bytes: int):
    self._directory = directory
    self._dtype = dtype
    self._shard_bytes = shard_bytes
    self._shard: ArrayRecordWriter | None = None
    self._size = 0  # bytes of tokens in the open shard
    self._rest = b""  # tokens that do not fill a record yet
    self.shards: list[dict[str, Any]] = []
    self.documents, self.tokens, self.index_crc = 0, 0, 0

  def __enter__(self) -> "_Writer":
    self._index = (self._directory / INDEX).open("wb")
    return self

  def __exit__(self, *exception) -> None:
    if self._rest:
      self._write(self._rest)
    self._close_shard()
    _sync(self._index)
    self._index.close()

  def add(self, name: str, tokens: Integer[np.ndarray, "T"]) -> None:
    data = self._rest + tokens.astype(self._dtype).tobytes()
    size = RECORD_TOKENS * self._dtype.itemsize
    whole = len(data) // size * size
    for start in range(0, whole, size):
      self._write(data[start : start + size])
    self._rest = data[whole:]
    entry = np.array([(stable_hash(name), tokens.size)], INDEX_DTYPE).tobytes()
    self._index.write(entry)
    self.index_crc = zlib.crc32(entry, self.index_crc)
    self.documents += 1
    self.tokens += tokens.size

  def _write(self, record: bytes) -> None:
    if self._shard is None:
      self.shards.append({"name": _shard_name(len(self.shards)), "records": 0})
      path = self._directory / self.shards[-1]["name"]
      # One record per chunk of the file, so that a record is loaded without its neighbours.
      self._shard = ArrayRecordWriter(str(path), "group_size:1")
    self._shard.write(record)
    self.shards[-1]["records"] += 1
    self._size += len(record)
    if self._size >= self._shard_bytes:
      self._close_shard()

  def _close_shard(self) -> None:
    if self._shard is None:
      return
    self._shard.close()
    self._shard, self._size = None, 0
    path = self._directory / self.shards[-1]["name"]
    with path.open("rb") as file:
      _sync(file)
    self.shards[-1]["bytes"] = path.stat().st_size


def _sync(file) -> None:
  file.flush()
  os.fsync(file.fileno())


class _Progress(Progress):
  """Shows files, documents and tokens: a bar on a terminal, elsewhere a line every few seconds."""

  def __init__(self, console: Console, files: int):
    super().__init__("reading", files, console=console)
    self._files, self._done = files, 0
    self._start = self._last = time.monotonic()

  def file_done(self) -> None:
    self._done += 1

  def show(self, documents: int, tokens: int) -> None:
    now = time.monotonic()
    speed = tokens / max(now - self._start, 1e-3)
    status = f"files  {documents:,} documents  {tokens:,} tokens  {speed:,.0f} tokens/s"
    self.update(self._done, status)
    if not self.draws_bar and now - self._last >= _LINE_SECONDS:
      self._last = now
      self.note(f"{self._done:,}/{self._files:,} {status}")
