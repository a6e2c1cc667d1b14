"""Tests RULER's samples: their length, their answers in the text, their reproducibility."""

import re
from codecs import BOM_UTF8
from collections import Counter
from itertools import islice

import pytest
from extras.rulers import TOKENIZERS, hotpot, squad, write

from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.extras.ruler import TASKS, Ruler, string_match_all, string_match_part
from ttt_jax.extras.ruler.config import SamplesConfig
from ttt_jax.extras.ruler.haystack import NOISE
from ttt_jax.extras.ruler.words import all_words

STORY = " ".join(f'Sentence {i} has an end, "it is said." What of {i}?' for i in range(40))

# The tokens of a unit at most: what a sample may lack of its length.
UNITS = {
  "niah_single_1": lambda text: NOISE + "\n",
  "niah_multikey_2": lambda text: max(text.split("\n"), key=len) + "\n",
  "niah_multikey_3": lambda text: max(text.split("\n"), key=len) + "\n",
  "ruler_vt": lambda text: " " + NOISE + "\n",
  "ruler_cwe": lambda text: " 12345. " + max(text.split(), key=len),
  "ruler_fwe": lambda text: " abcdef" * 3,
  "ruler_qa_squad": lambda text: max(text.split("\n\n"), key=len) + "\n\n",
  "ruler_qa_hotpot": lambda text: max(text.split("\n\n"), key=len) + "\n\n",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  path = tmp_path_factory.mktemp("questions")
  return {
    "squad": write(path / "squad.json", squad(40, 6)),
    "hotpot": write(path / "hotpot.json", hotpot(400)),
  }


@pytest.fixture(scope="module")
def ruler(files):
  return Ruler(byte_tokenizer(), seed=3, haystack=STORY, **files)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_length(task, kind, files):
  tokenizer = TOKENIZERS[kind]()
  ruler = Ruler(tokenizer, haystack=STORY, **files)
  for length in (2100, 5000):
    for sample in ruler.samples(task, length, 2):
      used = len(tokenizer.encode(sample.prompt)) + TASKS[task].new_tokens
      unit = UNITS.get(task, lambda text: " " + max(text.split(), key=len))(sample.context)
      times = (3 if length >= 4096 else 1) if task == "ruler_cwe" else 1
      # A unit counted by itself may have a few tokens more or fewer than in its place.
      assert length - times * (len(tokenizer.encode(unit)) + 2) <= used <= length


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_in_the_document_and_nowhere_else(task, ruler):
  for sample in ruler.samples(task, 2500, 4):
    assert sample.answers
    assert all(answer in sample.context for answer in sample.answers)
    if task not in ("ruler_qa_squad", "ruler_cwe"):  # words of which the question may have parts
      assert not any(answer in sample.question for answer in sample.answers)
    assert sample.prompt == sample.context + sample.question
    assert sample.context.endswith("\n")
    assert (sample.task, sample.length) == (task, 2500)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_number_and_seed(task, ruler, files):
  three = list(ruler.samples(task, 2100, 3))
  assert three[2] == ruler.sample(task, 2100, 2)
  assert list(ruler.samples(task, 2100, 1)) == three[:1]
  assert len({sample.prompt for sample in three}) == 3
  other = Ruler(byte_tokenizer(), seed=4, haystack=STORY, **files).sample(task, 2100, 2)
  assert other.prompt != three[2].prompt
  assert (
    ruler.sample(task, 2200, 2).context[:1000] != three[2].context[:1000] or task in _SAME_START
  )


_SAME_START = {
  "niah_single_1",
  "niah_single_2",
  "niah_single_3",
  "niah_multikey_1",
  "niah_multiquery",
}


def needles(text):
  return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.", text)


@pytest.mark.parametrize(
  ("task", "count", "asked"),
  [
    ("niah_single_1", 1, 1),
    ("niah_single_2", 1, 1),
    ("niah_single_3", 1, 1),
    ("niah_multikey_1", 4, 1),
    ("niah_multivalue", 4, 4),
    ("niah_multiquery", 4, 4),
  ],
)
def test_needles(task, count, asked, ruler):
  kind = "uuids" if task == "niah_single_3" else "numbers"
  value = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f-]{17}"}[
    kind
  ]
  for sample in ruler.samples(task, 3000, 5):
    found = needles(sample.context)
    assert len(found) == count
    assert len(sample.answers) == asked
    assert {k for k, *_ in found} == {kind}
    assert all(re.fullmatch(value, v) for *_, v in found)
    keys = {key for _, key, _ in found}
    assert len(keys) == (1 if task == "niah_multivalue" else count)
    right = {v for _, key, v in found if key in sample.question}
    assert set(sample.answers) == right
    haystack = STORY if task != "niah_single_1" else NOISE
    rest = re.sub(r"One of the special magic \w+ for \S+ is: \S+\.", "", sample.context)
    rest = rest.split("afterwards.\n")[1].split()
    repeated = haystack.split() * (1 + len(rest) // len(haystack.split()))
    assert rest == repeated[: len(rest)]


@pytest.mark.parametrize(
  ("task", "of"), [("niah_multikey_2", "numbers"), ("niah_multikey_3", "uuids")]
)
def test_a_haystack_of_needles(task, of, ruler):
  for sample in ruler.samples(task, 3000, 3):
    lines = sample.context.split("\n")[1:-1]
    found = needles(sample.context)
    assert len(found) == len(lines) > 10
    assert {kind for kind, *_ in found} == {of}
    assert [value for _, key, value in found if f" {key} " in sample.question] == [*sample.answers]


def test_needles_are_between_sentences_at_any_depth(ruler):
  depths = []
  for sample in ruler.samples("niah_single_2", 6000, 60):
    before, after = re.split(r"One of the special magic numbers for \S+ is: \d+\.", sample.context)
    document = before.split("afterwards.\n")[1]
    whole = re.search(r"""[.?]"?$""", document.strip())
    assert whole or not document.strip() or not after.strip()
    depths.append(len(document) / len(document + after))
  assert min(depths) < 0.1
  assert max(depths) > 0.9
  assert 0.35 < sum(depths) / len(depths) < 0.65


def test_variables(ruler):
  for sample in ruler.samples("ruler_vt", 2500, 3):
    example, document = sample.context.split("\n\n\n\n")
    for text, letters in ((example, 3), (document, 5)):
      lines = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text)
      assert len(lines) == 5
      assert lines[0][1].isdecimal()
      assert [value for _, value in lines[1:]] == [name for name, _ in lines[:-1]]
      assert all(len(name) == letters for name, _ in lines)
    assert [name for name, _ in lines] == [*sample.answers]
    assert f"the value {lines[0][1]} in" in sample.question
    solution = example.split("they are:  ")[1].split()
    assert solution == [name for name, _ in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example)]


