"""Tests the tokens at document boundaries: in memory, prepared, in rows; a trained model stops there."""

import dataclasses
import itertools
import json
from contextlib import closing

import numpy as np
import pytest
import tokenizers
from helpers import random_model
from tokenizers import decoders, models, pre_tokenizers, processors

from ttt_jax import data, save_pretrained
from ttt_jax.checkpoints.runs import with_recorded_data
from ttt_jax.checkpoints.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import Config, DataConfig, EvalConfig, ModelConfig
from ttt_jax.config.recorded import CONFIG_FILE
from ttt_jax.config.yaml import load_yaml
from ttt_jax.data.boundaries import boundaries
from ttt_jax.data.load import load_data
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.training.rundir import hold_run, open_run

METADATA = "ttt_jax_data.json"
WORDS = ("<s>", "</s>", "<end>", "a", "b", "c", "d", "?")
BOS, EOS, END, A, B, C, D, _ = range(len(WORDS))


def tokenizer_of(own="$A", *, bos=BOS, eos=(EOS,), eos_id=None):
  """Makes a tokenizer with a token per word; `own` are the tokens that it puts around each text."""
  backend = tokenizers.Tokenizer(
    models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?")
  )
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.decoder = decoders.WordPiece()
  backend.add_special_tokens(list(WORDS[:3]))
  backend.post_processor = processors.TemplateProcessing(
    single=own, special_tokens=[(word, i) for i, word in enumerate(WORDS[:3])]
  )
  return Tokenizer(backend, bos_id=bos, eos_ids=eos, eos_id=eos_id)


def write(path, texts):
  path.mkdir(exist_ok=True)
  for i, text in enumerate(texts):
    (path / f"{i}.txt").write_text(text)
  return path


def save(tokenizer, path):
  path.mkdir()
  tokenizer.save(path)
  return path


def load(path, tokenizer, **options):
  return data.load_corpus(DataConfig(path=str(path), **options), seed=0, tokenizer=tokenizer)


def documents(corpus):
  """Returns the tokens of all documents, whatever their order."""
  parts = [part for source in corpus.sources for part in (source.train, source.heldout)]
  found = [part.read(i, 0, int(n)) for part in parts for i, n in enumerate(part.lengths)]
  return sorted(tokens.tolist() for tokens in found)


# Around a document.

OWN = {"nothing": "$A", "start": "<s> $A", "end": "$A </s>", "both": "<s> $A </s>"}


@pytest.mark.parametrize(
  ("own", "start", "end", "before", "behind"),
  [
    ("nothing", None, None, [], [EOS]),
    ("nothing", None, True, [], [EOS]),
    ("nothing", None, False, [], []),
    ("nothing", True, None, [BOS], [EOS]),
    ("nothing", False, False, [], []),
    ("start", None, None, [BOS], [EOS]),
    ("start", True, True, [BOS], [EOS]),
    ("start", None, False, [BOS], []),
    ("start", False, True, [], [EOS]),
    ("end", None, None, [], [EOS]),
    ("end", True, None, [BOS], [EOS]),
    ("end", False, True, [], [EOS]),
    ("both", None, None, [BOS], [EOS]),
    ("both", True, True, [BOS], [EOS]),
    ("both", False, None, [], [EOS]),
    ("both", None, False, [BOS], [EOS]),  # none is added
    ("both", False, False, [], [EOS]),
  ],
)
def test_each_document_has_them_once_in_memory_and_prepared(
  tmp_path, own, start, end, before, behind
):
  texts = ["a b c", "d", "b a", "c c"]
  expected = sorted(before + x + behind for x in ([A, B, C], [D], [B, A], [C, C]))
  tokenizer = tokenizer_of(OWN[own])
  path = save(tokenizer, tmp_path / "tokenizer")
  source, asked = write(tmp_path / "text", texts), {"start_of_text": start, "end_of_text": end}
  memory = load(source, tokenizer, **asked)
  assert documents(memory) == expected
  metadata = data.prepare(str(source), tmp_path / "out", tokenizer=str(path), **asked)
  assert metadata["start_of_text"] is (before == [BOS])
  assert metadata["end_of_text"] is (end is not False)
  assert metadata["tokens"] == sum(map(len, expected))
  for how in (asked, {}):
    disk = load(tmp_path / "out", load_tokenizer(path), **how)
    assert documents(disk) == expected
    assert disk.sources[0].end_of_text is memory.sources[0].end_of_text is (end is not False)
  said = f"each with{'out' if end is False else ''} an end-of-text token; skipped: nothing."
  assert memory.report().endswith(said)


