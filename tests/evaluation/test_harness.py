"""The adapter inside of the lm-evaluation-harness, on a task of its own kind that is a local file."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers import MODEL, TTT, random_model

import ttt_jax
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.evaluation.scoring import Scorer, rolling_windows

DOCUMENTS = [
  {
    "question": "to read is",
    "choices": ["to learn", "a ship", "x"],
    "answer": 0,
    "text": "to read",
  },
  {
    "question": "a captain of",
    "choices": ["of", "a ship", "y z"],
    "answer": 1,
    "text": "a longer text",
  },
  {
    "question": "one",
    "choices": ["two", "three", "a"],
    "answer": 2,
    "text": "what follows, follows",
  },
]
TASKS = {
  "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
""",
  "texts": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
  "answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {max_gen_toks: 6, until: ["\\n\\n"], do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def model():
  config = dataclasses.replace(MODEL, vocab_size=256, num_layers=1)
  ttt = dataclasses.replace(TTT, layers=(0,), inner_lr=3.0, target="hidden_states")
  return random_model(config, None, ttt, seed=1)


def tasks(path):
  """A directory with the tasks, as a user writes them."""
  (path / "documents.json").write_text("\n".join(map(json.dumps, DOCUMENTS)))
  for name, body in TASKS.items():
    head = f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
    head += f"dataset_kwargs: {{data_files: {{test: {path / 'documents.json'}}}}}\n"
    (path / f"{name}.yaml").write_text(head + body)
  return path


def test_without_the_package_it_says_what_to_install():
  code = "import sys; sys.modules['lm_eval'] = None; import ttt_jax.evaluation.harness"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode != 0
  assert "pip install 'ttt_jax[eval]'" in result.stderr


@pytest.mark.slow
def test_tasks_of_a_local_file(model, tmp_path, monkeypatch):
  lm_eval = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager

  from ttt_jax.evaluation.harness import TTTHarness

  for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
  results = lm_eval.simple_evaluate(
    model=TTTHarness(model, byte_tokenizer(), batch_size=2),
    tasks=[f"local_{name}" for name in TASKS],
    task_manager=TaskManager(include_path=str(tasks(tmp_path))),
    bootstrap_iters=0,
  )
  scorer = Scorer(model, byte_tokenizer(), batch_size=2)

  right = 0
  for document in DOCUMENTS:
    pairs = [(document["question"], f" {choice}") for choice in document["choices"]]
    scores = [score.loglikelihood for score in scorer.loglikelihoods(pairs)]
    right += scores.index(max(scores)) == document["answer"]
  assert results["results"]["local_choices"]["acc,none"] == pytest.approx(right / 3)

  texts = [document["text"] for document in DOCUMENTS]
  nats = -sum(scorer.rolling(texts)) / sum(map(len, texts))
  perplexity = results["results"]["local_texts"]["byte_perplexity,none"]
  assert perplexity == pytest.approx(2.718281828459045**nats, rel=1e-5)

  asked = [(d["question"], {"max_gen_toks": 6, "until": ["\n\n"]}) for d in DOCUMENTS]
  said = {
    sample["doc"]["question"]: sample["resps"][0][0]
    for sample in results["samples"]["local_answers"]
  }
  assert said == {q: text for (q, _), text in zip(asked, scorer.generate(asked))}


@pytest.mark.slow
def test_its_own_command_line(model, tmp_path):
  """The harness itself does not find models of other packages; its command line run from here does."""
  pytest.importorskip("lm_eval")
  with pytest.warns(UserWarning, match="published"):
    ttt_jax.save_pretrained(model, tmp_path / "model")
  byte_tokenizer().save(tmp_path / "model")
  (tmp_path / "tasks").mkdir()
  words = ["-m", "ttt_jax.evaluation.harness", "run", "--model", "ttt_jax"]
  words += ["--model_args", f"pretrained={tmp_path / 'model'},max_length=64", "--batch_size", "2"]
  words += ["--tasks", "local_choices", "--include_path", str(tasks(tmp_path / "tasks"))]
  words += ["--output_path", str(tmp_path / "out")]
  import os

  environment = os.environ | {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    "JAX_PLATFORMS": "cpu",
  }
  result = subprocess.run(
    [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=300
  )
  assert result.returncode == 0, result.stderr[-3000:]
  assert "local_choices" in result.stdout
  (file,) = (tmp_path / "out").rglob("results_*.json")
  scorer = Scorer(model, byte_tokenizer(), batch_size=2)
  right = 0
  for document in DOCUMENTS:
    pairs = [(document["question"], f" {choice}") for choice in document["choices"]]
    scores = [score.loglikelihood for score in scorer.loglikelihoods(pairs)]
    right += scores.index(max(scores)) == document["answer"]
  found = json.loads(file.read_text())["results"]["local_choices"]["acc,none"]
  assert found == pytest.approx(right / 3)


@pytest.mark.parametrize("length", [1, 3, 8, 100])
def test_windows_of_the_harness(length):
  utils = pytest.importorskip("lm_eval.utils")
  tokens = [*range(10, 31)]
  theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 5, length, 1))
  ours = [
    (window.tokens[: -window.scored], window.tokens[-window.scored :])
    for window in rolling_windows(tokens, 5, length)
  ]
  assert ours == [(list(context), list(scored)) for context, scored in theirs]


def test_bad_input(model):
  pytest.importorskip("lm_eval")
  from ttt_jax.evaluation.harness import TTTHarness

  with pytest.raises(ValueError, match="a model and its tokenizer, or pretrained"):
    TTTHarness(model)
  with pytest.raises(ValueError, match="batch_size='auto' must be a number"):
    TTTHarness(model, byte_tokenizer(), batch_size="auto")
