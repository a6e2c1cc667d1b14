"""Compares RULER with the published texts, and with the harness's code if it is installed.

The harness draws other words, numbers and places: what is drawn is replaced by its kind before texts are
compared, and needles are taken out of what they are hidden in.
"""

import importlib
import random
import re
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from extras.rulers import hotpot, squad, write

from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.extras.ruler import TASKS, Ruler, string_match_all, string_match_part
from ttt_jax.extras.ruler.haystack import NOISE
from ttt_jax.extras.ruler.words import all_words

STORY = " ".join(f"In year {i} the river rose." for i in range(400))

NEEDLES = [task for task in TASKS if task.startswith("niah")]


@pytest.fixture(scope="module")
def ruler(tmp_path_factory):
  path = tmp_path_factory.mktemp("questions")
  files = {"squad": write(path / "s.json", squad()), "hotpot": write(path / "h.json", hotpot(60))}
  return Ruler(byte_tokenizer(), haystack=STORY, **files)


def without_what_is_drawn(text):
  text = re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}", "UUID", text)
  text = re.sub(r"\b\d{7}\b", "NUMBER", text)
  text = re.sub(r"(One of the special magic \w+ for )(.+?)( is: )", r"\1KEY\3", text)
  return re.sub(r"(special magic \w+ for )(?!KEY)(.+?)( mentioned)", r"\1KEYS\3", text)


def test_needles_as_written_in_the_paper(ruler):
  one = without_what_is_drawn(ruler.sample("niah_single_1", 2000, 0).prompt)
  needle = "One of the special magic numbers for KEY is: NUMBER."
  assert one.count(needle) == 1
  lines = one.replace(needle + "\n", "").split("\n")
  assert lines[0] == (
    "A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards."
  )
  assert set(lines[1:-1]) == {
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
  }
  assert lines[-1] == (
    "What is the special magic number for KEYS mentioned in the provided text? "
    "The special magic number for KEYS mentioned in the provided text is"
  )
  four = ruler.sample("niah_multiquery", 2000, 0)
  assert without_what_is_drawn(four.question) == (
    "What are all the special magic numbers for KEYS mentioned in the provided text? "
    "The special magic numbers for KEYS mentioned in the provided text are"
  )
  assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned", four.question)
  assert four.context.startswith("Some special magic numbers are hidden within the following text.")


def test_other_tasks_as_written_in_the_paper(ruler):
  vt = ruler.sample("ruler_vt", 3000, 0)
  value = re.search(r"= (\d+)", vt.context.split("\n\n\n\n")[1])[1]
  assert vt.question == (
    f"Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    f"assgined the value {value}, they are:"
  )
  assert (
    vt.context.count("Memorize and track the chain(s) of variable assignment hidden in the ") == 2
  )
  assert ruler.sample("ruler_cwe", 2000, 0).question == (
    "Question: What are the 10 most common words in the above list?\n\n"
    "Answer: The top 10 words that appear most often in the list are:"
  )
  assert ruler.sample("ruler_fwe", 2000, 0).question == (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
    "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
    "three most frequently appeared words are:"
  )
  qa = ruler.sample("ruler_qa_squad", 1200, 0)
  asked = (
    "Answer the question based on the given documents. Only give me the answer and do not output any "
    "other words.\n\n"
  )
  assert qa.context.startswith(
    f"{asked}The following are given documents.\n\nDocument 1:\nIn house"
  )
  assert qa.question == f"{asked}Question: Who lives in 0/0? Answer:"


@pytest.fixture(scope="module")
def published():
  """Loads the harness's modules without `transformers` and without downloads."""
  pytest.importorskip("lm_eval")
  nltk = pytest.importorskip("nltk")
  with pytest.MonkeyPatch.context() as patch:
    if importlib.util.find_spec("transformers") is None:
      fake = types.ModuleType("transformers")
      fake.AutoTokenizer = None
      patch.setitem(sys.modules, "transformers", fake)
    patch.setattr(nltk.data, "find", lambda name: name)
    names = (
      "common_utils",
      "prepare_niah",
      "niah_utils",
      "vt_utils",
      "cwe_utils",
      "fwe_utils",
      "qa_utils",
    )
    yield {name: importlib.import_module(f"lm_eval.tasks.ruler.{name}") for name in names}


def tokens(text):
  """Returns the bytes of a text in the form of a `transformers` tokenizer."""
  return types.SimpleNamespace(input_ids=text.encode())


def sentences(text):
  return re.split(r"(?<=\.) ", text)


