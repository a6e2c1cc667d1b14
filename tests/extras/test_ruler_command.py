"""Tests `ttt-jax eval ruler` as a user meets it: scores, resumption, strict recall."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from extras.rulers import squad, write
from helpers import MODEL, TTT, random_model

import ttt_jax
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.cli import main
from ttt_jax.config import AttentionConfig
from ttt_jax.extras.ruler import TASKS, Ruler, evaluate
from ttt_jax.extras.ruler.evaluate import RulerConfig, evaluate_ruler
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate

FAST = dataclasses.replace(
  TTT,
  layers=(0,),
  chunk_size=32,
  decay=None,
  inner_lr=30.0,
  inner_lr_scale="1/F",
  target="hidden_states",
)
LENGTH = 800
SMALL_MODEL = dataclasses.replace(MODEL, vocab_size=256, num_layers=1)
WINDOW = AttentionConfig(window=24)
SMALL = {
  "tasks": ("niah_single_1", "ruler_fwe"),
  "lengths": (LENGTH,),
  "samples": 3,
  "batch_size": 2,
}


@pytest.fixture(scope="module")
def model():
  return Reader.of(random_model(SMALL_MODEL, WINDOW, FAST, seed=1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "model"
  with pytest.warns(UserWarning, match="published"):
    ttt_jax.save_pretrained(random_model(SMALL_MODEL, WINDOW, FAST, seed=1), path)
  byte_tokenizer().save(path)
  return path


@pytest.fixture
def oracle(monkeypatch):
  """Answers frequent words fully and all other tasks by half, and counts the calls."""
  calls = []

  def answer(reader, tokenizer, samples, task, *, strict):
    calls.append([(sample.task, sample.length) for sample in samples])
    if len(calls) == oracle.stop:
      raise KeyboardInterrupt
    right = "ruler_fwe" in samples[0].task
    return [" ".join(s.answers[: None if right else len(s.answers) // 2]) for s in samples]

  monkeypatch.setattr(evaluate, "_answer", answer)
  oracle.calls, oracle.stop = calls, None
  return oracle


def scores(report):
  return {(cell["task"], cell["length"]): cell["score"] for cell in report["cells"]}


def test_answers_are_the_models_own(checkpoint, model, tmp_path, capsys):
  words = ["--tasks", "ruler_fwe", "--lengths", LENGTH, "--samples", 2, "--batch-size", 2]
  words = ["eval", "ruler", checkpoint, *words, "--out", tmp_path / "out"]
  assert main([str(word) for word in words]) == 0
  out = capsys.readouterr().out
  assert f"ruler_fwe at {LENGTH} tokens: " in out
  assert "average" in out
  report = json.loads((tmp_path / "out" / "ruler.json").read_text())
  assert report["settings"]["model"] == model.fingerprint()
  assert [cell["task"] for cell in report["cells"]] == ["ruler_fwe"]
  assert (tmp_path / "out" / "ruler.png").stat().st_size > 1000
  answers = json.loads((tmp_path / "out" / "answers" / f"ruler_fwe_{LENGTH}.json").read_text())
  samples = list(Ruler(byte_tokenizer()).samples("ruler_fwe", LENGTH, 2))
  prompts = [list(sample.prompt.encode()) for sample in samples]
  made = generate(model, prompts, max_new_tokens=50).new_tokens
  assert [x["answer"] for x in answers] == [byte_tokenizer().decode(new.tolist()) for new in made]
  assert [x["expected"] for x in answers] == [[*sample.answers] for sample in samples]
  words[words.index("ruler_fwe")], words[words.index(LENGTH)] = "niah_single_1", LENGTH + 10
  assert main([str(word) for word in words]) == 0  # with no task that both lengths have
  assert not any(map(str.isdigit, capsys.readouterr().out.split("average")[1].split("written")[0]))


def test_scores_and_averages(model, oracle, tmp_path):
  config = RulerConfig(
    ("niah_multivalue", "ruler_fwe"), lengths=(900, 850), samples=3, batch_size=2
  )
  report = evaluate_ruler(model, byte_tokenizer(), config, tmp_path)
  assert scores(report) == {
    ("niah_multivalue", 850): 0.5,
    ("ruler_fwe", 850): 1.0,
    ("niah_multivalue", 900): 0.5,
    ("ruler_fwe", 900): 1.0,
  }
  assert report["averages"] == {"850": 0.75, "900": 0.75}
  assert report == json.loads((tmp_path / "ruler.json").read_text())
  assert [len(call) for call in oracle.calls] == [2, 1] * 4


def test_intervals_over_the_samples(checkpoint, tmp_path, monkeypatch, capsys):
  """A task with 4 right answers of 8, and one with 8, whose interval then has no width.

  The right ones of a resample are Binomial(8, 1/2): P(< 2) = 0.035, P(0) = 0.004.
  """
  wrong = {"niah_single_1": (0, 2, 3, 6), "niah_multivalue": ()}
  counts = dict.fromkeys(wrong, 0)

  def answer(reader, tokenizer, samples, task, *, strict):
    texts = []
    for sample in samples:
      right = counts[sample.task] not in wrong[sample.task]
      texts.append(" ".join(sample.answers) if right else "")
      counts[sample.task] += 1
    return texts

  monkeypatch.setattr(evaluate, "_answer", answer)
  words = ["--tasks", *wrong, "--lengths", 900, "--samples", 8, "--out", tmp_path / "out"]
  assert main([str(word) for word in ("eval", "ruler", checkpoint, *words)]) == 0
  lines = capsys.readouterr().out.splitlines()
  for name, texts in (
    ("niah_single_1", ("50.0", "12.5 to 87.5")),
    ("niah_multivalue", ("100.0", "100.0 to 100.0")),
    ("average", ("75.0", "56.2 to 93.8")),  # the tasks count the same, each resampled by itself
  ):
    (line,) = (line for line in lines if f" {name} " in line and "█" not in line and "│" in line)
    assert all(text in line for text in texts), line
  report = json.loads((tmp_path / "out" / "ruler.json").read_text())
  assert [(cell["low"], cell["high"]) for cell in report["cells"]] == [(0.125, 0.875), (1.0, 1.0)]
  assert report["average_intervals"] == {"900": [0.5625, 0.9375]}
  cells = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
  assert [cell["result"]["scores"].count(1.0) for cell in cells[1:]] == [4, 8]
  # Results of version 0.1.0 have no scores of samples, and no intervals.
  for cell in cells[1:]:
    del cell["result"]["scores"], cell["result"]["samples"]
  (tmp_path / "out" / "cells.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in cells))
  assert main([str(word) for word in ("eval", "ruler", checkpoint, *words)]) == 0
  old = json.loads((tmp_path / "out" / "ruler.json").read_text())
  assert [cell["low"] for cell in old["cells"]] == [None, None]
  assert (old["averages"], old["average_intervals"]) == (report["averages"], {"900": [None, None]})


def test_other_tokenizers_have_other_samples(model, oracle, tmp_path):
  """The digest by which `eval compare` tells that two models read the same."""
  config = RulerConfig(("ruler_fwe",), (LENGTH,), samples=2)

  def digest(name, **changes):
    made = dataclasses.replace(config, **changes)
    evaluate_ruler(model, byte_tokenizer(), made, tmp_path / name)
    _, cell = map(json.loads, (tmp_path / name / "cells.jsonl").read_text().splitlines())
    return cell["result"]["samples"]

  assert digest("one") == digest("batches", batch_size=1) != digest("seed", seed=1)


def test_goes_on_where_it_was_stopped(model, oracle, tmp_path):
  config = RulerConfig(**SMALL)
  oracle.stop = 4  # in the second of two batches of the second task
  with pytest.raises(KeyboardInterrupt):
    evaluate_ruler(model, byte_tokenizer(), config, tmp_path)
  _, before = (tmp_path / "cells.jsonl").read_text().splitlines()
  before = json.loads(before)
  assert before["key"] == ["niah_single_1", LENGTH, None]
  with (tmp_path / "cells.jsonl").open("a") as file:
    file.write('{"key": ["ruler_fwe", 800, null], "result": {"sco')  # torn, as of a killed process
  oracle.stop = None
  oracle.calls.clear()
  report = evaluate_ruler(model, byte_tokenizer(), config, tmp_path)
  assert oracle.calls == [[("ruler_fwe", LENGTH)] * 2, [("ruler_fwe", LENGTH)]]
  first = {"task": "niah_single_1", "length": LENGTH, "questions": None, "low": 0.0, "high": 0.0}
  kept = {name: before["result"][name] for name in ("score", "seconds")}
  assert report["cells"][0] == {**first, **kept}
  assert scores(report) == scores(
    evaluate_ruler(model, byte_tokenizer(), config, tmp_path / "whole")
  )
  # Nothing is left to do; another length or task is added to what is there.
  oracle.calls.clear()
  assert evaluate_ruler(model, byte_tokenizer(), config, tmp_path) == report
  assert oracle.calls == []
  more = dataclasses.replace(config, lengths=(850,), tasks=("ruler_fwe",))
  added = evaluate_ruler(model, byte_tokenizer(), more, tmp_path)
  assert set(scores(added)) == {*scores(report), ("ruler_fwe", 850)}
  assert added["averages"] == {**report["averages"], "850": None}  # one task of the two
  assert {call for calls in oracle.calls for call in calls} == {("ruler_fwe", 850)}


def test_results_of_other_settings_are_left_alone(model, oracle, tmp_path):
  story = tmp_path / "story.txt"
  story.write_text("The river rose. " * 30)
  config = RulerConfig(**SMALL)
  evaluate_ruler(model, byte_tokenizer(), config, tmp_path / "out")
  files = ("ruler.json", "cells.jsonl")
  before = [(tmp_path / "out" / name).read_bytes() for name in files]
  for name, value in (("seed", 1), ("samples", 4), ("haystack", story), ("strict", True)):
    with pytest.raises(ValueError, match=f"of other settings: {name} was .*Give another --out"):
      evaluate_ruler(
        model, byte_tokenizer(), dataclasses.replace(config, **{name: value}), tmp_path / "out"
      )
  other = Reader.of(random_model(SMALL_MODEL, WINDOW, FAST, seed=2))
  with pytest.raises(ValueError, match="of other settings: model was"):
    evaluate_ruler(other, byte_tokenizer(), config, tmp_path / "out")
  assert [(tmp_path / "out" / name).read_bytes() for name in files] == before
  # Questions may be added later, but not other ones.
  one, other = write(tmp_path / "one.json", squad()), write(tmp_path / "two.json", squad(7))
  asked = dataclasses.replace(config, tasks=("ruler_qa_squad",), lengths=(1200,), squad=one)
  both = evaluate_ruler(model, byte_tokenizer(), asked, tmp_path / "out")
  assert len({cell["questions"] for cell in both["cells"]}) == 2
  assert evaluate_ruler(model, byte_tokenizer(), config, tmp_path / "out") == both
  with pytest.raises(ValueError, match=r"results of ruler_qa_squad with the questions \w+, these"):
    evaluate_ruler(
      model, byte_tokenizer(), dataclasses.replace(asked, squad=other), tmp_path / "out"
    )
  (tmp_path / "out" / "cells.jsonl").write_text("{}\n")
  with pytest.raises(ValueError, match="is no file of results: give another directory"):
    evaluate_ruler(model, byte_tokenizer(), config, tmp_path / "out")


def test_only_the_fast_weights_carry_the_document(model, tmp_path):
  config = RulerConfig(("ruler_fwe",), (LENGTH,), samples=2, batch_size=2, strict=True)
  evaluate_ruler(model, byte_tokenizer(), config, tmp_path)
  answers = json.loads((tmp_path / "answers" / f"ruler_fwe_{LENGTH}.json").read_text())
  samples = list(Ruler(byte_tokenizer()).samples("ruler_fwe", LENGTH, 2))
  documents = [list(sample.context.encode()) for sample in samples]
  documents = [row + [ord("\n")] * (-len(row) % FAST.chunk_size) for row in documents]
  state = generate(model, documents, max_new_tokens=0).state.fast_weights_only()
  questions = [list(sample.question.encode()) for sample in samples]
  made = generate(model, questions, max_new_tokens=50, state=state).new_tokens
  first, second = (byte_tokenizer().decode(new.tolist()) for new in made)
  assert [answer["answer"] for answer in answers] == [first, second]
  assert first != second  # the question is one and the same: the document matters


def test_an_answer_ends_where_the_texts_of_the_tokenizer_do(model):
  (sample,) = Ruler(byte_tokenizer()).samples("ruler_fwe", LENGTH, 1)
  (made,) = generate(model, [list(sample.prompt.encode())], max_new_tokens=50).new_tokens
  tokenizer = byte_tokenizer()
  tokenizer.eos_ids = (int(made[9]),)
  (answer,) = evaluate._answer(model, tokenizer, [sample], TASKS["ruler_fwe"], strict=False)
  end = made.tolist().index(made[9]) + 1
  assert end < 50
  assert answer == byte_tokenizer().decode(made[:end].tolist())


def test_the_last_words_of_a_document_are_learned(model):
  learned = evaluate._learn(model, byte_tokenizer(), ["abcdefghi", "abcdefghj", "abcdefghi\n\n\n"])
  assert np.all(np.asarray(learned.cache.lengths) == 0)
  assert all(x.shape[1] == 0 for layer in learned.cache.layers for x in layer.attention)
  fast = [np.asarray(x) for layer in learned.cache.layers for x in jax.tree.leaves(layer.fast)]
  changed = [not np.array_equal(x[0], x[1]) for x in fast]
  assert any(changed)
  assert all(np.array_equal(x[0], x[2]) for x in fast)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--tasks", "niah"], "there is no RULER task 'niah'; there are niah_single_1, "),
    (["--tasks", "ruler_qa_squad"], "--squad FILE"),
    (["--lengths", "300"], "niah_single_1 does not fit a length of 300 tokens"),
    (["--tasks", "ruler_fwe", "--lengths", "900", "--samples", "0"], "samples=0"),
    (["--haystack", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--tasks", "ruler_fwe", "--strict", "--ttt.layers", "[]"], "has no fast weights"),
  ],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, capsys, words, message):
  assert main(["eval", "ruler", str(checkpoint), *words, "--out", str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert error.splitlines()[-1].startswith("ttt-jax eval ruler: ")
  assert message in error
  assert "Traceback" not in error
  assert not (tmp_path / "out").exists()


def test_a_stopped_command_says_how_to_go_on(checkpoint, oracle, tmp_path, capsys):
  oracle.stop = 1
  words = ["--tasks", "ruler_fwe", "--lengths", LENGTH, "--samples", 3, "--out", tmp_path / "out"]
  assert main([str(word) for word in ("eval", "ruler", checkpoint, *words)]) == 130
  assert "the same command goes on" in capsys.readouterr().out


def test_samples_as_files(tmp_path, capsys):
  words = ["data", "ruler", str(tmp_path / "out"), "--lengths", "1000", "900", "--samples", "3"]
  words += ["--tasks", "niah_multiquery", "ruler_qa_squad", "--squad"]
  words += [str(write(tmp_path / "questions.json", squad())), "--seed", "5"]
  assert main(words) == 0
  assert "niah_multiquery" in capsys.readouterr().out
  ruler = Ruler(byte_tokenizer(), seed=5, squad=tmp_path / "questions.json")
  for task, new_tokens in (("niah_multiquery", 128), ("ruler_qa_squad", 32)):
    for length in (900, 1000):
      lines = (tmp_path / "out" / f"{task}_{length}.jsonl").read_text().splitlines()
      for index, (line, sample) in enumerate(
        zip(map(json.loads, lines), ruler.samples(task, length, 3))
      ):
        assert line.pop("answers") == [*sample.answers]
        expected = dataclasses.asdict(sample) | {"index": index, "new_tokens": new_tokens}
        del expected["answers"]
        assert line == expected
  report = json.loads((tmp_path / "out" / "ruler_generation.json").read_text())
  assert report["tokenizer"] == "bytes"
  made = [(row["task"], row["length"], row["samples"]) for row in report["made"]]
  assert made == [(t, n, 3) for n in (900, 1000) for t in ("niah_multiquery", "ruler_qa_squad")]
  assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in report["made"])
  assert main(words) == 2
  assert "exists already: nothing is written over it" in capsys.readouterr().err
  words[2] = str(tmp_path / "other")
  assert main([*words, "--samples", "30"]) == 2
  assert "24 questions with answers: ask for no more samples" in capsys.readouterr().err
  assert not [path for path in tmp_path.iterdir() if "other" in path.name]


def test_help(capsys):
  with pytest.raises(SystemExit) as stop:
    main(["eval", "ruler", "--help"])
  assert stop.value.code == 0
  assert "usage: ttt-jax eval ruler" in capsys.readouterr().out
