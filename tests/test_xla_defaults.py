"""A core of the suite as users' programs are compiled, with all of XLA's optimizations.

The suite turns most of them off (`conftest.py`). What must not depend on it runs again here: the operator
against its law, the collectives that are counted, the published numbers, a training run on eight devices.
In processes of their own: flags of XLA are read once in a process, and neither of JAX's caches of programs
in memory looks at `jax_disable_most_optimizations`.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import MODEL, TTT, mesh_of
from rich.console import Console

from ttt_jax.config import AttentionConfig, Config, DataConfig, TrainConfig
from ttt_jax.data import Corpus, Document, InMemory, Source
from ttt_jax.training.loop import train
from ttt_jax.training.rundir import load_metrics

TESTS = Path(__file__).parent

# Each part: the files, which of their tests, and how many these are.
CORE = {
  "operator": (
    ["ops/test_fast_weight.py", "ops/test_golden_mlp.py"],
    "test_contract and (8-packed-float32 or 2-packed-bfloat16) "
    "or test_published_numbers and float32 and (mlp02 or mlp05 or mlp08)",
    8 + 6,
  ),
  "collectives": (
    ["ops/test_communication.py", "training/test_loop.py"],
    "forward_exchanges or outgoing_state or documents_cost or gradient_exchanges "
    "or collectives_of_a_training_step and data",
    4 + 1 + 1 + 16 + 1,
  ),
  "models": (
    ["checkpoints/test_golden_models.py", "generation/test_golden.py"],
    "test_published_numbers and not float64 and qwen3_d or test_generation and qwen3_c",
    1 + 1,
  ),
  "training": ([Path(__file__).name], "eight_devices", 1),
}


@pytest.fixture
def run_tests(request):
  """Runs tests in a process with none of this one's flags, programs on disk, or place among workers."""
  if request.config.getoption("--xla-defaults"):
    pytest.skip("this is a run with XLA's defaults already")

  def run(*words, **more):
    ours = ("JAX_", "PYTEST_", "XLA_FLAGS")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
      [sys.executable, "-m", "pytest", "-n", "0", *words],
      cwd=TESTS,
      env=environment | more,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return re.findall(r"(\d+) (passed|skipped)", done.stdout)

  return run


@pytest.mark.slow
@pytest.mark.parametrize("part", CORE)
def test_core(part, run_tests):
  files, chosen, count = CORE[part]
  assert run_tests("--xla-defaults", *files, "-k", chosen) == [(str(count), "passed")]


@pytest.mark.parametrize("words", [["--xla-defaults"], []], ids=["defaults", "fast"])
def test_what_the_compiler_is_told(words, run_tests, tmp_path):
  """XLA writes down the options that are not as they are by default."""
  run_tests(*words, "extras/test_hlo.py::test_moved_bytes", XLA_FLAGS=f"--xla_dump_to={tmp_path}")
  told = [file.read_text() for file in tmp_path.glob("*debug_options*")]
  assert told
  options = ["xla_backend_optimization_level: 0", "xla_llvm_disable_expensive_passes: true"]
  if jax.__version_info__ < (0, 11):
    options.append("xla_cpu_use_fusion_emitters: false")
  for option in options:
    name = option.partition(":")[0]
    assert [option in text for text in told] == [not words] * len(told)
    assert [name in text for text in told] == [not words] * len(told)


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_on_eight_devices_is_that_on_one(tmp_path, request):
  """Over data and context, with documents, windowed and full attention, and fast weights."""
  if not request.config.getoption("--xla-defaults"):
    pytest.skip("the core has it")
  config = Config(
    model=dataclasses.replace(MODEL, vocab_size=256, num_layers=2),
    attention=AttentionConfig(window=5, full_layers=(1,)),
    ttt=dataclasses.replace(TTT, layers=(0,)),
    data=DataConfig(seq_len=64),
    train=TrainConfig(steps=12, batch_size=2, warmup_steps=2, learning_rate=1e-2, log_every=1),
  )
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, 4).astype(np.uint8)) for _ in range(8)]
  documents = InMemory(
    Document(f"{i}.txt", np.frombuffer(b" ".join(rng.choice(words, n)), np.uint8))
    for i, n in enumerate((60, 3, 25, 8, 40, 11, 7))
  )
  corpus = Corpus((Source("made up", documents, documents),))

  def losses(*mesh):
    run = tmp_path / f"{mesh}"
    train(config, corpus, mesh_of(*mesh), run, console=Console(quiet=True))
    return np.array([record["loss"] for record in load_metrics(run / "metrics.jsonl")])

  one, eight = losses(1, 1), losses(2, 4)
  np.testing.assert_allclose(eight, one, rtol=2e-3)
  assert eight[-3:].mean() < eight[0] - 0.5