@pytest.mark.parametrize(("length", "often", "seldom"), [(3000, 6, 1), (6000, 30, 3)])
def test_common_words(length, often, seldom, ruler):
  for sample in ruler.samples("ruler_cwe", length, 3):
    listed = re.findall(r"(\d+)\. (.*?)(?= \d+\. |\n)", sample.context.split("\n", 1)[1])
    assert [int(number) for number, _ in listed] == [*range(1, len(listed) + 1)]
    counts = Counter(word for _, word in listed)
    assert set(sample.answers) == {word for word, times in counts.items() if times == often}
    assert len(sample.answers) == 10
    assert set(counts.values()) == {often, seldom}


def test_more_common_words_than_there_are():
  sample = Ruler(TOKENIZERS["of words"]()).sample("ruler_cwe", 80_000, 0)
  counts = Counter(re.split(r" ?\d+\. ", sample.context.split("\n", 2)[1])[1:])
  assert len(counts) > len(all_words())
  assert set(sample.answers) == {word for word, times in counts.items() if times == 30}
  assert set(counts.values()) == {30, 3}


def test_frequent_words(ruler):
  for sample in ruler.samples("ruler_fwe", 4000, 3):
    words = sample.context.split("coded words. ")[1].split()
    (dots, most), *ranked = Counter(words).most_common()
    assert dots == "..."
    assert [word for word, _ in ranked[:3]] == [*sample.answers]
    assert ranked[2][1] > ranked[3][1]
    assert most / len(words) == pytest.approx(0.61, abs=0.05)
    assert ranked[0][1] / most == pytest.approx(1 / 4, abs=0.02)


