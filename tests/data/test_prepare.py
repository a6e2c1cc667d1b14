"""Tests prepared corpora: equal to text in memory, loaded lazily; killed, damaged and wrong ones."""

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from ttt_jax import data
from ttt_jax.checkpoints.tokenizer import byte_tokenizer, load_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import DataConfig, WeightedSource
from ttt_jax.data import preparation, prepared
from ttt_jax.data.tokens import token_dtype
from ttt_jax.errors import UserError

METADATA = "ttt_jax_data.json"


@pytest.fixture
def records_of_16(monkeypatch):
  for module in (prepared, preparation):
    monkeypatch.setattr(module, "RECORD_TOKENS", 16)


@pytest.fixture
def text(tmp_path):
  """Documents of 1 to 90 bytes."""
  (tmp_path / "text" / "sub").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(30):
    name = f"sub/{i}.txt" if i % 3 else f"{i}.txt"
    words = bytes(rng.integers(97, 123, rng.integers(1, 90), dtype=np.uint8))
    (tmp_path / "text" / name).write_bytes(words)
  return tmp_path / "text"


def load(path, tokenizer=None, **options):
  path = None if path is None else str(path)
  return data.load_corpus(DataConfig(path=path, **options), seed=0, tokenizer=tokenizer)


def documents(part):
  """Returns the tokens of all documents as a set of texts."""
  tokens = [part.read(i, 0, int(n)) for i, n in enumerate(part.lengths)]
  return {data.decode(x) for x in tokens}


def flip(path, at):
  content = bytearray(path.read_bytes())
  content[at] ^= 0xFF
  path.write_bytes(content)


def test_the_same_documents_in_the_same_split(text, tmp_path, records_of_16):
  metadata = data.prepare(str(text), tmp_path / "out", shard_bytes=300)
  assert len(metadata["shards"]) > 3
  memory, disk = load(text, heldout_fraction=0.3), load(tmp_path / "out", heldout_fraction=0.3)
  (memory,), (disk,) = memory.sources, disk.sources
  assert documents(disk.train) == documents(memory.train)
  assert documents(disk.heldout) == documents(memory.heldout)
  assert metadata["documents"] == len(disk.train) + len(disk.heldout) == 30
  assert metadata["tokens"] == disk.train.lengths.sum() + disk.heldout.lengths.sum()
  for document, length in enumerate(disk.train.lengths.astype(int)):
    whole = disk.train.read(document, 0, int(length))
    for start in range(0, length, 7):  # within, at and over the borders of records
      part = disk.train.read(document, start, start + 20)
      np.testing.assert_array_equal(part, whole[start : start + 20])


def test_rows_have_every_piece_once_per_epoch(text, tmp_path, records_of_16):
  data.prepare(str(text), tmp_path / "out")
  expected = documents(load(text).sources[0].train)
  expected = {whole[i : i + 24] for whole in expected for i in range(0, len(whole), 24)}
  found = set()
  corpus = load(tmp_path / "out")
  with closing(data.training_rows(corpus.sources, seq_len=24, batch_size=2, seed=0)) as rows:
    for batch in itertools.islice(rows, 100):
      for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
        found |= {data.decode(tokens[ids == i]) for i in range(1, ids.max() + 1)}
  assert found == expected


def test_read_lazily(text, tmp_path, records_of_16, monkeypatch):
  data.prepare(str(text), tmp_path / "out", shard_bytes=300)
  read = []
  whole = prepared.PreparedCorpus._load_record

  def count(self, number):
    read.append(number)
    return whole(self, number)

  monkeypatch.setattr(prepared.PreparedCorpus, "_load_record", count)
  corpus = load(tmp_path / "out", heldout_fraction=0.5)
  corpus.report()
  assert not read
  data.heldout_rows(corpus.sources, seq_len=16, max_documents=2, seed=0)
  assert 2 <= len(read) <= 4  # the first 16 tokens of two documents


