"""Tests files as other programs write them: hidden copies, links, byte order marks, JSON, compression."""

import bz2
import codecs
import gzip
import json
import lzma
import re
import sys

import pytest
from helpers import write_files

from ttt_jax import data
from ttt_jax.config import DataConfig, WeightedSource
from ttt_jax.data.files import find_files
from ttt_jax.data.formats import ZSTD_MODULE, load_texts
from ttt_jax.data.skipped import Skipped, stable_hash

MARK = codecs.BOM_UTF8


def load(path, **options):
  return data.load_corpus(DataConfig(path=str(path), **options), seed=0)


def texts(corpus):
  return {
    d.name: data.decode(d.tokens)
    for source in corpus.sources
    for d in source.train + source.heldout
  }


def read(path, text_field="text"):
  """Returns the texts of one file by name, and the counts of what was skipped."""
  skipped = Skipped()
  found = dict(load_texts(path, path.name, text_field=text_field, skipped=skipped))
  return {name: text.decode() for name, text in found.items()}, skipped


def lines(*records):
  return "".join(json.dumps(record) + "\n" for record in records).encode()


# Hidden files, and files of several names.


@pytest.fixture
def notebooks(tmp_path):
  """Makes ten documents, and the files that editors and version control keep beside them."""
  documents = {f"{i}.txt": f"text {i}" for i in range(10)}
  copies = {f".ipynb_checkpoints/{i}-checkpoint.txt": f"text {i}" for i in range(10)}
  others = {"sub/.git/note.md": "a", "sub/.git/old/note.md": "b", ".draft.txt": "c"}
  write_files(tmp_path, {**documents, **copies, **others, "sub/seen.txt": "d"})
  return tmp_path


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*"])
def test_hidden_files_are_counted_and_left_out(notebooks, pattern):
  corpus = load(f"{notebooks}{pattern}")
  assert set(texts(corpus)) == {f"{i}.txt" for i in range(10)} | {"sub/seen.txt"}
  assert corpus.skipped.counts() == {"hidden": 3}


def test_nothing_held_out_is_trained_on(notebooks):
  (source,) = load(notebooks, heldout_fraction=0.4).sources
  train, heldout = (
    {data.decode(d.tokens) for d in part} for part in (source.train, source.heldout)
  )
  assert len(heldout) > 1
  assert train.isdisjoint(heldout)


@pytest.mark.parametrize(
  ("pattern", "found"),
  [
    (".ipynb_checkpoints/[0-3]*", {f"{i}-checkpoint.txt" for i in range(4)}),
    (".ipynb_checkpoints", {f"{i}-checkpoint.txt" for i in range(10)}),
    ("*/.git/**/*.md", {"sub/.git/note.md", "sub/.git/old/note.md"}),
    (".*/8*.txt", {".ipynb_checkpoints/8-checkpoint.txt", ".hidden/8.txt"}),
    ("[89].txt", {"8.txt", "9.txt"}),
  ],
)
def test_a_hidden_part_that_is_spelled_out_is_read(notebooks, pattern, found):
  write_files(notebooks, {".hidden/8.txt": "one more"})
  assert set(texts(load(notebooks / pattern))) == found


def test_a_corpus_may_lie_below_a_hidden_directory(tmp_path):
  write_files(tmp_path / ".cache", {"a.txt": "1", "sub/b.txt": "2"})
  assert set(texts(load(tmp_path / ".cache"))) == {"a.txt", "sub/b.txt"}
  assert set(texts(load(f"{tmp_path}/.cache/**/*.txt"))) == {"a.txt", "sub/b.txt"}


def test_hidden_files_are_not_prepared(notebooks, tmp_path_factory):
  metadata = data.prepare(str(notebooks), tmp_path_factory.mktemp("out"))
  assert metadata["documents"] == 11
  assert metadata["skipped"] == {"hidden": 3}


