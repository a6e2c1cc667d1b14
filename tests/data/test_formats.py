"""Tests parquet and ArrayRecord files of other programs; corrupt records are named and counted."""

import json
import sys

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from ttt_jax import data
from ttt_jax.config import DataConfig, WeightedSource

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def load(path, **options):
  return data.load_corpus(DataConfig(path=str(path), **options), seed=0)


def texts(corpus):
  return {
    d.name: data.decode(d.tokens)
    for source in corpus.sources
    for d in source.train + source.heldout
  }


def write_parquet(path, column, *, name="text", **options):
  pq.write_table(pa.table({"id": range(len(column)), name: column}), path, **options)


def write_records(path, records):
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def flip(path, needle):
  """Changes a byte of a file in the middle of what it says."""
  content = bytearray(path.read_bytes())
  at = content.index(needle) + len(needle) // 2
  content[at] ^= 0xFF
  path.write_bytes(content)


# Parquet.


@pytest.mark.parametrize(
  "kind",
  [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.dictionary(pa.int8(), pa.large_binary()),
  ],
)
def test_parquet(tmp_path, kind):
  rows = pa.array(["one é", "two", None, "", "five"])
  if pa.types.is_dictionary(kind):
    rows = rows.cast(kind.value_type).dictionary_encode()
  write_parquet(tmp_path / "a.parquet", rows.cast(kind), row_group_size=2)
  corpus = load(tmp_path)
  assert texts(corpus) == {
    "a.parquet:1": "one é",
    "a.parquet:2": "two",
    "a.parquet:5": "five",
  }
  assert corpus.skipped.counts() == {"missing_text_field": 1, "empty": 1}


def test_a_shard_of_nulls(tmp_path):
  """Its column has the type of nothing, whatever the other shards have."""
  write_parquet(tmp_path / "a.parquet", pa.nulls(3))
  write_parquet(tmp_path / "b.parquet", ["one", None, "three"])
  corpus = load(tmp_path)
  assert texts(corpus) == {"b.parquet:1": "one", "b.parquet:3": "three"}
  assert corpus.skipped.counts() == {"missing_text_field": 4}


def test_a_column_of_fields(tmp_path):
  rows = pa.array([{"text": "one", "n": 1}, None, {"text": None, "n": 2}, {"text": "four", "n": 3}])
  write_parquet(tmp_path / "a.parquet", rows, name="meta", row_group_size=3)
  corpus = load(tmp_path, text_field="meta.text")
  assert texts(corpus) == {"a.parquet:1": "one", "a.parquet:4": "four"}
  assert corpus.skipped.counts() == {"missing_text_field": 2}
  for field, problem in {
    "text": "has no column 'text': set data.text_field to a column of text: meta.text .of id, meta,",
    "meta": "column 'meta' holds struct<.*>, not text: .*: meta.text .of",
    "meta.n": "column 'meta.n' holds int64, not text: .* to a column of text: meta.text .of",
  }.items():
    with pytest.raises(ValueError, match=f"a.parquet:? {problem}"):
      load(tmp_path, text_field=field)


def test_columns_that_cannot_be_meant(tmp_path):
  table = pa.table([["a", "b"], ["c", "d"], [1, 2]], names=["text", "text", "id"])
  pq.write_table(table, tmp_path / "a.parquet")
  with pytest.raises(ValueError, match=r"a.parquet has 2 columns 'text': set .*there is none"):
    load(tmp_path)


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.binary()])
def test_parquet_that_is_not_utf8(tmp_path, kind):
  broken = pa.array([b"\xff\xfe", b"fine", b"too"])
  broken = (
    broken.view(kind) if kind != pa.string_view() else broken.cast(pa.binary_view()).view(kind)
  )
  write_parquet(tmp_path / "a.parquet", broken)
  corpus = load(tmp_path)
  assert texts(corpus) == {"a.parquet:2": "fine", "a.parquet:3": "too"}
  assert corpus.skipped.counts() == {"undecodable": 1}


def test_other_fields(tmp_path):
  write_parquet(tmp_path / "a.parquet", ["p1", "p2"], name="body")
  (tmp_path / "b.jsonl").write_text(json.dumps({"body": "j"}))
  write_records(tmp_path / "c.array_record", [json.dumps({"body": "r"}).encode()])
  assert set(texts(load(tmp_path, text_field="body")).values()) == {"p1", "p2", "j", "r"}
  with pytest.raises(
    ValueError,
    match=r"a.parquet has no column 'text': set data.text_field to .*text: body .of id, b",
  ):
    load(tmp_path)
  with pytest.raises(ValueError, match=r"'id' holds int64, not text: set .* of text: body "):
    load(tmp_path, text_field="id")


def corrupt_parquet(tmp_path):
  rows = [f"row {i} " + "x" * 50 for i in range(6)]
  write_parquet(
    tmp_path / "a.parquet",
    rows,
    row_group_size=2,
    compression="none",
    use_dictionary=False,
    write_page_checksum=True,
    write_statistics=False,
  )
  flip(tmp_path / "a.parquet", b"row 3 ")
  return rows