def test_tokens_of_a_tokenizer(text, tmp_path):
  byte_tokenizer().save(tmp_path)
  tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
  metadata = data.prepare(str(text), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
  (disk,) = load(tmp_path / "out", tokenizer).sources
  (memory,) = load(text, tokenizer).sources
  assert documents(disk.train) == documents(memory.train)
  assert disk.train.read(0, 0, 1).dtype == np.uint8
  with pytest.raises(
    ValueError,
    match=r"data.path='.*out' was prepared with the tokenizer '.*tokenizer.json', which is",
  ):
    load(tmp_path / "out")
  tokenizer._backend.add_tokens(["lighthouse"])
  with pytest.raises(ValueError, match=r"which is not the one of this run: set data\.tokenizer="):
    load(tmp_path / "out", tokenizer)
  assert metadata["fingerprint"] not in (None, "bytes")


@pytest.mark.parametrize(
  ("vocab", "dtype"), [(256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_tokens_are_as_narrow_as_the_vocabulary_allows(vocab, dtype):
  tokenizer = byte_tokenizer()
  tokenizer.vocab_size = vocab
  assert token_dtype(tokenizer) == np.dtype(dtype)


# Whole or not.


def test_killed_in_the_middle(text, tmp_path):
  """Finds the corpus unfinished, and completes it with the same command."""
  out = tmp_path / "out"
  script = (
    "import time; from ttt_jax.data import preparation\n"
    "write = preparation._Writer._write\n"
    "def slow(*arguments): write(*arguments); print(flush=True); time.sleep(0.05)\n"
    "preparation._Writer._write, preparation.RECORD_TOKENS = slow, 16\n"
    f"preparation.prepare({str(text)!r}, {str(out)!r}, shard_bytes=100)\n"
  )
  running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
  for _ in range(12):
    running.stdout.readline()
  running.send_signal(signal.SIGKILL)
  running.communicate()
  assert any(out.glob("*.tokens"))
  with pytest.raises(
    ValueError, match=r"data.path='.*out' is unfinished, since `ttt-jax data prep"
  ):
    load(out)
  assert main(["data", "prepare", str(text), str(out)]) == 0
  assert documents(load(out).sources[0].train) == documents(load(text).sources[0].train)
  assert len(list(out.glob("*.tokens"))) == 1


def test_what_is_no_destination(text, tmp_path, capsys):
  def refused(destination, problem):
    assert main(["data", "prepare", str(text), str(destination)]) == 2
    assert problem in capsys.readouterr().err

  (tmp_path / "file").write_text("x")
  refused(tmp_path / "file", "is a file: give another one")
  refused(text, "is not empty: give another one")
  assert main(["data", "prepare", str(text), str(tmp_path / "out")]) == 0
  capsys.readouterr()
  before = (tmp_path / "out" / METADATA).read_bytes()
  refused(tmp_path / "out", "holds a prepared corpus already: delete it")
  assert (tmp_path / "out" / METADATA).read_bytes() == before


def test_sources_that_give_nothing(text, tmp_path, capsys):
  (tmp_path / "one").mkdir()
  (tmp_path / "one" / "a.txt").write_text("a")
  out = str(tmp_path / "out")
  for source, problem in (
    ("one", "holds 1 readable documents (skipped: nothing): give two or more"),
    ("nowhere", "does not exist"),
  ):
    assert main(["data", "prepare", str(tmp_path / source), out]) == 2
    assert problem in capsys.readouterr().err
  assert (
    main(["data", "prepare", str(text), out]) == 0
  )  # the directory of the attempt is no obstacle
  assert main(["data", "prepare", out, str(tmp_path / "again")]) == 2
  assert "holds a prepared corpus among its files: give its directory" in capsys.readouterr().err
  with pytest.raises(ValueError, match="holds a prepared corpus among its files"):
    load(tmp_path)
  (tmp_path / "out" / METADATA).unlink()
  with pytest.raises(ValueError, match=r"no readable document \(skipped: 2 other format"):
    load(out)


# Damage.


def damage(out, kind):
  shard = out / "00001.tokens"
  if kind == "missing":
    shard.unlink()
  elif kind == "cut":
    os.truncate(shard, shard.stat().st_size // 2)
  elif kind == "index":
    os.truncate(out / "index.bin", 32)
  elif kind == "index changed":
    flip(out / "index.bin", 9)
  elif kind == "format":
    (out / METADATA).write_text(json.dumps({"format": "other/2"}))
  else:
    (out / METADATA).write_text("{")


@pytest.mark.parametrize(
  ("kind", "problem"),
  [
    ("missing", "is damaged, 00001.tokens is missing: restore"),
    ("cut", r"00001.tokens has \d+ bytes instead of \d+: restore the file or prepare"),
    ("index", "index.bin has 32 bytes instead of 480"),
    ("index changed", "index.bin has changed"),
    ("format", "is not of the format ttt_jax_data/1: .* prepare the corpus again"),
    ("metadata", "ttt_jax_data.json cannot be read"),
  ],
)
def test_damage_is_found_before_training(text, tmp_path, records_of_16, kind, problem):
  data.prepare(str(text), tmp_path / "out", shard_bytes=300)
  damage(tmp_path / "out", kind)
  with pytest.raises(ValueError, match=problem):
    load(tmp_path / "out")


@pytest.mark.parametrize("max_bad_records", [0, 1])
def test_a_corrupt_record_is_named_and_counted(text, tmp_path, records_of_16, max_bad_records):
  data.prepare(str(text), tmp_path / "out")
  shard = tmp_path / "out" / "00000.tokens"
  first = sorted(path.relative_to(text).as_posix() for path in text.rglob("*.txt"))[0]
  content = shard.read_bytes()
  # Records this short are stored as they are.
  at = content.index((text / first).read_bytes()[:8])
  flip(shard, at + 3)
  corpus = load(tmp_path / "out", max_bad_records=max_bad_records, heldout_fraction=1e-9)

  def batches(count, state=None):
    rows = data.training_rows(corpus.sources, seq_len=24, batch_size=2, seed=0)
    with closing(rows):
      if state is not None:
        rows.set_state(state)
      found = list(itertools.islice(rows, count))
      return np.stack([batch["tokens"] for batch in found]), rows.get_state()

  place = r"00000.tokens, record 0 is corrupt"
  if max_bad_records == 0:
    with pytest.raises(ValueError, match=f"{place} .*: 1 corrupt records are more than"):
      batches(100)
    return
  with pytest.warns(UserWarning, match=f"{place} and skipped") as warned:
    whole, _ = batches(100)
  assert len(warned) == 1  # not again in every epoch
  assert corpus.skipped.counts() == {"corrupt": 1}
  _, state = batches(37)
  np.testing.assert_array_equal(batches(63, state)[0], whole[37:])


def test_progress_where_there_is_no_terminal(text, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(preparation, "_LINE_SECONDS", 0)
  assert main(["data", "prepare", str(text), str(tmp_path / "out")]) == 0
  lines = capsys.readouterr().err.splitlines()
  assert "29/30 files  30 documents" in " ".join(lines)
  assert lines[-1].endswith("skipped: nothing")


def test_a_text_field_that_no_source_has_is_refused(text, tmp_path):
  records = tmp_path / "records"
  records.mkdir()
  lines = [json.dumps({"body": f"text {i}", "text": f"other {i}"}) for i in range(4)]
  (records / "a.jsonl").write_text("\n".join(lines))
  data.prepare(str(records), tmp_path / "body", text_field="body")
  data.prepare(str(text), tmp_path / "plain")
  for field in (None, "body"):
    (source,) = load(tmp_path / "body", text_field=field).sources
    assert data.decode(source.train.read(0, 0, 4)) == "text"
  with pytest.raises(
    UserError, match=r"data\.text_field='text', but .* from the field body: leave"
  ):
    load(tmp_path / "body", text_field="text")
  for path in (text, tmp_path / "plain"):
    load(path)
    with pytest.raises(UserError, match=r"data\.text_field='body' has no effect, no source"):
      load(path, text_field="body")
  with pytest.raises(UserError, match=r"text_field='body' has no effect, no file of"):
    data.prepare(str(text), tmp_path / "out", text_field="body")
  assert not (tmp_path / "out").exists()
  # An older version did not record the field.
  metadata = json.loads((tmp_path / "body" / METADATA).read_text())
  older = {k: x for k, x in metadata.items() if k != "text_field"}
  (tmp_path / "body" / METADATA).write_text(json.dumps(older))
  assert len(load(tmp_path / "body", text_field="content").sources) == 1
  (tmp_path / "body" / METADATA).write_text(json.dumps(metadata))
  # A prepared source keeps its field beside one that needs another.
  mixture = tuple(WeightedSource(str(path)) for path in (tmp_path / "body", records))
  corpus = load(None, mixture=mixture, text_field="text")
  assert "prepared from the field body;" in corpus.report()
  first, second = corpus.sources
  read = [data.decode(source.train.read(0, 0, 5)) for source in (first, second)]
  assert read == ["text ", "other"]