def test_a_text_that_spells_them_out_is_not_ended_twice(tmp_path):
  source = write(tmp_path / "text", ["<s> a b </s>", "c", "</s> d"])
  found = documents(load(source, tokenizer_of(), start_of_text=True))
  assert found == sorted([[BOS, A, B, EOS], [BOS, C, EOS], [BOS, EOS, D, EOS]])


def test_one_token_may_do_both(tmp_path):
  tokenizer = tokenizer_of("</s> $A", bos=EOS)
  assert documents(load(write(tmp_path / "text", ["a", "b c"]), tokenizer)) == [
    [EOS, A, EOS],
    [EOS, B, C, EOS],
  ]


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer(), tokenizer_of(eos=(), bos=None)])
def test_where_there_are_no_such_tokens_nothing_changes(tmp_path, tokenizer):
  source = write(tmp_path / "text", ["a b", "c d"])
  expected = (
    [[A, B], [C, D]] if tokenizer and tokenizer.vocab_size < 256 else [[*b"a b"], [*b"c d"]]
  )
  for asked in ({}, {"start_of_text": False, "end_of_text": False}):
    corpus = load(source, tokenizer, **asked)
    assert documents(corpus) == expected
    assert "end-of-text" not in corpus.report()


@pytest.mark.parametrize(("field", "key"), [("start_of_text", "bos"), ("end_of_text", "eos")])
def test_true_needs_the_token(tmp_path, field, key, capsys):
  source = write(tmp_path / "text", ["a", "b"])
  without = tokenizer_of(eos=(), bos=None)
  path = save(without, tmp_path / "tokenizer")
  message = (
    rf"data.{field}=true, but the tokenizer '{path}' has no {field[:-8]}.*: name its {key}_t"
  )
  config = DataConfig(path=str(source), tokenizer=str(path), **{field: True})
  with pytest.raises(ValueError, match=message):
    data.load_corpus(config, seed=0, tokenizer=without)
  with pytest.raises(ValueError, match=message):
    data.prepare(str(source), tmp_path / "out", tokenizer=str(path), **{field: True})
  with pytest.raises(ValueError, match=f"data.{field}=true, but bytes have no"):
    load(source, None, **{field: True})
  flag = "--" + field.replace("_", "-")
  assert main(["data", "prepare", str(source), str(tmp_path / "out"), flag]) == 2
  assert "bytes have no" in capsys.readouterr().err
  # An id that a model's config names and the vocabulary does not have.
  foreign = tokenizer_of(eos=(len(WORDS),), bos=len(WORDS))
  with pytest.raises(ValueError, match=f"data.{field}=true, but the tokenizer"):
    boundaries(foreign, **{field: True})
  assert documents(load(source, foreign)) == [[A], [B]]


