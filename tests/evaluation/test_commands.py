"""`ttt-jax eval perplexity` and `eval recall`, from a run's directory to tables, JSON and pictures."""

import json

import jax
import pytest

from ttt_jax.cli import main

CONFIG = """
model: {num_layers: 2, d_model: 16, d_ff: 24, num_heads: 2, num_kv_heads: 2}
attention: {window: 8}
ttt: {layers: [1], chunk_size: 8}
data: {path: documents, seq_len: 128, heldout_fraction: 0.3}
train: {steps: 2, warmup_steps: 1, log_every: 1}
eval: {documents: 3, buckets: 2, prompt_tokens: 8, sample_tokens: 2, baseline: true}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of two steps, its twin, and the documents of the recall task that it read."""
  here = tmp_path_factory.mktemp("run")
  (here / "config.yaml").write_text(CONFIG)
  # optax schedules mix integers and floats
  with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
    patch.chdir(here)
    assert main(["data", "recall", "documents", "--documents", "12", "--tokens", "256"]) == 0
    assert main(["train", "config.yaml", "--run_dir", "made"]) == 0
  return here


@pytest.fixture(autouse=True)
def there(run, monkeypatch):
  monkeypatch.chdir(run)


def test_perplexity(run, capsys):
  words = ["eval", "perplexity", "made", "--lengths", "100", "30", "--block", "24", "--out", "out"]
  assert main([*words, "--documents", "2", "--reset-every", "32"]) == 0
  said = capsys.readouterr().out
  assert "last 24 tokens of 2 held-out documents" in said
  report = json.loads((run / "out" / "perplexity.json").read_text())
  assert report["modes"] == ["updating", "frozen", "reset 32"]
  assert [row["context"] for row in report["by_context"]] == [30, 30, 30, 100, 100, 100]
  assert (run / "out" / "perplexity.png").stat().st_size > 10_000
  # Another way to read is added to what is there; other documents are refused.
  assert main([*words, "--documents", "2", "--reset-every", "16"]) == 0
  assert main([*words, "--documents", "3"]) == 2
  assert "holds results of other settings: documents was" in capsys.readouterr().err


def test_documents_that_are_too_short(capsys):
  assert (
    main(["eval", "perplexity", "made", "--lengths", "250", "--block", "24", "--out", "o"]) == 2
  )
  said = capsys.readouterr().err
  assert "the longest of --lengths and the --block behind it=274 is longer than each of the" in said


def test_recall(run, capsys):
  assert main(["eval", "recall", "made"]) == 0
  assert "recall accuracy on 3 held-out documents of 128 bytes; chance is 3.8%" in (
    capsys.readouterr().out
  )
  report = json.loads((run / "made" / "recall.json").read_text())
  assert list(report["by_distance"]) == ["updates on", "updates off", "twin"]
  table = report["by_distance"]["updates on"]
  assert [row["from"] for row in table] == [0, 8, 16, 32, 64, 128]
  assert sum(row["queries"] for row in table) > 20
  assert (run / "made" / "recall.png").stat().st_size > 10_000
  assert main(["eval", "recall", "made", "--window", "16", "--out", "wider"]) == 0
  assert json.loads((run / "made" / "recall.json").read_text()) == report
  wider = json.loads((run / "wider" / "recall.json").read_text())
  assert [row["from"] for row in wider["by_distance"]["twin"]][:3] == [0, 16, 32]
  assert main(["eval", "recall", "made", "--window", "0"]) == 2
  assert main(["eval", "recall", "made", "--attention.window", "null"]) == 2
  said = capsys.readouterr().err
  assert "--window 0 must be positive" in said
  assert "attention.window=None, but the run in made has 8: leave the field out" in said