def test_questions(ruler, files):
  first = ruler.sample("ruler_qa_squad", 2500, 0)
  assert first.answers == ("Keeper 0/0", "0/0")
  assert "Question: Who lives in 0/0? Answer:" in first.question
  for sample in ruler.samples("ruler_qa_squad", 2500, 8):
    documents = re.findall(r"Document (\d+):\nIn house (\d+)/(\d+) ", sample.context)
    assert [int(number) for number, *_ in documents] == [*range(1, len(documents) + 1)]
    assert len({place for _, *place in map(tuple, documents) for place in [tuple(place)]}) == len(
      documents
    )
    article = sample.answers[1].split("/")[0]
    assert sum(a == article for _, a, _ in documents) == 6  # its own come first, then others
    assert len(documents) > 6
  sample = ruler.sample("ruler_qa_hotpot", 2500, 3)
  assert sample.answers == ("Keeper 3",)
  assert "\nCat 3a\nIt is a. Keeper 3 has it.\n" in sample.context
  assert "\nCat 3b\nIt is b. Keeper 3 has it.\n" in sample.context


def test_files_with_a_mark_before_utf8(tmp_path, files):
  """A byte order mark before a text is not a word of the text, and JSON after one is JSON."""
  for task, name in (("ruler_qa_squad", "squad"), ("ruler_qa_hotpot", "hotpot")):
    marked = tmp_path / f"{name}.json"
    marked.write_bytes(BOM_UTF8 + files[name].read_bytes())
    given = [Ruler(byte_tokenizer(), **{name: path}) for path in (files[name], marked)]
    assert given[0].sample(task, 2500, 0) == given[1].sample(task, 2500, 0)
  story = tmp_path / "story.txt"
  story.write_bytes(BOM_UTF8 + STORY.encode())
  samples = SamplesConfig(("niah_single_2",), haystack=story).ruler(byte_tokenizer())
  expected = Ruler(byte_tokenizer(), haystack=STORY)
  assert samples.sample("niah_single_2", 2500, 0) == expected.sample("niah_single_2", 2500, 0)
  for encoding in ("utf-16", "latin-1"):
    story.write_bytes(f"{STORY} é".encode(encoding))
    with pytest.raises(ValueError, match=r"story.txt is not UTF-8 text"):
      SamplesConfig(haystack=story).ruler(byte_tokenizer())


def test_without_a_text_the_haystack_is_noise():
  sample = Ruler(byte_tokenizer()).sample("niah_single_2", 1500, 0)
  rest = re.sub(r"One of the special magic \w+ for \S+ is: \S+\.", "", sample.context)
  assert rest.split("afterwards.\n")[1].split()[:40] == (NOISE.split() * 3)[:40]


def test_scores():
  assert string_match_all(" It is\x0023 and X\n", ["23", "x", "no", "and"]) == 0.75
  assert string_match_all("", ["a"]) == 0
  assert string_match_part("the KEEPER", ["nobody", "keeper"]) == 1
  assert string_match_part("the KEEPER", ["nobody"]) == 0
  assert {name for name, task in TASKS.items() if task.score is string_match_part} == {
    "ruler_qa_squad",
    "ruler_qa_hotpot",
  }
  assert Counter(task.new_tokens for task in TASKS.values()) == {
    128: 8,
    30: 1,
    120: 1,
    50: 1,
    32: 2,
  }


