"""Loads the texts in a column of a parquet file, of any Arrow type for text, in batches of rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError

_BATCH = 256  # rows


def parquet_texts(
  path: Path, text_field: str, skipped: Skipped
) -> Iterator[tuple[int, bytes | None]]:
  """Yields (row, bytes or None), rows counted from 1; `meta.text` is the field `text` of column `meta`.

  Raises:
    UserError: the column is missing or holds no text, too many rows are corrupt, or pyarrow is missing.
  """
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
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=[text_field]):
          for text in _texts(batch, text_field):
            row += 1
            yield row, text
      except (pa.ArrowException, OSError) as error:
        # Pages are compressed whole, so the rest of the row group is lost.
        skipped.add_corrupt(f"{path}, rows {row + 1} to {end}", error, records=end - row)
      row = end


def _texts(batch: Any, text_field: str) -> list[bytes | None]:
  import pyarrow as pa
  import pyarrow.compute as pc

  if text_field in batch.schema.names:
    column = batch.column(text_field)
  else:
    outer, *inner = text_field.split(".")
    column = pc.struct_field(batch.column(outer), inner)
  if pa.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  # Not cast to `string`, where one row that is not UTF-8 would fail the whole batch.
  return column.cast(pa.large_binary()).to_pylist()


def _check_column(path: Path, schema: Any, text_field: str) -> None:
  kinds: dict[str, list[Any]] = {}
  for name, kind in _columns(schema):
    kinds.setdefault(name, []).append(kind)
  found = kinds.get(text_field, [])
  if len(found) == 1 and _is_text(found[0]):
    return
  texts = [name for name, (kind, *_) in kinds.items() if _is_text(kind) and name != text_field]
  if not found:
    problem = f"{path} has no column {text_field!r}"
  elif len(found) > 1:
    problem = f"{path} has {len(found)} columns {text_field!r}"
  else:
    problem = f"{path}: column {text_field!r} holds {found[0]}, not text"
  others = f"a column of text: {', '.join(texts)}" if texts else "a column of text: there is none"
  raise UserError(f"{problem}: set data.text_field to {others} (of {', '.join(kinds)})")


def _columns(fields: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields names and types of columns and, with a dot, of their inner fields."""
  import pyarrow as pa

  for field in fields:
    yield f"{prefix}{field.name}", field.type
    if pa.types.is_struct(field.type):
      yield from _columns(field.type, f"{prefix}{field.name}.")


def _is_text(kind: Any) -> bool:
  """Tells whether a type can hold text: strings, bytes, or null, the type of a shard of nulls."""
  import pyarrow as pa

  if isinstance(kind, pa.BaseExtensionType):
    kind = kind.storage_type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
  return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)
