"""Made facts, what a model knows of them behind a cut, and the search for a memory without training."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from helpers import random_model

import ttt_jax
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import ModelConfig, TTTConfig
from ttt_jax.extras.calibrate import CalibrationConfig, Setting, calibrate
from ttt_jax.extras.facts.evaluate import score_facts
from ttt_jax.extras.facts.make import (
  FactDocuments,
  make_document,
  make_row,
  make_rows,
  write_documents,
)
from ttt_jax.extras.facts.sets import SETS, Fact

MODEL = ModelConfig(num_layers=3, d_model=16, d_ff=24, num_heads=2, num_kv_heads=2)
TTT = TTTConfig(layers=(1,), chunk_size=16, rule="least_squares", read_scale=3.0)


def encode(text):
  return list(text.encode())


def test_a_row_states_its_facts_twice():
  facts = SETS["evaluation"].draw(random.Random(0), 3)
  row = make_row(facts, encode, half=200, rng=random.Random(1))
  halves = bytes(row.tokens[: row.cut]).decode(), bytes(row.tokens[row.cut :]).decode()
  assert len(row.tokens) == 2 * row.cut == 400
  for fact in facts:
    assert all(fact.text in half for half in halves)
  assert sorted(halves[0].split("\n")) == sorted(halves[1].split("\n"))
  asked = bytes(row.tokens[i] for i in row.answers).decode()
  assert sorted(asked.split()) == sorted(fact.answer.strip() for fact in facts)
  assert [row.tokens[i] for i in row.firsts] == [ord(" ")] * 3
  assert len(row.kinds) == len(row.answers)


def test_prose_lies_between_the_facts():
  prose = encode("0123456789" * 100)
  facts = [Fact("The end is", " near", "x"), Fact("The sky is", " blue", "y")]
  row = make_row(facts, encode, half=150, rng=random.Random(3), prose=prose)
  for part, half in enumerate((row.tokens[:150], row.tokens[150:])):
    text = bytes(half).decode()
    for fact in facts:
      assert text.count(fact.text) == 1
      text = text.replace(fact.text, "")
    assert text == bytes(prose[150 * part : 150 * part + len(text)]).decode()


def test_the_sets_share_nothing():
  words = [
    {
      *facts.subjects,
      *(template for kind in facts.kinds for template in kind.templates),
      *(a for kind in facts.kinds if not isinstance(kind.answers, int) for a in kind.answers),
    }
    for facts in SETS.values()
  ]
  assert len(words) == 3
  for one, other in itertools.combinations(words, 2):
    assert not one & other
  assert not any("special magic" in word for one in words for word in one)


def test_a_document_states_its_facts_in_every_part(tmp_path):
  lines = [f"line {i}\n" for i in range(100)]
  config = FactDocuments(documents=3, facts=(2, 5), parts=3, characters=60)
  text = make_document(config, 1, lines)
  assert text == make_document(config, 1, lines) != make_document(config, 2, lines)
  kept = [line for line in text.splitlines(keepends=True) if not line.startswith("line ")]
  facts = set(kept)
  assert 2 <= len(facts) <= 5
  assert len(kept) == 3 * len(facts) == 3 * len(set(kept[: len(facts)]))
  prose = [line for line in text.splitlines(keepends=True) if line.startswith("line ")]
  start = lines.index(prose[0])
  assert prose == [lines[(start + i) % 100] for i in range(len(prose))]
  assert len("".join(prose)) >= 180
  path = write_documents(tmp_path / "facts", config, prose="".join(lines))
  written = [json.loads(line)["text"] for line in path.read_text().splitlines()]
  assert len(set(written)) == 3
  with pytest.raises(ttt_jax.UserError, match="is there already"):
    write_documents(tmp_path / "facts", config, prose="".join(lines))
  with pytest.raises(ttt_jax.UserError, match=r"the text has 9 characters, .* need 180"):
    write_documents(tmp_path / "other", config, prose="too short")
  assert not (tmp_path / "other").exists()


def test_the_command_writes_documents(tmp_path, capsys):
  main(
    ["data", "facts", str(tmp_path), "--characters", "0", "--documents", "5", "--facts", "1", "2"]
  )
  assert f"written: {tmp_path / 'facts.jsonl'}" in capsys.readouterr().out
  assert len((tmp_path / "facts.jsonl").read_text().splitlines()) == 5
  assert main(["data", "facts", str(tmp_path / "x"), "--facts", "3", "2"]) == 2


def test_rows_are_drawn_by_the_seed():
  make = lambda seed: make_rows("evaluation", encode, rows=2, facts=3, half=256, seed=seed)  # noqa: E731
  assert make(0) == make(0) != make(1)
  assert make(0)[0] != make(0)[1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "other"}, "'other' is not one of training, calibration, evaluation"),
    ({"facts": 1000}, r"facts\.count=1000, but there are 4 kinds"),
    ({"kinds": ["city", "moon"]}, r"are not all of locker, city, color, fruit"),
    ({"facts": 30}, "more than half of the row, 256"),
    ({"prose": [1] * 100}, "the text has 100 tokens, a row with facts in it needs 512"),
  ],
)
def test_bad_requests(options, message):
  given = {"name": "evaluation", "encode": encode, "rows": 1, "facts": 3, "half": 256, "seed": 0}
  with pytest.raises(ttt_jax.UserError, match=message):
    make_rows(**given | options)


def test_scores_are_of_the_second_half_with_attention_cut():
  """A plain model knows nothing of the first half: its scores do not depend on it."""
  rows = make_rows("evaluation", encode, rows=3, facts=2, half=128, seed=0)
  plain = random_model(MODEL, None, None)
  changed = [
    dataclasses.replace(row, tokens=(*reversed(row.tokens[: row.cut]), *row.tokens[row.cut :]))
    for row in rows
  ]
  scores = score_facts(plain, rows, batch=2)
  assert scores["tokens"] == sum(len(row.answers) for row in rows)
  assert score_facts(plain, changed, batch=2)["nats"] == pytest.approx(scores["nats"], rel=1e-5)
  model = random_model(MODEL, None, TTT)
  assert score_facts(model, changed)["nats"] != pytest.approx(score_facts(model, rows)["nats"])
  row = rows[0]
  ids = np.ones((1, 256), np.int32)
  cut = ids.copy()
  cut[:, 128:] = 2
  logits = np.asarray(model(np.asarray([row.tokens], np.int32), ids, cut))[0]
  right = [int(logits[i - 1].argmax()) == row.tokens[i] for i in row.answers]
  assert score_facts(model, rows[:1])["answers"] == pytest.approx(np.mean(right))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A plain byte model in a Hugging Face directory."""
  path = tmp_path_factory.mktemp("saved") / "plain"
  ttt_jax.save_pretrained(random_model(MODEL, None, None), path, tokenizer=byte_tokenizer())
  return path