@pytest.mark.parametrize("task", TASKS)
def test_too_small_a_length_says_one_that_works(task, ruler):
  with pytest.raises(ValueError, match=f"{task} does not fit a length of 40 tokens") as error:
    ruler.sample(task, 40, 1)
  smallest = int(re.search(r"takes (\d+) at least", str(error.value))[1])
  assert ruler.sample(task, smallest, 1).length == smallest
  with pytest.raises(ValueError, match="does not fit"):
    ruler.sample(task, smallest // 2, 1)


def changed(place, value):
  """Makes the questions with one field changed, or removed if the value is None."""
  data = squad()
  *parents, name = place
  inner = data
  for key in parents:
    inner = inner[key]
  if value is None:
    del inner[name]
  else:
    inner[name] = value
  return data


PARAGRAPH = ("data", 1, "paragraphs", 2)


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (changed(("data",), None), "the file has no field 'data'"),
    (changed(("data",), "x"), "the file.data is not a list"),
    (changed((*PARAGRAPH, "context"), None), r"data\[1\].paragraphs\[2\] has no field 'context'"),
    (changed((*PARAGRAPH, "qas"), 7), r"data\[1\].paragraphs\[2\].qas is not a list"),
    (
      changed((*PARAGRAPH, "qas", 0, "answers", 1), {"txt": "x"}),
      r"data\[1\].paragraphs\[2\].qas\[0\].answers\[1\] has no field 'text'",
    ),
    (changed((*PARAGRAPH, "qas", 0, "question"), 3), r"qas\[0\].question is not a text"),
    ({"data": []}, "has no question that has an answer"),
    (
      [{"question": "?", "answer": "!", "context": [["title"]]}],
      r"\[0\].context\[0\] has no field 1",
    ),
    ([{"question": "?", "context": []}], r"\[0\] has no field 'answer'"),
    (3, "neither in SQuAD's format"),
  ],
)
def test_damaged_questions(data, message, tmp_path):
  ruler = Ruler(byte_tokenizer(), squad=write(tmp_path / "questions.json", data))
  with pytest.raises(ValueError, match=message):
    ruler.sample("ruler_qa_squad", 3000, 0)


def test_bad_input(tmp_path, files):
  ruler = Ruler(byte_tokenizer(), **files)
  with pytest.raises(
    ValueError, match=r"no RULER task 'niah'; there are niah_single_1, .*ruler_qa_hotpot"
  ):
    ruler.sample("niah", 4096, 0)
  with pytest.raises(ValueError, match="ruler_qa_squad cannot reach a length of 1000000 tokens"):
    ruler.sample("ruler_qa_squad", 1_000_000, 0)
  with pytest.raises(ValueError, match="240 questions with answers"):
    ruler.sample("ruler_qa_squad", 4096, 240)
  with pytest.raises(ValueError, match="--hotpot FILE"):
    Ruler(byte_tokenizer()).sample("ruler_qa_hotpot", 4096, 0)
  with pytest.raises(ValueError, match=r"cannot read .*nowhere.json: No such file"):
    Ruler(byte_tokenizer(), squad=tmp_path / "nowhere.json").sample("ruler_qa_squad", 4096, 0)
  (tmp_path / "cut.json").write_text('{"data": [')
  with pytest.raises(ValueError, match=r"cut\.json is not JSON"):
    Ruler(byte_tokenizer(), squad=tmp_path / "cut.json").sample("ruler_qa_squad", 4096, 0)
  with pytest.raises(ValueError, match="the haystack is empty"):
    Ruler(byte_tokenizer(), haystack=" \n").sample("niah_single_2", 4096, 0)


def test_a_tokenizer_that_makes_one_token_of_all():
  """No text is long enough for this length."""
  from tokenizers import Tokenizer as Backend
  from tokenizers import models

  from ttt_jax.checkpoints.tokenizer import Tokenizer

  backend = Backend(models.WordLevel({"?": 0}, unk_token="?"))
  with pytest.raises(ValueError, match="cannot reach a length of 600 tokens"):
    Ruler(Tokenizer(backend)).sample("niah_single_1", 600, 0)


def test_few_prompts_are_counted(monkeypatch, files):
  """Fitting counts few whole prompts; a search over them would take minutes at 128k tokens."""
  from ttt_jax.extras.ruler.fit import TokenCounter

  lengths = []
  count = TokenCounter.prompt
  monkeypatch.setattr(
    TokenCounter, "prompt", lambda self, text: lengths.append(len(text)) or count(self, text)
  )
  ruler = Ruler(TOKENIZERS["word pieces"](), haystack=STORY, **files)
  for task in TASKS:
    lengths.clear()
    samples = [*islice(ruler.samples(task, 6000, 6), 6)]
    long = sum(length > len(samples[0].prompt) / 2 for length in lengths)
    assert long <= 2.5 * len(samples), task