@pytest.mark.parametrize("task", NEEDLES)
def test_needles_of_the_harness(task, ruler, published, monkeypatch):
  module, utils, asked = published["prepare_niah"], published["niah_utils"], {}

  def one_sample(text, *, num_samples, **how):  # as the task asks for, but for 500 of them
    asked.update(how)
    return module.generate_samples(text, num_samples=1, **how)

  def text(type_haystack):
    return STORY.split() if type_haystack == "essay" else module.get_haystack(type_haystack)

  monkeypatch.setattr(module, "cached_sent_tokenize", sentences)
  monkeypatch.setattr(utils, "get_tokenizer", lambda name: tokens)
  monkeypatch.setattr(utils, "get_haystack", text)
  monkeypatch.setattr(utils, "generate_samples", one_sample)
  monkeypatch.setattr(utils, "download_dataset", lambda lengths: next(iter(lengths)))
  random.seed(5)
  (theirs,) = getattr(utils, task)(max_seq_lengths=[6000])
  haystack = asked["type_haystack"]
  ours = ruler.sample(task, 6000, 0)
  assert len(ours.answers) == len(theirs["outputs"])
  texts = [
    without_what_is_drawn(t) for t in (f"{theirs['input']} {theirs['gen_prefix']}", ours.prompt)
  ]
  needle = r" ?One of the special magic \w+ for KEY is: \w+\.\n?"
  if haystack != "needle":
    assert len(re.findall(needle, texts[0])) == len(re.findall(needle, texts[1]))
    texts = [re.sub(needle, " ", text) for text in texts]
  starts = [re.split(r"afterwards\.\n", text)[0] for text in texts]
  ends = [text.split("\n")[-1] for text in texts]
  assert starts[0] == starts[1]
  assert ends[0] == ends[1]
  documents = [text[len(a) :][: -len(b)].split() for text, a, b in zip(texts, starts, ends)]
  shorter = min(map(len, documents)) - 20  # the last sentence may be cut
  assert shorter > 100
  assert documents[0][:shorter] == documents[1][:shorter]
  if haystack != "essay":  # of which lines are
    lines = [{" ".join(line.split()) for line in text.split("\n")[1:-1]} for text in texts]
    assert lines[0] == lines[1]


def test_variables_of_the_harness(ruler, published):
  module = published["vt_utils"]
  random.seed(1)
  np.random.seed(1)  # noqa: NPY002  # theirs

  def short(text):  # theirs never ends where five sentences have more than 500 tokens
    return types.SimpleNamespace(input_ids=text.split())

  example = module.sys_vartrack_w_noise_random(short, 1, 500, incremental=5)[0]
  (theirs,) = module.sys_vartrack_w_noise_random(short, 1, 1000, icl_example=example)
  ours = ruler.sample("ruler_vt", 4000, 0)

  def structure(text):
    text = re.sub(r"\b\d{5}\b", "VALUE", text)
    text = re.sub(r"VAR \w+ = (VAR \w+|VALUE)", lambda m: f"VAR X = {m[1][:5]}", text)
    text = re.sub(r"they are:  .*\n", "they are:  NAMES\n", text)
    # Chain and noise apart: where the chain is, is drawn.
    noise = re.escape(NOISE)
    chain = re.findall(r"VAR X = \w+ ?", text)
    plain = re.sub(r" ?VAR X = \w+ ?", "", text)
    return chain, re.sub(rf"( ?{noise}\n)+", "NOISE", plain)

  theirs = structure(f"{theirs['input']} {theirs['gen_prefix']}")
  ours = structure(ours.prompt)
  assert [line.strip() for line in theirs[0]] == [line.strip() for line in ours[0]]
  one_line = [
    re.sub(r"\s+", " ", re.sub(r"(?s)text\.\n\n.*?Question", "text. Question", t))
    for _, t in (theirs, ours)
  ]
  assert one_line[0] == one_line[1]


def test_common_words_of_the_harness(ruler, published):
  module = published["cwe_utils"]
  assert sorted(module.WORDS) == all_words()
  random.seed(2)
  _, text, answers = module.generate_input_output(30, 2000)
  ours = ruler.sample("ruler_cwe", 2000, 0)

  def counts(text):
    listed = re.findall(r"\d+\. (.*?)(?= \d+\. |\n)", text.split("\n", 1)[1])
    return Counter(Counter(listed).values())

  assert len(answers) == len(ours.answers)
  assert counts(text)[6] == counts(ours.context)[6] == 10
  assert set(counts(text)) == set(counts(ours.context)) == {1, 6}
  assert text.split("\n")[0] == ours.context.split("\n")[0]
  prefix = module.CONFIG["answer_prefix"]
  input_text = text[: text.rfind(prefix)].strip()
  assert f"{input_text.split(chr(10))[-1]}\n\n{prefix.strip()}" == ours.question
  _, long, _ = module.generate_input_output(30, 4096)
  assert set(counts(long)) == set(counts(ruler.sample("ruler_cwe", 5000, 0).context)) == {3, 30}