def test_corrupt_rows_of_parquet(tmp_path):
  rows = corrupt_parquet(tmp_path)
  with pytest.raises(
    ValueError,
    match=r"a.parquet, rows 3 to 4 is corrupt .*: 2 corrupt records .* data.max_bad_records=1;",
  ):
    load(tmp_path, max_bad_records=1)
  with pytest.warns(UserWarning, match="rows 3 to 4 is corrupt and skipped"):
    corpus = load(tmp_path, max_bad_records=2)
  assert texts(corpus) == {f"a.parquet:{i + 1}": rows[i] for i in (0, 1, 4, 5)}
  assert corpus.skipped.counts() == {"corrupt": 2}
  assert "skipped: 2 corrupt" in corpus.report()


@pytest.mark.parametrize("name", ["a.parquet", "a.array_record"])
def test_files_that_are_something_else(tmp_path, name):
  (tmp_path / name).write_bytes(b"not it" * 20000)
  (tmp_path / "b.txt").write_text("b")
  (tmp_path / "c.txt").write_text("c")
  with pytest.raises(ValueError, match=f"{name} is corrupt"):
    load(tmp_path)
  with pytest.warns(UserWarning, match=f"{name} is corrupt and skipped"):
    corpus = load(tmp_path, max_bad_records=1)
  assert set(texts(corpus)) == {"b.txt", "c.txt"}


def test_pyarrow_missing(tmp_path, monkeypatch):
  write_parquet(tmp_path / "a.parquet", ["1", "2"])
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'ttt_jax\[parquet\]'"):
    load(tmp_path)


# ArrayRecord.


def test_array_records_of_text_and_of_json(tmp_path):
  write_records(tmp_path / "a.array_record", ["plain é\n".encode(), b"{not json", b"", b"\x00\x01"])
  lines = [json.dumps({"text": f"json {i}"}).encode() for i in range(2)]
  write_records(tmp_path / "b.array_record-00000-of-00001", [*lines, b'{"x": 1}', b"no"])
  corpus = load(tmp_path)
  assert texts(corpus) == {
    "a.array_record:1": "plain é\n",
    "a.array_record:2": "{not json",
    "b.array_record-00000-of-00001:1": "json 0",
    "b.array_record-00000-of-00001:2": "json 1",
  }
  assert corpus.skipped.counts() == {
    "empty": 1,
    "undecodable": 1,
    "missing_text_field": 1,
    "malformed_json": 1,
  }


@pytest.mark.parametrize(
  ("record", "problem"),
  [
    (b"\n\x0f\n\r\n\x04text\x12\x05\n\x03\n\x01a", "neither UTF-8 text nor JSON"),  # tf.Example
    (np.arange(9, dtype=np.uint16).tobytes(), "neither UTF-8 text nor JSON"),
    (b'{"body": "x", "id": 3}', "JSON without a text 'text': set data.text_field to .* body, id"),
  ],
)
def test_array_records_of_others_are_refused(tmp_path, record, problem):
  write_records(tmp_path / "a.array_record", [record, b"text"])
  with pytest.raises(ValueError, match=f"a.array_record, record 1 is {problem}"):
    load(tmp_path, max_bad_records=9)


def test_corrupt_array_record(tmp_path):
  records = [f"record {i} ".encode() * 20 for i in range(5)]
  path = tmp_path / "a.array_record"
  writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
  for record in records:
    writer.write(record)
  writer.close()
  flip(path, records[2])
  with pytest.raises(
    ValueError, match=r"a.array_record, record 3 is corrupt .*: 1 corrupt records"
  ):
    load(tmp_path)
  with pytest.warns(UserWarning, match="record 3 is corrupt and skipped"):
    corpus = load(tmp_path, max_bad_records=1)
  assert texts(corpus) == {
    f"a.array_record:{i + 1}": records[i].decode() for i in range(5) if i != 2
  }
  assert corpus.skipped.counts() == {"corrupt": 1}


# Mixtures of paths.


def test_mixture_of_formats(tmp_path):
  for name in ("a", "b", "c"):
    (tmp_path / name).mkdir()
  write_parquet(tmp_path / "a" / "x.parquet", ["1", "2", "3"])
  (tmp_path / "b" / "x.txt").write_text("4")
  (tmp_path / "b" / "y.txt").write_text("5")
  paths = [str(tmp_path / name) for name in ("a", "b", "c")]
  mixture = tuple(WeightedSource(path, w) for path, w in zip(paths, (1.0, 3.0, 0.0)))
  corpus = data.load_corpus(DataConfig(mixture=mixture), seed=0)
  assert [source.weight for source in corpus.sources] == [1.0, 3.0]
  assert set(texts(corpus).values()) == set("12345")
  assert f"{paths[0]}: 25.0% of the tokens" in corpus.report()
  mixture = (mixture[0], WeightedSource(paths[2], 1.0))
  with pytest.raises(ValueError, match=r"data.mixture\[1\].path='.*/c' holds no readable document"):
    data.load_corpus(DataConfig(mixture=mixture), seed=0)
