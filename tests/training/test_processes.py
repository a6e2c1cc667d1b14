"""Tests runs of several processes and killed runs: their steps are those of one undisturbed process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ttt_jax.data import prepare
from ttt_jax.extras.recall.task import write_documents
from ttt_jax.training.rundir import load_metrics

CONFIG = """
model: {{num_layers: 2, d_model: 16, d_ff: 24, num_heads: 2, num_kv_heads: 2}}
attention: {{window: 8}}
ttt: {{layers: [1], chunk_size: 8}}
data:
  seq_len: 64
  heldout_fraction: 0.3
  align_documents: true
  mixture: [{{path: {folder}/text}}, {{path: {folder}/prepared, weight: 0.5}}]
train: {{steps: 8, batch_size: 4, warmup_steps: 2, log_every: 1}}
checkpoint: {{every: 2}}
eval: {{documents: 3, buckets: 2, prompt_tokens: 16, sample_tokens: 4}}
"""
MESHES = {
  4: ["--mesh.data", "2", "--mesh.context", "2"],
  8: ["--mesh.fsdp", "2", "--mesh.context", "4"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("processes")
  rng = np.random.default_rng(0)
  for name in ("text", "more"):
    (folder / name).mkdir()
    for i in range(12):
      words = rng.choice(["to", "learn", "while", "reading", "is", "fast"], 40)
      (folder / name / f"{i}.txt").write_text(" ".join(words))
  prepare(str(folder / "more"), folder / "prepared")
  path = folder / "tiny.yaml"
  path.write_text(CONFIG.format(folder=folder))
  return path


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
  """Returns the run of one process with so many devices."""
  known = {}

  def run(devices: int) -> Path:
    if devices not in known:
      known[devices] = tmp_path_factory.mktemp("undisturbed") / "run"
      finish(start(config, known[devices], 1, devices))
    return known[devices]

  return run


def start(config, run_dir, processes: int, devices: int, *words) -> list[subprocess.Popen]:
  """Trains in so many processes, which have so many devices together."""
  return launch(["train", config, "--run_dir", run_dir, *words], processes, devices)


def launch(words: list, processes: int, devices: int) -> list[subprocess.Popen]:
  """Starts a command of `ttt-jax` in so many processes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  words = [*words, *MESHES[devices], "--runtime.cpu_devices", devices // processes]
  if processes > 1:
    words += ["--runtime.distributed", "true", "--runtime.coordinator", f"localhost:{port}"]
    words += ["--runtime.num_processes", processes, "--runtime.process_id"]
  return [
    subprocess.Popen(
      [sys.executable, "-m", "ttt_jax.cli", *map(str, [*words, i] if processes > 1 else words)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for i in range(processes)
  ]


def finish(running: list[subprocess.Popen], code: int = 0) -> list[str]:
  """Returns what the processes printed; all must end with this exit status."""
  outputs = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [code] * len(running), outputs
  return outputs


def wait_until(condition, running) -> None:
  deadline = time.monotonic() + 200
  while not condition():
    assert time.monotonic() < deadline
    assert all(p.poll() is None for p in running), [p.communicate()[0] for p in running]
    time.sleep(0.002)


def losses_of(run_dir) -> list[float]:
  records = load_metrics(run_dir / "metrics.jsonl")
  assert [record["step"] for record in records] == list(range(1, len(records) + 1))
  return [record["loss"] for record in records]


def tokens_of(run_dir) -> list[int]:
  return [record["tokens"] for record in load_metrics(run_dir / "metrics.jsonl")]


def logged(run_dir) -> int:
  file = run_dir / "metrics.jsonl"
  return len(load_metrics(file)) if file.exists() else 0


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one(config, tmp_path, undisturbed):
  """Processes share parameters and context; only the first one prints and writes."""
  outputs = finish(start(config, tmp_path / "run", 4, 8))
  np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(undisturbed(8)), rtol=1e-5)
  assert tokens_of(tmp_path / "run") == tokens_of(undisturbed(8))  # two processes hold each row
  assert "step 8/8" in outputs[0]
  assert "held-out loss by position" in outputs[0]
  assert all("step" not in output and "held-out" not in output for output in outputs[1:])
  names = {path.name for path in (tmp_path / "run").iterdir()}
  assert names - {".lock"} == {
    "config.yaml",
    "metrics.jsonl",
    "checkpoints",
    "summary.json",
    "loss_by_position.png",
    "training_loss.png",
  }


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path, undisturbed):
  """Perplexity that another number of processes resumes, and recall, give the results of one process."""
  run_dir = undisturbed(4)
  words = ["eval", "perplexity", run_dir, "--documents", "3", "--lengths", "16", "40"]
  words += ["--block", "24", "--buckets", "2", "--reset-every", "8"]
  outs = [tmp_path / "one", tmp_path / "two"]
  finish(launch([*words, "--out", outs[0]], 1, 4))
  half = (outs[0] / "cells.jsonl").read_text().splitlines(keepends=True)[:10]
  outs[1].mkdir()
  (outs[1] / "cells.jsonl").write_text("".join(half))
  printed = finish(launch([*words, "--out", outs[1]], 2, 4))
  assert "nats per token in the last 24" in printed[0]
  assert "nats per token" not in printed[1]
  one, two = (json.loads((out / "perplexity.json").read_text()) for out in outs)
  assert [row["mode"] for row in one["by_context"]] == 2 * ["updating", "frozen", "reset 8"]
  losses = [[row["loss"] for row in report["by_context"]] for report in (one, two)]
  np.testing.assert_allclose(*losses, rtol=1e-5)
  cells = [(out / "cells.jsonl").read_text().splitlines() for out in outs]
  assert len(cells[0]) == len(cells[1]) == 1 + 2 * 3 * 3
  assert (outs[1] / "perplexity.png").exists()

  write_documents(tmp_path / "pairs", documents=12, tokens=128, seed=0)
  words = ["eval", "recall", run_dir, "--data.mixture", "[]", "--data.path", tmp_path / "pairs"]
  finish(launch([*words, "--out", outs[0]], 1, 4))
  finish(launch([*words, "--out", outs[1]], 2, 4))
  one, two = ((out / "recall.json").read_text() for out in outs)
  assert one == two
  assert (outs[1] / "recall.png").exists()


@pytest.mark.slow
def test_sigterm_to_one_process_saves_them_all(config, tmp_path, undisturbed):
  """All processes stop at the same step; one process with all the devices resumes from it.

  What one of them cannot do stops all, too, with its reason.
  """
  run_dir = tmp_path / "run"
  words = ["--checkpoint.every", "1000", "--checkpoint.verify", "checksums"]
  running = start(config, run_dir, 2, 4, *words)
  wait_until(lambda: logged(run_dir) >= 1, running)
  running[1].send_signal(signal.SIGTERM)
  outputs = finish(running)
  done = logged(run_dir)
  assert [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()] == [str(done)]
  if done < 8:
    assert f"stopped after step {done}, saved" in outputs[0]
  saved = run_dir / "checkpoints" / str(done)
  everything = json.loads((saved / "ttt_jax.json").read_text())["files"]
  later = json.loads((saved / "ttt_jax.checksums.1.json").read_text())
  # The first process has compared all files too, since they are small.
  assert {name: everything[name][1] for name in later} == later
  assert set(later) < set(everything)
  assert {name.split("/")[1] for name in later} == {"ocdbt.process_1"}
  file = saved / max(later, key=lambda name: everything[name][0])
  intact = file.read_bytes()
  half = len(intact) // 2
  file.write_bytes(intact[:half] + bytes([intact[half] ^ 1]) + intact[half + 1 :])
  outputs = finish(start(config, run_dir, 2, 4, *words), code=2)
  assert all(f"{file.relative_to(saved)} has changed" in output for output in outputs)
  file.write_bytes(intact)

  outputs = finish(start(config, run_dir, 2, 4, "--model.d_ff", "32"), code=2)
  assert all("model.d_ff: 24 -> 32" in output for output in outputs)
  finish(start(config, run_dir, 1, 4, *words))
  np.testing.assert_allclose(losses_of(run_dir), losses_of(undisturbed(4)), rtol=1e-5)


@pytest.mark.slow
def test_killed_again_and_again_the_losses_are_bit_identical(config, tmp_path, undisturbed):
  """A kill at any time, or during a checkpoint, loses at most `checkpoint.every` steps."""
  run_dir = tmp_path / "run"
  checkpoints = run_dir / "checkpoints"

  def saved() -> int:
    steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()]
    return max(steps, default=0)

  running = start(config, run_dir, 1, 4)
  wait_until(lambda: logged(run_dir) >= 3, running)
  running[0].kill()
  running[0].communicate()
  assert saved() >= logged(run_dir) - 3  # every 2 steps, and one may be half written
  first = saved()

  running = start(config, run_dir, 1, 4)
  wait_until(lambda: any("tmp" in p.name for p in checkpoints.iterdir()), running)
  running[0].kill()
  running[0].communicate()
  assert saved() >= first

  finish(start(config, run_dir, 1, 4))
  assert tokens_of(run_dir) == tokens_of(undisturbed(4))
  assert losses_of(run_dir) == losses_of(undisturbed(4))
