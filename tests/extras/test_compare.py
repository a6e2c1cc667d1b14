"""Two models on the same samples: paired statistics, what may be compared, and `ttt-jax eval compare`."""

import json
import re

import jax
import numpy as np
import pytest
from helpers import random_model
from rich.console import Console

import ttt_jax
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import ModelConfig
from ttt_jax.evaluation.paired import bootstrap, paired
from ttt_jax.evaluation.result_file import CELLS, ResultFile
from ttt_jax.extras.compare import compare
from ttt_jax.extras.facts.evaluate import read_answers, score_facts
from ttt_jax.extras.facts.make import make_rows

MODEL = ModelConfig(num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=2)
# Samples differ far more from each other than the models do on one sample.
A = np.array([10.0, 60.0, 30.0, 50.0, 20.0, 40.0])
B = A + np.array([1, 1, 1, -1, 1, 1])


def test_paired_by_hand():
  """A resample has k of the -1, k by Binomial(6, 1/6): P(k > 3) = 0.009, P(k > 2) = 0.062, P(0) = 0.33."""
  result = paired([A], [B])
  assert (result["higher"], result["lower"], result["equal"], result["samples"]) == (5, 1, 0, 6)
  assert result["p"] == pytest.approx(2 * (1 + 6) / 2**6)
  assert result["difference"] == pytest.approx(4 / 6)
  assert (result["low"], result["high"]) == (pytest.approx(1 - 2 * 3 / 6), pytest.approx(1.0))
  assert (result["a"], result["b"]) == (pytest.approx(35.0), pytest.approx(35 + 4 / 6))
  other = paired([A], [B[::-1]])  # the same means of the models, other pairs
  assert other["difference"] == pytest.approx(4 / 6)
  assert other["high"] - other["low"] > 10
  assert other["p"] != result["p"]


def test_equal_samples_say_nothing_of_the_sign():
  result = paired([np.array([1.0, 2.0, 3.0, 4.0])], [np.array([1.0, 3.0, 3.0, 5.0])])
  assert (result["higher"], result["lower"], result["equal"]) == (2, 0, 2)
  assert result["p"] == pytest.approx(2 / 2**2)
  assert paired([A], [A])["p"] == 1.0
  assert paired([A[:1]], [B[:1]])["low"] is None


def test_groups_are_resampled_each_by_itself():
  """Samples of a task never take the place of another task's."""
  assert bootstrap(np.zeros(9), np.full(3, 10.0), seed=0) == (5.0, 5.0)
  low, high = bootstrap(np.array([0.0, 1.0] * 8), np.full(4, 10.0), seed=0)
  assert (low, high) == (pytest.approx(5 + 2 / 16), pytest.approx(5 + 6 / 16))
  result = paired([np.zeros(2), np.zeros(4)], [np.ones(2), np.full(4, 3.0)])
  assert (result["difference"], result["samples"]) == (2.0, 6)  # tasks count the same
  assert (result["low"], result["high"]) == (2.0, 2.0)


PERPLEXITY = {"evaluation": "perplexity", "documents": "d1", "block": 8, "buckets": 4}
RULER = {"evaluation": "ruler", "seed": 0, "samples": 3, "strict": False, "haystack": "noise"}
FACTS = {"evaluation": "facts", "samples": "s1", "tokens": 512, "facts": 2, "rows": 2, "seed": 1}


def save(path, settings, found, model="m"):
  file = ResultFile(path / CELLS, {"model": model, **settings})
  for key, result in found.items():
    file.add(key, result)
  return path


def documents(losses, *, mode="updating", context=64):
  return {(mode, context, i): {"block": loss} for i, loss in enumerate(losses)}


def cell(scores, samples="x"):
  return {"score": float(np.mean(scores)), "scores": scores, "samples": samples, "seconds": 1.0}


