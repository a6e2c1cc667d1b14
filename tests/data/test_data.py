"""Tests loading, splitting and packing of documents, on tiny corpora and once on the standard library."""

import gzip
import itertools
import json
import os
import sys
from collections import Counter
from contextlib import closing

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_jax import data
from ttt_jax.config import DataConfig
from ttt_jax.data import rows as rows_module
from ttt_jax.data.interleave import Interleave

DOCUMENT_LENGTHS = (1, 3, 12, 7, 8, 9, 30, 5, 16, 2)


def make_documents(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return data.InMemory(
    data.Document(f"{i}.txt", rng.integers(0, 256, length, dtype=np.uint8))
    for i, length in enumerate(lengths)
  )


def make_source(lengths, seed=0):
  return [data.Source("made up", make_documents(lengths, seed), data.InMemory())]


def load(path, seed=0, **options):
  """Returns the only source of a corpus, and the counts of what was skipped."""
  corpus = data.load_corpus(DataConfig(path=path, **options), seed=seed)
  return corpus.sources[0], corpus.skipped.counts()


def texts(loaded):
  """Returns all loaded documents as {name: text}."""
  source, _ = loaded
  return {d.name: data.decode(d.tokens) for d in source.train + source.heldout}


def names(documents):
  return [document.name for document in documents]


def jsonl(*records):
  return "".join(json.dumps(record) + "\n" for record in records)


# Tokens.


@given(st.text())
@settings(max_examples=30, deadline=None)
def test_decode_inverts_encode(text):
  tokens = data.encode(text)
  assert tokens.dtype == np.int32
  assert data.decode(tokens) == data.decode(tokens.tolist()) == text


def test_decode_replaces_what_is_not_utf8_and_refuses_what_is_no_byte():
  assert data.decode([104, 105, 0xFF]) == "hi\ufffd"
  assert data.decode(jnp.array([104, 105])) == "hi"
  with pytest.raises(ValueError, match="token 256 is not a byte"):
    data.decode([1, 256])
  with pytest.raises(ValueError, match="token -1 is not a byte"):
    data.decode(np.array([-1]))


# Files to documents.


def test_all_formats_are_read(tmp_path):
  path = write_files(
    tmp_path,
    {
      "a.txt": "a é",
      "b.md": "# b",
      "sub/c.py": "c = 1\n",
      "d.jsonl": jsonl({"text": "d1", "id": 7}, {"text": "d2"}),
      "e.txt.gz": gzip.compress(b"e"),
      "f.md.gz": gzip.compress(b"f"),
      "sub/g.py.gz": gzip.compress(b"g"),
      "h.jsonl.gz": gzip.compress(jsonl({"text": "h"}).rstrip().encode()),
      "UPPER.TXT": "u",
    },
  )
  corpus = load(path)
  assert texts(corpus) == {
    "a.txt": "a é",
    "b.md": "# b",
    "sub/c.py": "c = 1\n",
    "d.jsonl:1": "d1",
    "d.jsonl:2": "d2",
    "e.txt.gz": "e",
    "f.md.gz": "f",
    "sub/g.py.gz": "g",
    "h.jsonl.gz:1": "h",
    "UPPER.TXT": "u",
  }
  assert corpus[1] == {}
  assert all(d.tokens.dtype == np.uint8 for d in corpus[0].train + corpus[0].heldout)


def test_what_is_skipped_is_counted_by_reason(tmp_path):
  lines = [
    jsonl({"text": "good"}).encode(),
    b"\n",
    jsonl({"text": ""}).encode(),
    b'{"text": "cut of\n',
    jsonl({"body": "x"}, ["text"], {"text": 3}, None).encode(),
    b'{"text": "\xff"}\n',
    b'{"text": "\\ud800"}\n',
  ]
  whole = gzip.compress(bytes(range(100)) * 50)
  corrupt = bytearray(whole)
  corrupt[len(whole) // 2] ^= 0xFF
  path = write_files(
    tmp_path,
    {
      "good.txt": "good",
      "empty.txt": "",
      "empty.jsonl": "",
      "latin1.txt": "é".encode("latin-1"),
      "lines.jsonl": b"".join(lines),
      "cut.txt.gz": whole[:-9],
      "corrupt.txt.gz": bytes(corrupt),
      "not.txt.gz": "not gzip",
      "image.png": b"\x89PNG",
      "archive.gz": whole,
    },
  )
  (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
  os.mkfifo(tmp_path / "pipe.txt")
  corpus = load(path)
  assert texts(corpus) == {"good.txt": "good", "lines.jsonl:1": "good"}
  assert corpus[1] == {
    "empty": 4,
    "undecodable": 3,
    "malformed_json": 1,
    "missing_text_field": 4,
    "unreadable": 5,
    "other_format": 2,
  }
  report = data.load_corpus(DataConfig(path=path), seed=0).report()
  assert path in report
  for part in ("training 1 (4 bytes)", "held out 1 (4 bytes)", "4 missing text field", "5 unread"):
    assert part in report


def test_globs_files_and_literal_brackets(tmp_path):
  write_files(
    tmp_path, {"a/1.txt": "1", "a/b/2.txt": "2", "a/3.py": "3", "4.txt": "4", "a/5.bin": "5"}
  )
  one_level = load(f"{tmp_path}/a/*")
  assert texts(one_level) == {"1.txt": "1", "3.py": "3"}
  assert one_level[1] == {"directory": 1, "other_format": 1}
  assert texts(load(f"{tmp_path}/**/*.txt")) == {"a/1.txt": "1", "a/b/2.txt": "2", "4.txt": "4"}
  everything = load(f"{tmp_path}/**")
  assert len(texts(everything)) == 4
  assert everything[1] == {"other_format": 1}
  assert texts(load(f"{tmp_path}/*/[13].*")) == {"a/1.txt": "1", "a/3.py": "3"}
  write_files(tmp_path, {"x[1]/6.txt": "6", "x[1]/7.txt": "7"})
  assert texts(load(f"{tmp_path}/x[1]")) == {"6.txt": "6", "7.txt": "7"}
  write_files(tmp_path, {"lines.jsonl": jsonl({"text": "l"}, {"text": "m"})})
  assert texts(load(f"{tmp_path}/lines.jsonl")) == {"lines.jsonl:1": "l", "lines.jsonl:2": "m"}


def test_relative_and_home_paths(tmp_path, monkeypatch):
  write_files(tmp_path, {"a.txt": "1", "sub/b.txt": "2"})
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  for path in (".", "~", "**/*", "~/**/*.txt"):
    assert texts(load(path)) == {"a.txt": "1", "sub/b.txt": "2"}, path


def test_directory_links_are_counted_and_cannot_loop(tmp_path):
  path = write_files(tmp_path, {"a/1.txt": "1", "2.txt": "2"})
  for name in ("loop", "again", "a/up"):
    (tmp_path / name).symlink_to(tmp_path)
  corpus = load(path)
  assert set(texts(corpus)) == {"a/1.txt", "2.txt"}
  assert corpus[1] == {"linked_directory": 3}
  assert set(texts(load(f"{path}/**/*.txt"))) == {"a/1.txt", "2.txt"}


# Training and held-out documents.


def test_split_depends_on_the_names_alone(tmp_path):
  path = write_files(tmp_path, {f"{i}.txt": f"text {i}" for i in range(200)})
  corpus, _ = load(path, heldout_fraction=0.2)
  train, heldout = set(names(corpus.train)), set(names(corpus.heldout))
  assert train.isdisjoint(heldout)
  assert len(train | heldout) == 200
  assert 20 < len(heldout) < 60
  other_seed, _ = load(path, seed=1, heldout_fraction=0.2)
  assert set(names(other_seed.heldout)) == heldout
  write_files(tmp_path, {f"{i}.txt": f"text {i}" for i in range(200, 220)})
  larger, _ = load(path, heldout_fraction=0.2)
  assert set(names(larger.heldout)) & (train | heldout) == heldout
  # By BLAKE2b, so these very documents on every machine and Python.
  assert sorted(heldout)[:3] == ["1.txt", "104.txt", "106.txt"]


def test_order_is_fixed_by_the_seed_not_by_the_file_system(tmp_path):
  files = {f"{i}.txt": f"text {i}" for i in range(40)}
  first, _ = load(write_files(tmp_path / "first", files))
  second, _ = load(write_files(tmp_path / "second", dict(reversed(files.items()))))
  assert names(first.train) == names(second.train)
  assert names(first.train) != sorted(names(first.train))
  assert names(first.train) != names(load(str(tmp_path / "first"), seed=1)[0].train)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_neither_side_is_empty(tmp_path, fraction, count):
  path = write_files(tmp_path, {f"{i}.txt": "text" for i in range(count)})
  corpus, _ = load(path, heldout_fraction=fraction)
  assert min(len(corpus.train), len(corpus.heldout)) == 1
  assert len(corpus.train) + len(corpus.heldout) == count


# Bad input.


def test_bad_paths_name_the_field_the_value_and_the_remedy(tmp_path):
  (tmp_path / "nothing").mkdir()
  write_files(tmp_path, {"binary/a.png": b"\x89", "binary/b.txt": "", "one/a.txt": "text"})
  for path, problem in {
    "": "is empty: give a directory",
    f"{tmp_path}/missing": "does not exist: give a directory or glob",
    f"{tmp_path}/missing/*.txt": "no readable document",
    f"{tmp_path}/nothing": "no readable document .skipped: nothing.: give a directory or glob",
    f"{tmp_path}/binary": "no readable document .skipped: 1 empty, 1 other format.",
    f"{tmp_path}/binary/a.png": "no readable document .skipped: 1 other format.",
    f"{tmp_path}/one": "one readable document only.*two documents or more.*cut into several files",
  }.items():
    with pytest.raises(ValueError, match=problem) as error:
      load(path)
    assert f"data.path={path!r} " in str(error.value)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="there ** within a name is the same as *")
def test_bad_glob(tmp_path):
  with pytest.raises(ValueError, match=r"data.path='.*/\*\*.py' is not a valid glob"):
    load(f"{tmp_path}/**.py")


# Training rows.


def segments(rows):
  """Returns the tokens of each segment of each row, as bytes; checks that padding comes last."""
  for tokens, segment_ids in rows:
    count = segment_ids.max()
    boundaries = np.searchsorted(
      np.where(segment_ids == 0, count + 1, segment_ids), range(1, count + 2)
    )
    np.testing.assert_array_equal(
      segment_ids, np.repeat([*range(1, count + 1), 0], np.diff([*boundaries, len(tokens)]))
    )
    for start, stop in itertools.pairwise(boundaries):
      assert start < stop
      yield tokens[start:stop].astype(np.uint8).tobytes()


def expected_pieces(documents, seq_len):
  for document in documents:
    whole = document.tokens.tobytes()
    yield from (whole[i : i + seq_len] for i in range(0, len(whole), seq_len))


def take(rows, count):
  with closing(rows):
    return list(itertools.islice(rows, count))


def assert_same_batches(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@given(
  lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
  seq_len=st.integers(1, 16),
  seed=st.integers(0, 2**40),
  epochs=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_piece_lies_whole_in_one_row_once_per_epoch(lengths, seq_len, seed, epochs):
  source = make_source(lengths)
  documents = source[0].train
  pieces = rows_module._Pieces(documents, seq_len, seed, "made up")
  stream = rows_module._Stream([pieces], Interleave([1.0]), 0, 1)
  order = grain.MapDataset.source(stream)[: epochs * len(pieces)]
  rows = rows_module.packed(order, grain.ReadOptions(0, 0), seq_len=seq_len, seed=seed)
  found = Counter(segments((row["tokens"], row["tokens_segment_ids"]) for row in rows))
  expected = Counter(expected_pieces(documents, seq_len))
  assert found == {piece: epochs * count for piece, count in expected.items()}


def test_rows_labels_and_types():
  seq_len, batch_size = 8, 3
  rows = data.training_rows(
    make_source(DOCUMENT_LENGTHS), seq_len=seq_len, batch_size=batch_size, seed=0
  )
  pieces = set(expected_pieces(make_documents(DOCUMENT_LENGTHS), seq_len))
  seen = set()
  for batch in take(rows, 30):
    assert batch.keys() == {"tokens", "segment_ids", "labels"}
    assert all(x.shape == (batch_size, seq_len) for x in batch.values())
    assert all(x.dtype == np.int32 for x in batch.values())
    tokens, segment_ids, labels = batch["tokens"], batch["segment_ids"], batch["labels"]
    for b, t in np.ndindex(batch_size, seq_len):
      successor = t + 1 < seq_len and segment_ids[b, t] == segment_ids[b, t + 1] != 0
      assert labels[b, t] == (tokens[b, t + 1] if successor else data.IGNORE)
    seen.update(segments(zip(tokens, segment_ids)))
  assert seen == pieces


def test_epochs_differ_and_never_end():
  source = make_source([4] * 64)
  # Every piece fills its row, and an epoch the rows that are packed at a time.
  rows = data.training_rows(source, seq_len=4, batch_size=1, seed=0)
  epochs = np.reshape([batch["tokens"] for batch in take(rows, 3 * 64)], (3, 64, 4)).tolist()
  first, second, third = epochs
  assert first != second != third != first
  assert sorted(first) == sorted(second) == sorted(third)
  one = data.training_rows(make_source([3]), seq_len=8, batch_size=1, seed=0)
  assert len(take(one, 200)) == 200


def test_rows_are_fixed_by_the_seed():
  documents = make_source(DOCUMENT_LENGTHS)
  options = {"seq_len": 8, "batch_size": 2}
  first = take(data.training_rows(documents, seed=5, **options), 10)
  assert_same_batches(first, take(data.training_rows(documents, seed=5, **options), 10))
  other = take(data.training_rows(documents, seed=6, **options), 10)
  assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other))


def test_no_training_documents():
  with pytest.raises(ValueError, match=r"no training documents: data\.path"):
    data.training_rows(make_source([]), seq_len=8, batch_size=1, seed=0)


# Held-out rows.


def test_heldout_rows_are_the_beginnings_of_long_documents():
  documents = make_documents([8, 9, 7, 30, 1, 8])
  source, backwards = (
    [data.Source("made up", data.InMemory(), data.InMemory(part))]
    for part in (documents, documents[::-1])
  )
  starts = {d.tokens[:8].tobytes() for d in documents if d.tokens.size >= 8}
  rows = data.heldout_rows(source, seq_len=8, max_documents=10, seed=0)
  assert rows.shape == (4, 8)
  assert rows.dtype == np.int32
  assert {row.astype(np.uint8).tobytes() for row in rows} == starts
  few = data.heldout_rows(backwards, seq_len=8, max_documents=2, seed=0)
  np.testing.assert_array_equal(few, rows[:2])
  orders = {
    data.heldout_rows(source, seq_len=8, max_documents=4, seed=seed).tobytes() for seed in range(8)
  }
  assert len(orders) > 1


def test_heldout_documents_too_short():
  nothing = data.InMemory()
  source = [data.Source("made up", nothing, make_documents([8, 30, 1]))]
  with pytest.raises(
    ValueError, match=r"eval.seq_len=31 .* 3 held-out .* 30 tokens: use 30 or less"
  ):
    data.heldout_rows(source, seq_len=31, max_documents=2, seed=0)
  with pytest.raises(ValueError, match=r"no held-out documents: data\.path"):
    data.heldout_rows(
      [data.Source("made up", nothing, nothing)], seq_len=31, max_documents=2, seed=0
    )


# The standard library.


def test_standard_library():
  corpus = data.load_corpus(DataConfig(), seed=0)
  source = corpus.sources[0]
  found = set(names(source.train + source.heldout))
  assert {"json/decoder.py", "unittest/case.py", "os.py"} <= found
  parts = {part for name in found for part in name.split("/")[:-1]}
  assert parts.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
  assert source.train.lengths.sum() > 8e6
  assert len(source.heldout) > 10
  assert "standard library" in corpus.report()
  assert len(data.heldout_rows(corpus.sources, seq_len=4096, max_documents=8, seed=0)) == 8

  rows = data.training_rows(corpus.sources, seq_len=4096, batch_size=4, seed=0)
  batches = take(rows, 320)
  padding = np.mean([batch["segment_ids"] == 0 for batch in batches])
  assert padding < 0.03
