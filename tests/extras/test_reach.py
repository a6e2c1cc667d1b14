"""Tests the reach of a corpus on documents whose reach is known, and the joining of files."""

import json
import sys

import numpy as np
import pytest
from helpers import write_files

from ttt_jax import UserError
from ttt_jax.cli import main
from ttt_jax.config import DataConfig
from ttt_jax.data import load_corpus
from ttt_jax.data.skipped import Skipped
from ttt_jax.extras.join import join
from ttt_jax.extras.reach.command import run_reach, summary
from ttt_jax.extras.reach.measure import COMPRESSORS, ReachConfig, Text, bits, sample

# A block of 512 comes again 3072 bytes later: beyond 1024 and within 4096, wherever it begins.
CONTEXTS, BLOCK, DISTANCE = (64, 1024, 4096, 8192), 512, 3072


def letters(size, seed):
  """Random small letters, log2(26) = 4.7 bits each."""
  return np.random.default_rng(seed).integers(97, 123, size, dtype=np.uint8).tobytes()


def repeating(period, size, seed):
  return (letters(period, seed) * (size // period + 1))[:size]


def config(compressor="ppmd", **options):
  return ReachConfig(
    **{
      "contexts": CONTEXTS,
      "block": BLOCK,
      "documents": 4,
      "blocks": 3,
      "primer": 4096,
      "compressor": compressor,
      **options,
    }
  )


@pytest.fixture(params=COMPRESSORS)
def compressor(request):
  if request.param == "ppmd":
    pytest.importorskip("pyppmd")
  return request.param


def texts(make):
  return [Text(f"{i}.txt", make(i)) for i in range(4)]


def read_lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Known answers.


def test_a_copy_saves_all_once_the_context_reaches_it(compressor):
  measured = bits(texts(lambda i: repeating(DISTANCE, 16384, i)), config(compressor))
  assert measured.shape == (4, len(CONTEXTS))
  plain = BLOCK * np.log2(26)
  assert np.all(measured[:, :2] > 0.95 * plain)
  assert np.all(measured[:, 2:] < 0.15 * plain)


def test_random_letters_have_no_reach(compressor):
  measured = bits(texts(lambda i: letters(16384, i)), config(compressor))
  plain = BLOCK * np.log2(26)
  assert np.all(np.abs(measured[:, :1] - measured) < 0.05 * plain)


def test_a_primer_takes_away_what_other_documents_tell(compressor):
  """All documents are made of the same words, so that only a compressor without a primer has to learn."""
  words = [letters(12, 100 + i) for i in range(16)]

  def make(i):
    return b" ".join(words[w] for w in np.random.default_rng(i).integers(16, size=1024))

  cold, warm = (bits(texts(make), config(compressor, primer=p)).mean(axis=0) for p in (0, 8192))
  assert cold[0] - cold[-1] > 300
  assert warm[0] - warm[-1] < 0.2 * (cold[0] - cold[-1])


def test_the_seed_chooses_blocks_documents_and_primers(compressor):
  documents = texts(lambda i: repeating(5000, 16384, i))
  same, again, other = (
    bits(documents, config(compressor, seed=s, primer=1024, contexts=(64, 1024))) for s in (1, 1, 2)
  )
  assert np.array_equal(same, again)
  assert not np.array_equal(same, other)


def test_summary_has_savings_shares_and_ratios():
  measured = np.array([[4000.0, 3900, 3700, 3600], [6000, 5700, 5300, 5000]])
  rows = summary(measured, config("lzma"))["by_context"]
  assert [row["saved_bits"] for row in rows] == [0, 200, 500, 700]
  assert [row["share"] for row in rows] == [0, 0.04, 0.1, 0.14]
  assert rows[1]["bits_per_byte"] == 4800 / BLOCK
  assert [row["times"] for row in rows[2:]] == [2.5, 3.5]
  assert rows[3]["low"] == 400
  assert rows[3]["high"] == 1000
  assert (rows[2]["times_low"], rows[2]["times_high"]) == (700 / 300, 3)


def test_summary_has_no_ratio_to_nothing_and_no_interval_of_one_document():
  rows = summary(np.array([[4000.0, 4000, 3700, 3600]]), config("lzma"))["by_context"]
  assert rows[2]["times"] is rows[2]["times_low"] is rows[2]["low"] is None


# The command.


def test_the_command_writes_table_json_and_plot(tmp_path, capsys):
  path = write_files(
    tmp_path / "texts", {f"{i}.txt": repeating(DISTANCE, 16384, i) for i in range(3)}
  )
  write_files(tmp_path / "texts", {"short.txt": "short", "picture.png": "no text"})
  words = [
    "data",
    "reach",
    path,
    "--contexts",
    "64",
    "1024",
    "4096",
    "--block",
    "512",
    "--blocks",
    "2",
  ]
  words += ["--compressor", "lzma", "--primer", "1024", "--out", str(tmp_path / "out")]
  assert main(words) == 0
  assert "3 of 4 documents have 4,608 bytes" in capsys.readouterr().out
  report = json.loads((tmp_path / "out" / "reach.json").read_text())
  assert [row["context"] for row in report["by_context"]] == [64, 1024, 4096]
  assert report["by_context"][2]["share"] > 0.8
  assert (report["documents"], report["long_documents"], len(report["measured"])) == (4, 3, 3)
  assert report["bytes"] == 3 * 16384 + 5
  assert report["skipped"] == {"other_format": 1}
  assert (tmp_path / "out" / "reach.png").stat().st_size > 10_000


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
  path = write_files(tmp_path / "texts", {f"{i}.txt": letters(8192, i) for i in range(2)})
  monkeypatch.chdir(tmp_path)
  run_reach(path, config("lzma", contexts=(64, 1024)))
  assert [entry.name for entry in tmp_path.iterdir()] == ["texts"]


def test_documents_are_drawn_by_name(tmp_path):
  path = write_files(tmp_path, {f"{i}.txt": letters(9000, i) for i in range(9)})
  names = {
    seed: [text.name for text in sample(path, config("lzma", seed=seed), Skipped()).documents]
    for seed in (0, 1)
  }
  assert len(set(names[0])) == len(set(names[1])) == 4
  assert names[0] != names[1]


# Errors.


def test_a_corpus_that_is_too_short_is_refused_with_its_longest_documents(tmp_path, capsys):
  path = write_files(tmp_path, {f"{i}.txt": letters(1000 * (i + 1), i) for i in range(5)})
  assert main(["data", "reach", path, "--compressor", "lzma"]) == 2
  error = capsys.readouterr().err
  assert "no document of 266,240 bytes" in error
  assert "5 documents have 5,000, 4,000, 3,000 bytes" in error
  assert "--contexts" in error
  assert "data join" in error


def test_one_document_has_no_primer(tmp_path):
  path = write_files(tmp_path, {"a.txt": letters(16384, 0), "b.txt": "b"})
  with pytest.raises(UserError, match=r"holds one document .*--primer 0"):
    sample(path, config("lzma"), Skipped())
  assert len(sample(path, config("lzma", primer=0), Skipped()).documents) == 1


def test_an_empty_directory_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no text"):
    sample(str(tmp_path), config("lzma"), Skipped())


def test_a_prepared_corpus_is_refused(tmp_path):
  source = write_files(tmp_path / "texts", {f"{i}.txt": letters(100, i) for i in range(2)})
  assert main(["data", "prepare", source, str(tmp_path / "prepared")]) == 0
  with pytest.raises(
    UserError, match=r"prepared corpus of tokens: .* the text that it was made from"
  ):
    sample(str(tmp_path / "prepared"), config("lzma"), Skipped())


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"contexts": (1024,)}, "two or more ascending"),
    ({"contexts": (4096, 1024)}, "two or more ascending"),
    ({"contexts": (-1, 1024)}, "two or more ascending"),
    ({"block": 0}, "block=0 must be at least 1"),
    ({"documents": 1}, "documents=1 leaves no other document for primer=4096"),
    ({"primer": -1}, "primer=-1 must be at least 0"),
    ({"compressor": "zip"}, "compressor='zip' must be one of ppmd, lzma"),
    ({"contexts": (1024, 1 << 26)}, "more than PPMd remembers, 33554431 bytes"),
  ],
)
def test_options_out_of_range_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    config(**options)