def test_a_file_of_several_names_is_one_document(tmp_path):
  write_files(tmp_path, {"b.txt": "1", "c.txt": "2", "real/d.txt": "3"})
  (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
  (tmp_path / "link").symlink_to(tmp_path / "real")
  (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
  corpus = load(f"{tmp_path}/**/*")
  assert set(texts(corpus)) == {"b.txt", "c.txt", "real/d.txt"}
  assert corpus.skipped.counts() == {"linked_file": 1, "unreadable": 1, "directory": 1}
  files = find_files(f"{tmp_path}/*/*.txt", Skipped(), field="data.path")
  assert files.paths == [tmp_path / "real" / "d.txt"]


def test_links_alone_are_names_too(tmp_path):
  """Imitates the hub's cache, where every file is a link into a directory of blobs."""
  write_files(tmp_path, {"blobs/1": "1", "blobs/2": "2"})
  (tmp_path / "snapshot").mkdir()
  for name, blob in {"b.txt": "1", "a.txt": "2", "c.txt": "2"}.items():
    (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / blob)
  corpus = load(tmp_path / "snapshot")
  assert texts(corpus) == {"b.txt": "1", "a.txt": "2"}
  assert corpus.skipped.counts() == {"linked_file": 1}


def test_two_sources_may_not_hold_one_file(tmp_path):
  """The name that decides whether a document is held out is relative to its source."""
  write_files(
    tmp_path, {f"sub/{i}.txt": f"text {i}" for i in range(9)} | {"0.txt": "0", "1.txt": "1"}
  )
  names = [(f"sub/{i}.txt", f"{i}.txt") for i in range(9)]
  assert any((stable_hash(a) < 2**63) != (stable_hash(b) < 2**63) for a, b in names)

  def mixture(*paths):
    sources = tuple(WeightedSource(f"{tmp_path}{path}") for path in paths)
    return data.load_corpus(DataConfig(mixture=sources), seed=0)

  with pytest.raises(ValueError, match=r"mixture\[0\].*mixture\[1\].* both hold .*/sub/0.txt: one"):
    mixture("", "/sub/*.txt")
  with pytest.raises(ValueError, match=r"both hold .*; leave it out of one of them"):
    mixture("/sub", "/sub")
  assert (
    len(texts(mixture("/*.txt", "/sub"))) == 9
  )  # names of both; 0.txt and 1.txt are twice there
  data.prepare(f"{tmp_path}/sub", tmp_path / "out")
  with pytest.raises(ValueError, match=r"both hold .*/out: one would train"):
    mixture("/out", "/sub/../out")


# Encodings.


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.txt.gz"])
def test_the_mark_of_utf8_is_no_text(tmp_path, name):
  content = MARK + "é = 1\r\n".encode()
  write_files(tmp_path, {name: gzip.compress(content) if name.endswith(".gz") else content})
  assert read(tmp_path / name)[0] == {name: "é = 1\r\n"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_first_record_behind_a_mark(tmp_path, name):
  content = lines({"text": "one"}, {"text": "\ufefftwo"}).replace(b"\n", b"\r\n")
  write_files(tmp_path, {name: MARK + content})
  found, skipped = read(tmp_path / name)
  assert found == {f"{name}:1": "one", f"{name}:2": "\ufefftwo"}  # what a record says is its own
  assert skipped.counts() == {}
  write_files(tmp_path, {name: MARK})
  assert read(tmp_path / name)[1].counts() == {"empty": 1}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path, name, encoding):
  mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
  text = lines({"text": "one"}, {"text": "two"}).decode()
  write_files(tmp_path, {name: mark + text.encode(encoding)})
  found, skipped = read(tmp_path / name)
  assert found == {}
  assert skipped.counts() == {"undecodable": 1}
  assert str(skipped) == f"1 undecodable ({name} is {encoding[:6].upper()}, not UTF-8)"


def test_latin1_is_named(tmp_path):
  write_files(tmp_path, {"a.txt": "é".encode("latin-1"), "b.txt": "b"})
  with pytest.raises(ValueError, match=r"skipped: 1 undecodable \(a.txt is not UTF-8\)"):
    load(tmp_path)


# Compression.


def zstd():
  return pytest.importorskip(ZSTD_MODULE)


def zstd_frame(content):
  """Compresses as the zstd program does, with a checksum."""
  return zstd().compress(content, options={zstd().CompressionParameter.checksum_flag: 1})


COMPRESSIONS = {
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": zstd_frame,
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_compressed_files(tmp_path, suffix, kind):
  compress, name = COMPRESSIONS[suffix], f"c4-train.00000-of-01024{kind}{suffix}"
  parts = [lines({"text": "one", "url": "u"}), lines({"text": "two"})]
  # Two frames one after another are one file, as `cat` and parallel compressors make it.
  write_files(tmp_path, {name: b"".join(map(compress, parts)), name.upper(): compress(parts[0])})
  expected = {f"{name}:1": "one", f"{name}:2": "two"}
  if kind == ".txt":
    expected = {name: b"".join(parts).decode()}
  assert read(tmp_path / name)[0] == expected
  assert len(read(tmp_path / name.upper())[0]) == 1


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_damage_in_compressed_files(tmp_path, suffix):
  whole = COMPRESSIONS[suffix](bytes(range(32, 127)) * 50 + lines({"text": "end"}))
  changed = bytearray(whole)
  changed[len(whole) // 2] ^= 0xFF
  damaged = {"cut": whole[:-5], "changed": bytes(changed), "other": b"nothing of that kind"}
  for name, content in damaged.items():
    for kind in (".txt", ".json"):
      path = tmp_path / f"{name}{kind}{suffix}"
      path.write_bytes(content)
      found, skipped = read(path)
      assert found == {}, path.name
      assert skipped.counts() == {"unreadable": 1}, path.name


def test_zstd_of_a_long_window(tmp_path):
  module = zstd()
  parameter = module.CompressionParameter
  content = lines({"text": "far"})
  how = {parameter.window_log: 29, parameter.content_size_flag: 0}
  compressor = module.ZstdCompressor(options=how)
  frame = compressor.compress(content) + compressor.flush()
  with pytest.raises(module.ZstdError):
    module.decompress(frame)  # more memory than is allowed unless one asks
  write_files(tmp_path, {"a.jsonl.zst": frame})
  assert read(tmp_path / "a.jsonl.zst")[0] == {"a.jsonl.zst:1": "far"}


def test_zstd_missing(tmp_path, monkeypatch):
  write_files(tmp_path, {"a.jsonl.zst": b"x", "b.txt": "b"})
  monkeypatch.setitem(sys.modules, ZSTD_MODULE, None)
  with pytest.raises(ValueError, match=r"a.jsonl.zst .* pip install 'ttt_jax\[zstd\]'"):
    load(tmp_path)


# JSON.


@pytest.mark.parametrize(
  "content",
  [
    lines({"text": "one"}, {"text": "two"}),
    b"\n" + lines({"text": "one"}, {"text": "two"}).replace(b"\n", b"\r\n"),
    json.dumps([{"text": "one"}, {"text": "two"}]).encode(),
    json.dumps([{"text": "one"}, {"text": "two"}], indent=1).encode(),
  ],
)
def test_json_of_lines_and_of_one_array(tmp_path, content):
  write_files(tmp_path, {"a.json": content})
  assert list(read(tmp_path / "a.json")[0].values()) == ["one", "two"]


@pytest.mark.parametrize(
  ("content", "found", "skipped"),
  [
    (json.dumps({"text": "one", "id": 1}, indent=1), ["one"], {}),
    (
      '{"text": "cut of\n{"text": "two"}\n\n{"text": "three"}',
      ["two", "three"],
      {"malformed_json": 1, "empty": 1},
    ),
    ("{\n  // of an editor\n}\n", [], {"malformed_json": 1}),
    ("[", [], {"malformed_json": 1}),
    ("[]", [], {"empty": 1}),
    ("", [], {"empty": 1}),
    ('["text"]', [], {"missing_text_field": 1}),
    (
      '[{"text": "one"}, {"text": ""}, {"text": null}]',
      ["one"],
      {"empty": 1, "missing_text_field": 1},
    ),
  ],
)
def test_other_json(tmp_path, content, found, skipped):
  write_files(tmp_path, {"a.json": content})
  texts, counted = read(tmp_path / "a.json")
  assert list(texts.values()) == found
  assert counted.counts() == skipped


@pytest.mark.parametrize(
  ("record", "problem"),
  [
    ({"body": "x", "meta": {"id": 3}}, "has the fields body, meta, meta.id"),
    ({"text": None}, "has null in text; has the fields text"),
    ({"text": ["a"], "id": 1}, "has a list in text; has the fields text, id"),
    ({f"f{i}": i for i in range(20)}, "has the fields f0, .*, f11, [.]{3}"),
    ({}, "has the fields none"),
    (["x"], "is a list, not an object with fields"),
  ],
)
def test_the_fields_that_are_there_are_named(tmp_path, record, problem):
  write_files(tmp_path, {"a.jsonl": lines(record, {"other": 1})})
  _, skipped = read(tmp_path / "a.jsonl")
  assert skipped.counts() == {"missing_text_field": 2}
  said = str(skipped).removeprefix("2 missing text field (").removesuffix(")")
  assert said.startswith("a.jsonl:1 ")
  assert re.fullmatch(problem, said.removeprefix("a.jsonl:1 "))
  with pytest.raises(ValueError, match=r"no readable document \(skipped: 2 missing text field \(a"):
    load(tmp_path)


def test_a_field_of_a_field(tmp_path):
  records = [{"meta": {"text": "one"}}, {"meta": None}, {"meta.text": "three", "meta": 3}]
  write_files(tmp_path, {"a.jsonl": lines(*records)})
  found, skipped = read(tmp_path / "a.jsonl", "meta.text")
  assert found == {"a.jsonl:1": "one", "a.jsonl:3": "three"}
  assert skipped.counts() == {"missing_text_field": 1}
