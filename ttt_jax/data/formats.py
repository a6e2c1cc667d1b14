"""Loads the texts of a file (plain text, JSON, parquet, ArrayRecord), one text in memory at a time.

A text is UTF-8 and not empty. Its name is the file's path below the source's root, or PATH:RECORD, counted
from 1, if a file holds several. Everything else is counted and skipped. A byte order mark before UTF-8 is
not part of the text.
"""

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain

from ttt_jax.data.files import Files, compression_of, format_of
from ttt_jax.data.parquet import parquet_texts
from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError

_CONTROL = re.compile(
  rb"[\x00-\x08\x0e-\x1f\x7f]"
)  # characters of protobufs that do not occur in text
_ENCODINGS = {  # UTF-32 first: its mark begins with UTF-16's mark
  codecs.BOM_UTF32_LE: "UTF-32",
  codecs.BOM_UTF32_BE: "UTF-32",
  codecs.BOM_UTF16_LE: "UTF-16",
  codecs.BOM_UTF16_BE: "UTF-16",
}
_MAX_NAMED = 12  # field names that a message lists
ZSTD_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
_ZSTD_WINDOW = 31  # log2 of bytes, `zstd --long=31`: common in archives of web text


class _Skip(NamedTuple):
  reason: str
  note: str | None = None


def load_texts(
  path: Path, name: str, *, text_field: str, skipped: Skipped
) -> Iterator[tuple[str, bytes]]:
  """Yields the texts of one file with their names.

  Args:
    text_field: the field of a record that holds the text; `meta.text` is the field `text` inside `meta`.

  Raises:
    UserError: there are too many corrupt records, a parquet or ArrayRecord file has no texts, or pyarrow or
      zstd is missing.
  """
  if not path.is_file():  # a broken link; or a pipe, which would block
    skipped.add("unreadable")
    return
  reader = _readers().get(format_of(path), _plain_text)
  for record, text in reader(path, text_field, skipped):
    place = name if record is None else f"{name}:{record}"
    if isinstance(text, _Skip):
      skipped.add(text.reason, note=None if text.note is None else f"{place} {text.note}")
    else:
      yield place, text


def has_text_field(path: Path) -> bool:
  """Tells whether a file holds records, whose text is in a field."""
  return format_of(path) in _readers()


def checked_text_field(given: str | None, files: Files) -> str:
  """Returns the field to load from files with records: the given one, or "text".

  Raises:
    UserError: a field is given, and no file has records with fields.
  """
  if given is not None and not any(map(has_text_field, files.paths)):
    raise UserError(
      f"text_field={given!r} has no effect, no file of {files.source!r} has records with fields: leave "
      "it out"
    )
  return "text" if given is None else given


def _readers() -> dict[
  str | None, Callable[[Path, str, Skipped], Iterator[tuple[int, bytes | _Skip]]]
]:
  """Returns the readers of files that hold records, by format."""
  return {
    ".parquet": _parquet,
    ".array_record": _array_record,
    ".jsonl": _jsonl,
    ".json": _json,
  }


def _open(path: Path) -> io.BufferedIOBase:
  match compression_of(path):
    case ".gz":
      return gzip.open(path)
    case ".bz2":
      return bz2.open(path)
    case ".xz":
      return lzma.open(path)
    case ".zst":
      zstd = _zstd(path)
      longest = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW}
      return zstd.open(path, options=longest)
  return path.open("rb")


def _load_errors(path: Path) -> tuple[type[Exception], ...]:
  """Returns the errors that a file raises if it is cut short, damaged or unreadable."""
  errors = (OSError, EOFError, zlib.error, lzma.LZMAError)
  return (*errors, _zstd(path).ZstdError) if compression_of(path) == ".zst" else errors


def _zstd(path: Path):
  try:
    return importlib.import_module(ZSTD_MODULE)
  except ModuleNotFoundError as error:
    raise UserError(
      f"{path} is compressed with zstd, which needs {ZSTD_MODULE}: pip install 'ttt_jax[zstd]'"
    ) from error


def _other_encoding(file: io.BufferedIOBase) -> str | None:
  """Skips a byte order mark of UTF-8; returns the name of another encoding if the file has its mark."""
  start = file.read(4)
  for mark, encoding in _ENCODINGS.items():
    if start.startswith(mark):
      return encoding
  file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
  return None


def _wrong_encoding(encoding: str) -> _Skip:
  return _Skip("undecodable", f"is {encoding}, not UTF-8")


def _plain_text(
  path: Path, text_field: str, skipped: Skipped
) -> Iterator[tuple[None, bytes | _Skip]]:
  try:
    with _open(path) as file:
      encoding = _other_encoding(file)
      data = b"" if encoding else file.read()
  except _load_errors(path):
    skipped.add("unreadable")
    return
  yield None, _wrong_encoding(encoding) if encoding else _text(data)


def _jsonl(
  path: Path, text_field: str, skipped: Skipped
) -> Iterator[tuple[int | None, bytes | _Skip]]:
  number = 0
  try:
    with _open(path) as file:
      encoding = _other_encoding(file)
      if encoding:
        yield None, _wrong_encoding(encoding)
        return
      for number, line in enumerate(file, start=1):
        yield number, _json_text(line, text_field)
  except _load_errors(path):
    skipped.add("unreadable")
    return
  if number == 0:
    skipped.add("empty")