def test_frequent_words_of_the_harness(ruler, published):
  module = published["fwe_utils"]
  random.seed(2)
  text, answers, num_words = module.generate_input_output(
    2000, tokens, vocab_size=40, incremental=62
  )
  ours = ruler.sample("ruler_fwe", 2000, 0)

  def counts(text):
    return sorted(Counter(text.split("words. ")[1].split("\nQuestion")[0].split()).values())

  from ttt_jax.extras.ruler.counting import frequent_words
  from ttt_jax.extras.ruler.sample import Draw

  drawn = Draw(0, "ruler_fwe", 2000, 0)
  same = frequent_words(ruler._materials, drawn, 2000).make(num_words)
  assert counts(text) == counts(same.prompt)
  assert len(answers) == len(ours.answers) == 3
  assert re.sub(r"(?s)words\. .*?\nQuestion", "", text) == re.sub(
    r"(?s)words\. .*?\nQuestion", "", ours.prompt
  )


@pytest.mark.parametrize("name", ["squad", "hotpot"])
def test_questions_of_the_harness(name, ruler, published, monkeypatch):
  module = published["qa_utils"]
  data = squad() if name == "squad" else hotpot(60)
  for article in data["data"] if name == "squad" else ():
    for paragraph in article["paragraphs"]:
      for question in paragraph["qas"]:
        question.setdefault("is_impossible", False)  # which SQuAD 1.1 lacks
  monkeypatch.setattr(module, "download_json", lambda url: data)
  read = {"squad": module.read_squad, "hotpot": module.read_hotpotqa}[name]
  questions, documents = read.__wrapped__()
  random.seed(3)
  ours = ruler.sample(f"ruler_qa_{name}", 2000, 4)
  count = len(re.findall(r"^Document \d+:$", ours.context, re.MULTILINE))
  text, answers = module.generate_input_output(4, count, questions, documents)
  assert [*ours.answers] == answers
  assert ours.question == f"{text.split(chr(10) * 2)[-2]}\n\n{text.split(chr(10) * 2)[-1]} Answer:"

  def parts(text):
    head, *bodies = re.split(r"Document \d+:\n", text.split("\n\nAnswer the question")[0].strip())
    return head, {body.strip() for body in bodies}

  (head, found), (our_head, our_found) = parts(text), parts(ours.context)
  assert head == our_head
  assert len(found) == len(our_found) == count
  gold = {
    documents[i].strip() for i in questions[4]["context"] + questions[4].get("more_context", [])
  }
  assert gold <= found
  assert gold <= our_found


def test_scores_of_the_harness(published):
  module = published["common_utils"]
  answers = (" 123 and\x00FOUR\n", "123", "", "four")
  for expected in (["123"], ["123", "four"], ["four", "no"], ["x", "y"]):
    for answer in answers:
      theirs = module.postprocess_pred([answer])
      assert string_match_all(answer, expected) == module.string_match_all(theirs, [expected])
      found = {word.lower() in answer.lower() for word in expected}
      part = module.string_match_part(theirs, [expected])
      if len(found) == 1:  # none or all
        assert string_match_part(answer, expected) == part
      else:  # RULER counts any of them; the harness, one of two as a half
        assert (string_match_part(answer, expected), part) == (1, 0.5)


def declared(task, key):
  """Returns a field of the harness's file of a task or of a file that it includes; None without one."""
  folder = Path(pytest.importorskip("lm_eval.tasks").__path__[0]) / "ruler"
  file = f"{task.removeprefix('ruler_')}.yaml"
  while file is not None:
    said = dict(re.findall(r"^ *(\w+): (.+)$", (folder / file).read_text(), re.MULTILINE))
    if key in said:
      return said[key]
    file = said.get("include")
  return None


def test_the_harness_has_these_tasks_and_no_others():
  folder = Path(pytest.importorskip("lm_eval.tasks").__path__[0]) / "ruler"
  group = (folder / "ruler.yaml").read_text()
  assert sorted(re.findall(r"^  - (\w+)$", group, re.MULTILINE)) == sorted(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_answers_as_the_harness_takes_them(task, ruler, published):
  """Answers may be as long as in the harness, and the same strings have the same score."""
  assert declared(task, "max_gen_toks") == str(TASKS[task].new_tokens)
  process = getattr(published["common_utils"], declared(task, "process_results").split(".")[-1])
  expected = ruler.sample(task, 2500, 2).answers
  document = {"outputs": list(expected), "max_length": 4096}
  several = len(expected) > 1
  answers = [", ".join(expected), "\n".join(expected).upper(), "none of them", ""]
  for answer in answers:
    assert TASKS[task].score(answer, expected) == process(document, [answer])["4096"]
  half = f" It is\x00{expected[-1]}. "
  theirs = process(document, [half])["4096"]
  if several and process.__name__ == "process_results_part":
    assert (TASKS[task].score(half, expected), theirs) == (1, 1 / len(expected))  # as RULER has it
  else:
    assert TASKS[task].score(half, expected) == theirs