SMALL = CalibrationConfig(
  chunk_size=32, tokens=256, rows=1, facts=2, loss_tokens=128, loss_rows=1, max_loss_rise=10.0
)


def test_calibrate_writes_what_it_chose(saved, tmp_path, capsys):
  out = tmp_path / "memory"
  with pytest.warns(UserWarning, match="least_squares|the memory answers"):
    report = calibrate(saved, SMALL, out=out)
  printed = capsys.readouterr().out
  assert printed.count("*") == 2  # in the title, and at one row
  chosen = report["chosen"]
  assert json.loads((out / "calibration.json").read_text())["chosen"] == chosen
  assert {result["layer"] for result in report["tried"]} == {0, 1, 2}
  compared = report["tried"][-report["compared"] :]
  assert {r["layer"] for r in compared} == {0, 1, 2}  # each layer with every scale and gate
  assert len({(r["read_scale"], str(r["gate"])) for r in compared if r["layer"] == 0}) == 16
  assert all("loss" in result for result in compared)
  assert (out / "calibration.png").stat().st_size > 10_000
  model = ttt_jax.load_pretrained(out)
  setting = Setting(*(chosen[field.name] for field in dataclasses.fields(Setting)))
  assert model.ttt == setting.config(32)
  # The model scores what the search saw of it.
  rows = make_rows("calibration", encode, rows=1, facts=2, half=128, seed=0)
  assert score_facts(model, rows)["nats"] == pytest.approx(chosen["facts"]["nats"], rel=1e-3)


def test_a_directory_that_exists_is_refused_before_the_search(saved, tmp_path, monkeypatch):
  (tmp_path / "kept").write_text("mine")
  monkeypatch.setattr("ttt_jax.extras.calibrate.open_tokenizer", None)  # nothing is opened
  with pytest.raises(ttt_jax.UserError, match="exists already"):
    calibrate(saved, SMALL, out=tmp_path)


def test_a_memory_that_costs_too_much_is_refused(saved, tmp_path):
  config = dataclasses.replace(SMALL, max_loss_rise=-1.0)
  with pytest.raises(ttt_jax.UserError, match="no setting keeps the ordinary loss within -1"):
    calibrate(saved, config, out=tmp_path / "memory")
  assert not (tmp_path / "memory").exists()


def test_commands(saved, tmp_path, capsys):
  words = ["--ttt.layers", "[1]", "--ttt.rule", "least_squares", "--ttt.chunk_size", "32"]
  words += ["--ttt.init", "next_token", "--tokens", "256", "--facts", "2", "--rows", "1"]
  assert main(["eval", "facts", str(saved), *words, "--out", str(tmp_path / "out")]) == 0
  printed = capsys.readouterr().out
  assert "updates off" in printed
  results = json.loads((tmp_path / "out" / "facts.json").read_text())["results"]
  assert results["updates on"]["alone"]["nats"] != results["updates off"]["alone"]["nats"]
  assert main(["eval", "facts", str(saved), *words, "--tokens", "300"]) == 2
  assert "half of it is not whole chunks" in capsys.readouterr().err
  assert main(["calibrate", str(saved), "--chunk-size", "48"]) == 2
  assert "tokens=512: half of it is not whole chunks" in capsys.readouterr().err