def test_perplexity_of_a_model_with_and_one_without_fast_weights(tmp_path, capsys):
  """In the order of the documents, not of the file; less loss is better."""
  a = save(tmp_path / "plain", PERPLEXITY, documents(A, mode="plain"), "ma")
  found = documents(B) | documents(A, mode="frozen") | documents(A, context=32)
  found = dict(sorted(found.items(), key=lambda item: item[0][::-1], reverse=True))
  b = save(tmp_path / "fast", PERPLEXITY, found, "mb")
  report = compare(a, b, out=tmp_path / "out", console=Console(width=300))
  assert report == json.loads((tmp_path / "out" / "compare.json").read_text())
  assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
  rows = {row["mode_b"]: row for row in report["rows"]}
  assert set(rows) == {"updating", "frozen"}
  row = rows["updating"]
  assert row["name"] == "64 tokens before, plain / updating"
  assert (row["better"], row["worse"]) == (1, 5)
  assert row["p"] == pytest.approx(14 / 64)
  assert (row["low"], row["high"]) == (pytest.approx(0.0), pytest.approx(1.0))
  assert rows["frozen"]["equal"] == 6
  assert report["settings"] == {"documents": "d1", "block": 8, "buckets": 4}
  assert (report["a"]["model"], report["b"]["model"]) == ("ma", "mb")
  printed = " ".join(capsys.readouterr().out.split())
  assert f"since only {b} has it: 32 tokens before updating" in printed
  assert "1 / 5 of 6" in printed
  back = compare(b, a, out=tmp_path / "back")["rows"]
  (row,) = (row for row in back if row["mode_a"] == "updating")
  assert (row["better"], row["worse"], row["difference"]) == (5, 1, pytest.approx(-4 / 6))
  assert (row["low"], row["high"]) == (pytest.approx(-1.0), pytest.approx(0.0))


def test_modes_of_two_models_with_fast_weights_are_not_mixed(tmp_path):
  found = documents(A) | documents(B, mode="frozen")
  a, b = (save(tmp_path / name, PERPLEXITY, found) for name in "ab")
  modes = [(row["mode_a"], row["mode_b"]) for row in compare(a, b, out=tmp_path)["rows"]]
  assert modes == [("updating", "updating"), ("frozen", "frozen")]


def test_ruler_has_averages_over_the_tasks_of_both(tmp_path):
  one, two, three = ((task, 900, None) for task in ("niah_single_1", "ruler_vt", "ruler_fwe"))
  later = ("niah_single_1", 800, None)
  found = {one: cell([0.0, 1.0, 0.0]), two: cell([0.2, 0.2, 0.2]), later: cell([0.0, 0.0, 0.0])}
  a = save(tmp_path / "a", RULER, found)
  found = {one: cell([1.0, 1.0, 1.0]), two: cell([0.2, 0.6, 0.0]), three: cell([1.0] * 3)}
  b = save(tmp_path / "b", RULER, found | {later: cell([0.0, 0.0, 1.0])})
  rows = {row["name"]: row for row in compare(a, b, out=tmp_path)["rows"]}
  assert list(rows) == [
    "niah_single_1 800",
    "niah_single_1 900",
    "ruler_vt 900",
    "average 900",
  ]
  row = rows["average 900"]
  assert row["difference"] == pytest.approx((2 / 3 + 0.2 / 3) / 2)
  assert (row["samples"], row["better"], row["worse"], row["equal"]) == (6, 3, 1, 2)
  assert row["p"] == pytest.approx(2 * (1 + 4) / 2**4)
  row = rows["ruler_vt 900"]  # a resample has its lowest difference three times with P = 1/27
  assert (row["low"], row["high"]) == (pytest.approx(-0.2), pytest.approx(0.4))


def test_a_row_of_facts_is_one_sample(tmp_path):
  """Facts of a row count the same, however many tokens their answers have."""

  def fact(*right):
    return {"kind": "city", "right": list(right), "nats": [float(x) for x in right]}

  a = {("model", "alone"): [[fact(0, 0), fact(1)], [fact(0), fact(0, 1)], [fact(1), fact(1)]]}
  b = {("updates on", "alone"): [[fact(1, 1), fact(1)], [fact(1), fact(1, 1)], [fact(1), fact(0)]]}
  a, b = save(tmp_path / "a", FACTS, a), save(tmp_path / "b", FACTS, b)
  right, nats = compare(a, b, out=tmp_path)["rows"]
  assert (right["measure"], nats["measure"]) == ("right", "nats")
  assert (right["a"], right["b"]) == (pytest.approx(1.75 / 3), pytest.approx(2.5 / 3))
  assert (right["samples"], right["better"], right["worse"]) == (3, 2, 1)
  assert (right["low"], right["high"]) == (pytest.approx(-0.5), pytest.approx(0.75))
  assert (nats["better"], nats["worse"]) == (1, 2)


