"""`ttt-jax generate` and `ttt-jax bench generation` as a user meets them."""

import dataclasses
import io
import json
import subprocess
import sys
from codecs import BOM_UTF8

import numpy as np
import pytest
from helpers import MODEL, TTT, random_model

import ttt_jax
from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.cli import main
from ttt_jax.generation.generate import generate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A model of bytes that learns while it reads, with its tokenizer beside it."""
  ttt = dataclasses.replace(
    TTT, decay=None, inner_lr=2.0, inner_lr_scale="1/F", normalize_target=True
  )
  model = random_model(dataclasses.replace(MODEL, vocab_size=256), ttt=ttt, seed=1)
  path = tmp_path_factory.mktemp("model") / "model"
  with pytest.warns(UserWarning, match="published"):
    ttt_jax.save_pretrained(model, path)
  byte_tokenizer().save(path)
  return path


def run(capsys, *words):
  status = main(["generate", *map(str, words)])
  return status, *capsys.readouterr()


def expected(checkpoint, text, new, **how):
  model = ttt_jax.load_pretrained(checkpoint)
  made = generate(model, [list(text.encode())], max_new_tokens=new, **how).new_tokens[0]
  return byte_tokenizer().decode(made.tolist())


def test_text_as_it_is_made(checkpoint, capsys):
  status, out, err = run(capsys, checkpoint, "--prompt", "to read", "--max-new-tokens", 21)
  assert status == 0
  assert out == expected(checkpoint, "to read", 21) + "\n"
  assert "fast weights in layers [0, 2]" in err
  assert "read 7 tokens" in err
  assert "wrote 21" in err


def test_several_prompts(checkpoint, capsys, tmp_path):
  (tmp_path / "prompt.txt").write_text("is to learn")
  words = ["--prompt", "to read", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 9]
  _, out, _ = run(capsys, checkpoint, *words)
  first, second = (expected(checkpoint, text, 9) for text in ("to read", "is to learn"))
  assert out == f"=== 1 of 2\n{first}\n=== 2 of 2\n{second}\n"


def test_a_saved_state_goes_on(checkpoint, capsys, tmp_path):
  state = tmp_path / "state"
  words = ["--prompt", "to read", "--max-new-tokens", 6, "--temperature", 1, "--seed", 3]
  _, first, _ = run(capsys, checkpoint, *words, "--save-state", state)
  words = ["--prompt", "", "--max-new-tokens", 8, "--temperature", 1, "--seed", 3]
  _, second, _ = run(capsys, checkpoint, *words, "--load-state", state)
  model = ttt_jax.load_pretrained(checkpoint)
  how = {"temperature": 1.0, "seed": 3, "max_new_tokens": 14}
  (made,) = generate(model, [list(b"to read")], **how).new_tokens
  decode = byte_tokenizer().decode
  assert (first, second) == (decode(made[:6].tolist()) + "\n", decode(made[6:].tolist()) + "\n")


def test_what_was_learned_of_a_text(checkpoint, capsys, tmp_path):
  book = tmp_path / "book.txt"
  book.write_text("a captain of a ship, " * 4)
  words = ["--prompt", "to read", "--max-new-tokens", 12]
  _, out, err = run(capsys, checkpoint, *words, "--learn", book)
  model = ttt_jax.load_pretrained(checkpoint)
  learned = generate(model, [list(book.read_bytes())], max_new_tokens=0).state
  assert out == expected(checkpoint, "to read", 12, state=learned.fast_weights_only()) + "\n"
  assert "learned" in err
  assert out != expected(checkpoint, "to read", 12) + "\n"


def test_a_mark_before_utf8_is_not_read(checkpoint, capsys, tmp_path, monkeypatch):
  (tmp_path / "prompt.txt").write_bytes(BOM_UTF8 + b"to read")
  words = ["--max-new-tokens", 9]
  _, out, err = run(capsys, checkpoint, "--prompt-file", tmp_path / "prompt.txt", *words)
  assert out == expected(checkpoint, "to read", 9) + "\n"
  assert "read 7 tokens" in err
  for content, status in ((BOM_UTF8 + b"to read", 0), ("to read".encode("utf-16"), 2)):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert run(capsys, checkpoint, *words)[0] == status
    (tmp_path / "prompt.txt").write_bytes(content)
    ended, _, err = run(capsys, checkpoint, "--prompt-file", tmp_path / "prompt.txt", *words)
    assert ended == status
  assert "prompt.txt is not UTF-8 text" in err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--prompt", ""], "prompt 0 is empty"),
    (["--prompt-file", "nowhere.txt"], "cannot read nowhere.txt"),
    (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
    (["--prompt", "x", "--load-state", "nowhere"], "state 'nowhere' is not there"),
    (["--prompt", "x", "--ttt.layers", "[]", "--learn", "x"], "has no fast weights to learn with"),
  ],
)
def test_bad_input_is_one_line(checkpoint, capsys, words, message):
  status, out, err = run(capsys, checkpoint, *words)
  assert status == 2
  assert not out
  assert message in err
  assert "Traceback" not in err


def test_bench(tmp_path, capsys):
  sizes = ("layers", 2), ("d-model", 8), ("d-ff", 12), ("heads", 2), ("kv-heads", 1)
  sizes += ("vocab", 32), ("every", 2), ("chunk-size", 4), ("prompt", 6), ("batch", 2)
  words = [str(word) for name, value in sizes for word in (f"--{name}", value)]
  assert main(["bench", "generation", *words, "--out", str(tmp_path)]) == 0
  report = json.loads((tmp_path / "bench_generation.json").read_text())
  plain, fast = report["cases"]
  assert plain["pending_chunk_bytes"] == plain["fast_weights_bytes"] == 0
  assert fast["pending_chunk_bytes"] == 2 * 4 * (12 + 8) * 4  # rows, C (F + D), float32
  assert fast["fast_weights_bytes"] == 2 * 12 * 8 * 4
  assert len(fast["seconds_per_step"]) == 5
  assert np.all(np.array(fast["seconds_per_step"]) > 0)
  assert "with fast weights" in capsys.readouterr().out


def test_generating_and_converting_import_no_trainer(checkpoint, tmp_path):
  """Optax is Flax's own import."""
  words = ["generate", str(checkpoint), "--prompt", "to read", "--max-new-tokens", "2"]
  code = (
    "import sys; from ttt_jax.cli import main; "
    f"assert main({words!r}) == 0; "
    f"assert main(['convert', {str(checkpoint)!r}, {str(tmp_path / 'converted')!r}]) in (0, None); "
    "print(*sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  imported = set(done.stdout.splitlines()[-1].split())
  assert not imported & {"orbax", "grain", "matplotlib"}
  assert not {
    name for name in imported if name.startswith(("ttt_jax.training", "ttt_jax.evaluation"))
  }
  assert "ttt_jax.checkpoints.open" in imported