def _json(
  path: Path, text_field: str, skipped: Skipped
) -> Iterator[tuple[int | None, bytes | _Skip]]:
  """Yields the texts of JSON lines, as in C4 and Dolma, or of one record or an array, loaded whole."""
  try:
    with _open(path) as file:
      encoding = _other_encoding(file)
      first = b"" if encoding else file.readline()
      rest = b"" if _is_json_type(first, dict) else file.read()
  except _load_errors(path):
    skipped.add("unreadable")
    return
  if encoding:
    yield None, _wrong_encoding(encoding)
    return
  lines = rest.rstrip().rsplit(b"\n", 1)
  if _is_json_type(first, dict) or (_is_json_type(lines[-1], dict) and len(lines) > 1):
    yield from _jsonl(path, text_field, skipped)
    return
  record = _parse_json(first + rest)
  records = record if isinstance(record, list) else [record]
  for number, fields in enumerate(records, start=1):
    yield number, fields if isinstance(fields, _Skip) else _field_text(fields, text_field)
  if not records:
    skipped.add("empty")


def _is_json_type(data: bytes, kind: type) -> bool:
  return isinstance(_parse_json(data), kind)


def _parquet(path: Path, text_field: str, skipped: Skipped) -> Iterator[tuple[int, bytes | _Skip]]:
  for row, text in parquet_texts(path, text_field, skipped):
    yield row, _Skip("missing_text_field") if text is None else _text(text)


def _array_record(
  path: Path, text_field: str, skipped: Skipped
) -> Iterator[tuple[int, bytes | _Skip]]:
  try:
    records = grain.sources.ArrayRecordDataSource(str(path))
  except RuntimeError as error:
    skipped.add_corrupt(str(path), error)
    return
  is_json = None
  for number in range(1, len(records) + 1):
    try:
      record = records[number - 1].removeprefix(codecs.BOM_UTF8)
    except RuntimeError as error:
      skipped.add_corrupt(f"{path}, record {number}", error)
      continue
    if is_json is None:
      is_json = _holds_json(record, f"{path}, record {number}", text_field)
    if is_json:
      yield number, _json_text(record, text_field)
    else:
      yield number, _Skip("undecodable") if _CONTROL.search(record) else _text(record)


def _holds_json(record: bytes, place: str, text_field: str) -> bool:
  """Tells JSON from plain text by one record; raises UserError if it is neither."""
  try:
    fields = json.loads(record)
  except (ValueError, RecursionError):
    fields = None
  if isinstance(fields, dict):
    if isinstance(_field(fields, text_field), str):
      return True
    raise UserError(
      f"{place} is JSON without a text {text_field!r}: set data.text_field to one of "
      f"{_field_names(fields)}"
    )
  if _CONTROL.search(record) or isinstance(_text(record), _Skip):
    raise UserError(
      f"{place} is neither UTF-8 text nor JSON with a field {text_field!r}, the two supported kinds: "
      "convert TensorFlow examples and tokens of other programs to one of them"
    )
  return False


def _text(data: bytes) -> bytes | _Skip:
  """Returns `data` if it is UTF-8 and not empty."""
  try:
    data.decode()
  except UnicodeDecodeError:
    return _Skip("undecodable", "is not UTF-8")
  return data or _Skip("empty")


def _json_text(record: bytes, text_field: str) -> bytes | _Skip:
  """Returns the text of a JSON object as UTF-8."""
  fields = _parse_json(record)
  return fields if isinstance(fields, _Skip) else _field_text(fields, text_field)


def _parse_json(record: bytes) -> Any:
  """Parses a record of JSON; returns a `_Skip` with the reason if it cannot."""
  if not record.strip():
    return _Skip("empty")
  try:
    return json.loads(record.decode())
  except UnicodeDecodeError:
    return _Skip("undecodable", "is not UTF-8")
  except (ValueError, RecursionError):
    return _Skip("malformed_json")


def _field_text(record: Any, text_field: str) -> bytes | _Skip:
  text = _field(record, text_field)
  if not isinstance(text, str):
    return _Skip("missing_text_field", _describe_record(record, text_field))
  try:
    return text.encode() or _Skip("empty")
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
    return _Skip("undecodable", "holds half of a surrogate pair")


def _field(record: Any, name: str) -> Any:
  """Returns a field by its name, `meta.text` also inside `meta`; `_Skip` if there is none."""
  if isinstance(record, dict) and name in record:
    return record[name]
  outer, dot, inner = name.partition(".")
  if isinstance(record, dict) and dot:
    return _field(record.get(outer), inner)
  return _Skip("missing_text_field")


def _describe_record(record: Any, text_field: str) -> str:
  if not isinstance(record, dict):
    return f"is {_json_type(record)}, not an object with fields"
  value = _field(record, text_field)
  found = "" if isinstance(value, _Skip) else f"has {_json_type(value)} in {text_field}; "
  return f"{found}has the fields {_field_names(record)}"


def _field_names(record: dict[str, Any]) -> str:
  """Lists the fields of a record, inner ones as `meta.text`."""

  def names(fields):
    for name, value in fields.items():
      yield name
      if isinstance(value, dict):
        yield from (f"{name}.{inner}" for inner in names(value))

  found = list(names(record))
  return ", ".join(found[:_MAX_NAMED]) + (", ..." if len(found) > _MAX_NAMED else "") or "none"


def _json_type(value: Any) -> str:
  if value is None:
    return "null"
  kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
  return kinds.get(type(value), "a number")