def test_a_missing_pyppmd_names_its_extra_before_anything_is_read(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyppmd", None)
  with pytest.raises(UserError, match=r"pip install 'ttt_jax\[reach\]', or .*lzma"):
    sample("nowhere", config("ppmd"), Skipped())


# Joining files.


def test_the_files_of_each_entry_become_a_document(tmp_path, capsys):
  source = write_files(
    tmp_path / "packages",
    {
      "b/z.py": "z = 1\n",
      "b/a/y.py": "é = 2\n\n\n",
      "a/x.py": "x = 3",
      "a/empty.py": "",
      "a/x.pyc": b"\xff",
      "one.py": "one = 4\n",
      ".hidden/h.py": "h",
      "c/notes.txt": "not matched",
    },
  )
  destination = tmp_path / "data" / "packages.jsonl"
  assert main(["data", "join", f"{source}/**/*.py", str(destination)]) == 0
  assert "3 documents of 4 files" in capsys.readouterr().out
  assert read_lines(destination) == [
    {"text": "# a/x.py\nx = 3\n\n", "path": "a"},
    {"text": "# b/a/y.py\né = 2\n\n# b/z.py\nz = 1\n\n", "path": "b"},
    {"text": "# one.py\none = 4\n\n", "path": "one.py"},
  ]
  assert main(["data", "join", source, str(destination)]) == 2
  assert "exists: delete it, or give another one" in capsys.readouterr().err


def test_joined_documents_are_a_corpus(tmp_path):
  source = write_files(
    tmp_path / "in", {f"{i}/{j}.txt": f"{i} {j}" for i in range(3) for j in range(2)}
  )
  joined = join(source, tmp_path / "out.jsonl")
  assert (joined.documents, joined.files) == (3, 6)
  (loaded,) = load_corpus(DataConfig(path=str(tmp_path / "out.jsonl")), seed=0).sources
  assert sum(loaded.train.lengths) + sum(loaded.heldout.lengths) == joined.bytes


@pytest.mark.parametrize(
  ("source", "destination", "message"),
  [
    ("texts", "out.txt", "must end in .jsonl"),
    ("nowhere", "out.jsonl", "does not exist"),
    ("empty", "out.jsonl", "holds no text"),
  ],
)
def test_what_cannot_be_joined_is_refused_and_nothing_written(
  tmp_path, source, destination, message
):
  write_files(tmp_path, {"texts/a.txt": "a", "empty/a/b.txt": ""})
  with pytest.raises(UserError, match=message):
    join(str(tmp_path / source), tmp_path / destination)
  assert not (tmp_path / destination).exists()