def test_what_cannot_be_compared(tmp_path):
  def check(message, a, b):
    with pytest.raises(ttt_jax.UserError, match=message):
      compare(a, b, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

  a = save(tmp_path / "a", PERPLEXITY, documents(A), "ma")
  other = save(tmp_path / "b", {**PERPLEXITY, "block": 16}, documents(B), "mb")
  check(r"they differ in block \(8 and 16\): evaluate both with the same options", a, other)
  facts = save(tmp_path / "facts", FACTS, {("model", "alone"): []})
  check(r"differ in .*evaluation \('perplexity' and 'facts'\)", a, facts)
  stopped = save(tmp_path / "stopped", PERPLEXITY, documents(B[:4]))
  check("64 tokens before: of 6 samples of .* and 4 of .*, 4 are the same. Repeat", a, stopped)
  check("has no cells.jsonl: give the directory that eval perplexity", a, tmp_path / "none")
  check("has no results of", a, save(tmp_path / "empty", PERPLEXITY, {}))
  recall = save(tmp_path / "recall", {"evaluation": "recall"}, {("x",): 1})
  check("has no results of perplexity, ruler, facts", a, recall)
  shorter = save(tmp_path / "shorter", PERPLEXITY, documents(B, context=32))
  check("no result is in both: .* has 64 tokens before updating; .* 32 tokens", a, shorter)
  key = ("niah_single_1", 900, None)
  ruler = save(tmp_path / "ruler", RULER, {key: cell([1.0, 0.0, 0.0])})
  tokenizer = save(tmp_path / "tokenizer", RULER, {key: cell([1.0, 0.0, 0.0], "y")})
  check("niah_single_1 900: of 3 samples of .* and 3 of .*, 0 are the same", ruler, tokenizer)
  old = save(tmp_path / "old", RULER, {key: {"score": 1.0, "seconds": 1.0}})
  check("old: the results of niah_single_1 at 900 tokens are of version 0.1.0", ruler, old)
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / CELLS).write_text("nothing\n")
  check("is no file of results", a, tmp_path / "bad")


def encode(text):
  return list(text.encode())


def test_answers_belong_to_their_facts():
  """The scores are means over the tokens of the answers, whose facts they belong to."""
  rows = make_rows("evaluation", encode, rows=3, facts=3, half=200, seed=0)
  model = random_model(MODEL, None, None)
  answers = read_answers(model, rows, batch=2)
  for row, facts in zip(rows, answers, strict=True):
    asked = bytes(row.tokens[i] for i in row.answers).decode().split()
    assert [len(fact["nats"]) for fact in facts] == [len(f" {answer}") for answer in asked]
    assert [fact["kind"] for fact in facts for _ in fact["right"]] == list(row.kinds)
  row, ids = rows[0], np.ones((1, 400), np.int32)
  logits = model(np.asarray([row.tokens], np.int32), ids, np.repeat([[1, 2]], 200, axis=1))[0]
  expected = [-jax.nn.log_softmax(logits[i - 1])[row.tokens[i]] for i in row.answers]
  found = [nats for fact in answers[0] for nats in fact["nats"]]
  assert found == pytest.approx(np.asarray(expected), rel=1e-4)
  facts = [fact for of_row in answers for fact in of_row]
  scores = score_facts(model, rows, batch=3)
  nats = np.concatenate([fact["nats"] for fact in facts])
  assert scores["tokens"] == len(nats)
  assert scores["nats"] == pytest.approx(nats.mean(), rel=1e-5)
  assert scores["firsts"] == pytest.approx(np.mean([fact["right"][0] for fact in facts]))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
  """Two plain byte models, one with another tokenizer, and documents."""
  here = tmp_path_factory.mktemp("models")
  for seed, name in enumerate(("one", "two", "other")):
    ttt_jax.save_pretrained(
      random_model(MODEL, None, None, seed=seed), here / name, tokenizer=byte_tokenizer()
    )
  file = here / "other" / "tokenizer.json"
  vocabulary = json.loads(file.read_text())
  ids = vocabulary["model"]["vocab"]
  ids["a"], ids["b"] = ids["b"], ids["a"]
  file.write_text(json.dumps(vocabulary))
  (here / "texts").mkdir()
  for i in range(4):
    (here / "texts" / f"{i}.txt").write_text(f"{i} is a number, and so is {i + 1}. " * 20)
  return here


@pytest.fixture
def there(here, monkeypatch):
  monkeypatch.chdir(here)
  return here


