"""One file to its texts: plain text, lines of JSON, parquet, ArrayRecord; one text in memory at a time.

A text is UTF-8 that is not empty, with a name: the file's path below the source's root, and
PATH:RECORD, counted from 1, where a file holds many. What is no text is counted and left out.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grain

from ttt_jax.data.files import format_of
from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")  # what text does not hold, and protobufs do


class _Skip(NamedTuple):
  reason: str


def read_texts(
  path: Path, name: str, *, text_field: str, skipped: Skipped
) -> Iterator[tuple[str, bytes]]:
  """The texts of one file, with their names.

  Raises:
    ValueError: too many corrupt records; a parquet or ArrayRecord file without texts; no pyarrow.
  """
  if not path.is_file():  # a broken link; or a pipe, which would block
    skipped.add("unreadable")
    return
  read = {".parquet": _parquet, ".array_record": _array_record, ".jsonl": _jsonl}
  read = read.get(format_of(path), _plain)
  for record, text in read(path, text_field, skipped):
    if isinstance(text, _Skip):
      skipped.add(text.reason)
    else:
      yield name if record is None else f"{name}:{record}", text


def _open(path: Path):
  return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _plain(path: Path, text_field: str, skipped: Skipped) -> Iterator[tuple[None, bytes | _Skip]]:
  try:
    with _open(path) as file:
      data = file.read()
  except (OSError, EOFError, zlib.error):
    skipped.add("unreadable")
    return
  yield None, _text(data)


def _jsonl(path: Path, text_field: str, skipped: Skipped) -> Iterator[tuple[int, bytes | _Skip]]:
  number = 0
  try:
    with _open(path) as file:
      for number, line in enumerate(file, start=1):
        yield number, _json_text(line, text_field)
  except (OSError, EOFError, zlib.error):
    skipped.add("unreadable")
    return
  if number == 0:
    skipped.add("empty")


def _parquet(path: Path, text_field: str, skipped: Skipped) -> Iterator[tuple[int, bytes | _Skip]]:
  try:
    import pyarrow as pa
    import pyarrow.parquet as pq
  except ModuleNotFoundError as error:
    raise UserError(
      f"{path} is a parquet file, which needs pyarrow: pip install 'ttt_jax[parquet]'"
    ) from error
  try:
    file = pq.ParquetFile(path, page_checksum_verification=True)
  except (pa.ArrowException, OSError) as error:
    skipped.add_corrupt(str(path), error)
    return
  with file:
    _check_column(path, file.schema_arrow, text_field)
    row = 0
    for group in range(file.num_row_groups):
      end = row + file.metadata.row_group(group).num_rows
      try:
        for batch in file.iter_batches(256, row_groups=[group], columns=[text_field]):
          texts = batch.column(0).cast(pa.large_string()).cast(pa.large_binary())
          for text in texts.to_pylist():
            row += 1
            yield row, _Skip("missing_text_field") if text is None else _text(text)
      except (pa.ArrowException, OSError) as error:
        # Pages are compressed whole: what is left of the row group is lost.
        skipped.add_corrupt(f"{path}, rows {row + 1} to {end}", error, records=end - row)
      row = end


def _check_column(path: Path, schema: Any, text_field: str) -> None:
  import pyarrow as pa

  if schema.get_field_index(text_field) < 0:
    raise UserError(
      f"{path} has no column {text_field!r}: set data.text_field to one of {', '.join(schema.names)}"
    )
  kind = schema.field(text_field).type
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind
  if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
    raise UserError(
      f"{path}: column {text_field!r} holds {kind}, not text: set data.text_field to one of "
      f"{', '.join(schema.names)}"
    )


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
      record = records[number - 1]
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
  """Whether a file with this record holds JSON or plain text; ValueError if neither is clear."""
  try:
    fields = json.loads(record)
  except (ValueError, RecursionError):
    fields = None
  if isinstance(fields, dict):
    if isinstance(fields.get(text_field), str):
      return True
    raise UserError(
      f"{place} is JSON without a text {text_field!r}: set data.text_field to one of "
      f"{', '.join(fields)}"
    )
  if _CONTROL.search(record) or isinstance(_text(record), _Skip):
    raise UserError(
      f"{place} is neither UTF-8 text nor JSON with a field {text_field!r}, the two that are read: "
      "examples of TensorFlow and tokens of other programs have to be written again as one of them"
    )
  return False


def _text(data: bytes) -> bytes | _Skip:
  """`data` itself, if it is UTF-8 and not empty."""
  try:
    data.decode()
  except UnicodeDecodeError:
    return _Skip("undecodable")
  return data or _Skip("empty")


def _json_text(record: bytes, text_field: str) -> bytes | _Skip:
  """The text of a JSON object, as UTF-8."""
  if not record.strip():
    return _Skip("empty")
  try:
    fields = json.loads(record.decode())
  except UnicodeDecodeError:
    return _Skip("undecodable")
  except (ValueError, RecursionError):
    return _Skip("malformed_json")
  if not isinstance(fields, dict) or not isinstance(fields.get(text_field), str):
    return _Skip("missing_text_field")
  try:
    return fields[text_field].encode() or _Skip("empty")
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
    return _Skip("undecodable")