@pytest.mark.parametrize(
  ("ids", "named", "chosen"),
  [
    ([EOS, END], "<end>", END),
    ([EOS, END], None, EOS),
    ([END, EOS], "<s>", END),
    (None, "</s>", EOS),
  ],
)
def test_which_of_several(tmp_path, ids, named, chosen):
  path = save(tokenizer_of(bos=None, eos=()), tmp_path / "tokenizer")
  (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
  (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
  tokenizer = load_tokenizer(path)
  assert tokenizer.eos_ids == tuple(ids or (EOS,))
  assert documents(load(write(tmp_path / "text", ["a", "b"]), tokenizer)) == [
    [A, chosen],
    [B, chosen],
  ]


def test_a_tokenizer_that_would_cut_or_fill_texts_does_neither(tmp_path):
  """Loads as `transformers` does: saved truncation and padding are settings of another program."""
  tokenizer = tokenizer_of()
  tokenizer._backend.enable_truncation(2)
  tokenizer._backend.enable_padding(length=5)
  tokenizer = load_tokenizer(save(tokenizer, tmp_path / "tokenizer"))
  source = write(tmp_path / "text", ["a b c d", "a"])
  assert documents(load(source, tokenizer)) == [[A, EOS], [A, B, C, D, EOS]]


# Prepared.


@pytest.fixture
def prepared(tmp_path):
  """Returns a function that prepares two documents: (directory, tokenizer, its path)."""
  source = write(tmp_path / "text", ["a b", "c"])

  def prepare(own="$A", **asked):
    tokenizer = tokenizer_of(own)
    path = save(tokenizer, tmp_path / "tokenizer")
    data.prepare(str(source), tmp_path / "out", tokenizer=str(path), **asked)
    return tmp_path / "out", tokenizer

  return prepare


@pytest.mark.parametrize("field", ["start_of_text", "end_of_text"])
@pytest.mark.parametrize("value", [True, False])
def test_a_run_that_says_otherwise_is_refused(prepared, field, value):
  out, tokenizer = prepared(**{field: value})
  load(out, tokenizer, **{field: value})
  flag = field.replace("_", "-")
  with pytest.raises(ValueError, match="was prepared with") as error:
    load(out, tokenizer, **{field: not value})
  was, again = (f"--{flag}", f"--no-{flag}") if value else (f"--no-{flag}", f"--{flag}")
  assert f"data.path={str(out)!r} was prepared with {was}, but" in str(error.value)
  assert f"data.{field}={'false' if value else 'true'}: leave data.{field} out" in str(error.value)
  assert str(error.value).endswith(f"prepare it again with {again}")


@pytest.mark.parametrize("own", ["$A", "<s> $A"])
def test_what_an_older_version_prepared_is_read_as_it_is(prepared, own):
  out, tokenizer = prepared(own, end_of_text=False)
  metadata = json.loads((out / METADATA).read_text())
  older = {k: v for k, v in metadata.items() if "_of_text" not in k}
  assert len(older) == len(metadata) - 4
  (out / METADATA).write_text(json.dumps(older))
  before = [BOS] if own != "$A" else []
  for asked in ({}, {"end_of_text": False}, {"start_of_text": bool(before)}):
    corpus = load(out, tokenizer, **asked)
    assert documents(corpus) == [[*before, A, B], [*before, C]]
    assert "each without an end-of-text token" in corpus.report()
  for asked in ({"end_of_text": True}, {"start_of_text": not before}):
    with pytest.raises(ValueError, match="leave data"):
      load(out, tokenizer, **asked)


def test_the_token_must_be_one_of_the_tokenizer(prepared):
  """Two tokenizers of one vocabulary may end texts differently, as those of a model before and after
  its instruction do."""
  out, _ = prepared(start_of_text=True)
  load(out, tokenizer_of(eos=(END, EOS)))
  with pytest.raises(ValueError, match=r"end-of-text token 1, which is none of .* data.tokenizer="):
    load(out, tokenizer_of(eos=(END,)))
  with pytest.raises(ValueError, match=r"start-of-text token 0, which is none of"):
    load(out, tokenizer_of(bos=END))


@pytest.mark.parametrize(
  ("flags", "start", "end"),
  [
    ([], False, True),
    (["--no-end-of-text"], False, False),
    (["--start-of-text", "--end-of-text"], True, True),
  ],
)
def test_flags(tmp_path, flags, start, end):
  source = write(tmp_path / "text", ["a", "b"])
  path, out = save(tokenizer_of(), tmp_path / "tokenizer"), tmp_path / "out"
  assert main(["data", "prepare", str(source), str(out), "--tokenizer", str(path), *flags]) == 0
  metadata = json.loads((out / METADATA).read_text())
  assert (metadata["start_of_text"], metadata["end_of_text"]) == (start, end)
  assert metadata["start_of_text_id"] == (BOS if start else None)
  assert metadata["end_of_text_id"] == (EOS if end else None)


# Rows.


@pytest.mark.parametrize("align", [1, 2])
@pytest.mark.parametrize("on_disk", [False, True])
def test_labels_at_the_ends_of_documents(tmp_path, align, on_disk):
  """Rows of 8: the label of a text's last token is the end, and only the true end of a long text has it."""
  source = write(tmp_path / "text", ["a b", "c " * 3, "d " * 11, "b " * 7, "a"])
  tokenizer = tokenizer_of()
  if on_disk:
    path = save(tokenizer, tmp_path / "tokenizer")
    data.prepare(str(source), tmp_path / "out", tokenizer=str(path))
    source = tmp_path / "out"
  corpus = load(source, tokenizer, heldout_fraction=1e-9)  # one text, of five, is held out
  found = {}
  rows = data.training_rows(corpus.sources, seq_len=8, batch_size=2, seed=0, align=align)
  with closing(rows):
    for batch in itertools.islice(rows, 60):
      for row in zip(*(batch[name] for name in ("tokens", "segment_ids", "labels"))):
        tokens, ids, labels = map(np.asarray, row)
        for segment in range(1, ids.max() + 1):
          at = ids == segment
          found[tuple(tokens[at].tolist())] = labels[at].tolist()
  expected = {
    (A, B, EOS): [B, EOS, -1],
    (C, C, C, EOS): [C, C, EOS, -1],
    (D,) * 8: [D] * 7 + [-1],
    (D, D, D, EOS): [D, D, EOS, -1],
    (B,) * 7 + (EOS,): [B] * 6 + [EOS, -1],
    (A, EOS): [EOS, -1],
  }
  held = tuple(corpus.sources[0].heldout.read(0, 0, 99).tolist())
  missing = {held[i : i + 8] for i in range(0, len(held), 8)}
  assert found == {piece: labels for piece, labels in expected.items() if piece not in missing}
  assert len(found) >= 4


def test_held_out_rows_end_where_documents_do(tmp_path):
  source = write(tmp_path / "text", ["a b c d", "b b b", "c"])
  corpus = load(source, tokenizer_of("<s> $A"), heldout_fraction=1 - 1e-9)
  rows = data.heldout_rows(corpus.sources, seq_len=5, max_documents=9, seed=0).tolist()
  assert set(map(tuple, rows)) <= {(BOS, A, B, C, D), (BOS, B, B, B, EOS)}
  assert (BOS, B, B, B, EOS) in set(map(tuple, rows))


# Runs that go on.


def run_config(tmp_path, **options):
  path = tmp_path / "tokenizer"
  if not path.exists():
    save(tokenizer_of(), path)
  source = write(tmp_path / "text", ["a b", "c", "d a"])
  return Config(
    run_dir=str(tmp_path / "run"),
    model=ModelConfig(vocab_size=len(WORDS)),
    data=DataConfig(path=str(source), tokenizer=str(path), **options),
  )


def test_a_run_of_an_older_version_keeps_its_tokens(tmp_path):
  config, ends = run_config(tmp_path), [[A, B, EOS], [C, EOS], [D, A, EOS]]
  assert documents(load_data(config)) == ends
  run = open_run(config.run_dir, config)
  assert with_recorded_data(config) == config  # of this version
  file = run / CONFIG_FILE
  lines = file.read_text().splitlines(keepends=True)
  file.write_text("".join(line for line in lines if "_of_text:" not in line))
  assert documents(load_data(with_recorded_data(config))) == [[A, B], [C], [D, A]]
  assert with_recorded_data(config).data.end_of_text is False
  before = file.read_bytes()
  with pytest.raises(ValueError, match=r"another config:\s+data.end_of_text: False -> True"):
    open_run(run, run_config(tmp_path, end_of_text=True))
  for same in (config, with_recorded_data(config), run_config(tmp_path, end_of_text=False)):
    with hold_run(run, same):
      assert file.read_bytes() == before
  # What is recorded anew says so, for later.
  longer = dataclasses.replace(run_config(tmp_path), eval=EvalConfig(documents=3))
  open_run(run, longer)
  assert load_yaml(file)["data"]["end_of_text"] is False
  assert with_recorded_data(config).data.end_of_text is False
  open_run(run, config)
  with pytest.raises(ValueError, match=r"data.end_of_text: False -> True"):
    open_run(run, run_config(tmp_path, end_of_text=True))


# A model that stops.


def test_what_ends_a_text():
  model = ModelConfig(vocab_size=6, eos_ids=(4,))
  assert stop_tokens(model, None) == (4,)
  assert stop_tokens(model, tokenizer_of(eos=(4, EOS, 7))) == (4, EOS)  # the model has no token 7
  assert stop_tokens(ModelConfig(), byte_tokenizer()) == ()


@pytest.mark.usefixtures("standard_promotion")
def test_a_model_stops_where_documents_ended(tmp_path, capsys):
  """Trains from scratch, so that only labels and the tokenizer can teach the model."""
  tokenizer = save(tokenizer_of(), tmp_path / "tokenizer")
  source = write(tmp_path / "text", ["a b c"] * 12)
  config = {
    "run_dir": str(tmp_path / "run"),
    "data": {"path": str(source), "tokenizer": str(tokenizer), "seq_len": 16},
    "model": {"vocab_size": 8, "num_layers": 1, "d_model": 12, "d_ff": 20, "num_heads": 2}
    | {"num_kv_heads": 1, "head_dim": 6, "dtype": "float32"},
    "ttt": {"layers": [0], "chunk_size": 4},
    "train": {"steps": 40, "batch_size": 2, "learning_rate": 2e-2, "warmup_steps": 2},
    "eval": {"seq_len": 4, "buckets": 2, "prompt_tokens": 4, "temperature": 0.0},
  }
  (tmp_path / "config.yaml").write_text(json.dumps(config))
  assert main(["train", str(tmp_path / "config.yaml")]) == 0
  capsys.readouterr()
  assert main(["generate", str(tmp_path / "run"), "--prompt", "a", "--max-new-tokens", "50"]) == 0
  out, err = capsys.readouterr()
  assert out == "b c\n"
  assert "wrote 3 " in err
  sample = json.loads((tmp_path / "run" / "summary.json").read_text())["sample"]
  assert sample == {"prompt": "a b c", "continuation": ""}  # not of what is behind the end


def test_a_saved_model_names_the_tokens_of_its_tokenizer(tmp_path):
  """Other libraries stop where its config says; a model that names its own keeps them."""
  sizes = {"num_layers": 1, "d_model": 8, "d_ff": 12, "num_heads": 1, "num_kv_heads": 1}
  for name, own, written in (
    ("a", {}, {"bos_token_id": BOS, "eos_token_id": [EOS, END]}),
    ("b", {"bos_id": A, "eos_ids": (B,)}, {"bos_token_id": A, "eos_token_id": B}),
  ):
    model = random_model(ModelConfig(**sizes, **own), None, None)
    save_pretrained(model, tmp_path / name, tokenizer=tokenizer_of(eos=(EOS, END)))
    config = json.loads((tmp_path / name / "config.json").read_text())
    assert {key: config[key] for key in written} == written