def test_command_evaluates_models(there, capsys):
  words = ["eval", "compare", "one", "two"]
  assert main([*words, "--of", "facts --tokens 256 --facts 2 --rows 3"]) == 0
  out = there / "runs" / "compare_one_two"
  said = capsys.readouterr().out
  assert "right tokens, %: more is better" in said
  assert "nats per token: less is better" in said
  report = json.loads((out / "compare.json").read_text())
  assert (report["a"]["name"], report["b"]["name"]) == ("one", "two")
  # By hand from the models, in the order of A and B.
  rows = make_rows("evaluation", encode, rows=3, facts=2, half=128, seed=1)
  nats = [
    [np.mean([np.mean(fact["nats"]) for fact in row]) for row in read_answers(model, rows)]
    for model in map(ttt_jax.load_pretrained, ("one", "two"))
  ]
  (found,) = (
    row for row in report["rows"] if row["measure"] == "nats" and row["where"] == ["alone"]
  )
  assert (found["a"], found["b"]) == (
    pytest.approx(np.mean(nats[0]), rel=1e-4),
    pytest.approx(np.mean(nats[1]), rel=1e-4),
  )
  assert found["better"] == np.sum(np.array(nats[1]) < nats[0])
  # The directories of the two evaluations compare as the models do; nothing is read again.
  before = {path: path.stat().st_mtime_ns for path in out.glob("?/cells.jsonl")}
  assert len(before) == 2
  assert main(["eval", "compare", str(out / "a"), str(out / "b"), "--out", "again"]) == 0
  again = json.loads((there / "again" / "compare.json").read_text())
  assert again["rows"] == report["rows"]
  assert {path: path.stat().st_mtime_ns for path in before} == before
  # A directory and a model.
  of = "facts --tokens 256 --facts 2 --rows 3"
  assert main(["eval", "compare", str(out / "a"), "two", "--of", of, "--out", str(out)]) == 0
  assert json.loads((out / "compare.json").read_text())["rows"] == report["rows"]


def test_command_evaluates_perplexity(there):
  of = (
    "perplexity --lengths 64 --block 32 --documents 2 --data.path texts --data.heldout_fraction 0.6"
  )
  assert main(["eval", "compare", "one", "two", "--of", of, "--out", "perplexity"]) == 0
  (row,) = json.loads((there / "perplexity" / "compare.json").read_text())["rows"]
  losses = [
    json.loads((there / "perplexity" / side / "perplexity.json").read_text())["by_context"][0]
    for side in "ab"
  ]
  assert (row["a"], row["b"]) == (
    pytest.approx(losses[0]["loss"]),
    pytest.approx(losses[1]["loss"]),
  )
  assert row["samples"] == 2


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["one", "two"], "one is no directory of results: .*--of facts, --of ruler"),
    (["one", "two", "--of", "recall"], "--of is 'recall'"),
    (["one", "two", "--of", "facts --out x"], "give --out to eval compare itself"),
    (["one", "two", "--of", "facts '"], "No closing quotation"),
    (["one", "two", "--of", "facts --rowss 3"], "did you mean --rows"),
    (["one", "other", "--of", "facts"], "different tokenizers"),
    (["one", "other", "--of", "perplexity --data.path texts"], "different tokenizers"),
  ],
)
def test_a_mistake_is_one_line(there, capsys, words, message):
  assert main(["eval", "compare", *words, "--out", "mistake"]) == 2
  (error,) = capsys.readouterr().err.splitlines()
  assert error.startswith("ttt-jax eval compare: ")
  assert re.search(message, error)
  assert not (there / "mistake").exists()


def test_results_need_no_evaluation(tmp_path, capsys):
  a, b = (save(tmp_path / name, PERPLEXITY, documents(A)) for name in "ab")
  assert main(["eval", "compare", str(a), str(b), "--of", "facts"]) == 2
  assert "are results: leave --of out" in capsys.readouterr().err


def test_facts_of_other_settings_are_left_alone(there, capsys):
  words = ["eval", "facts", "one", "--tokens", "256", "--facts", "2", "--out", "facts"]
  assert main([*words, "--rows", "1", "--batch", "1"]) == 0
  first = json.loads((there / "facts" / "facts.json").read_text())
  assert main([*words, "--rows", "1"]) == 0  # a batch does not change answers
  again = json.loads((there / "facts" / "facts.json").read_text())
  assert again["results"] == first["results"]
  assert main([*words, "--rows", "2"]) == 2
  assert "of other settings: rows was 1, is 2" in capsys.readouterr().err
