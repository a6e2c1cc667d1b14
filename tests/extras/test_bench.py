"""Tests what the benchmark writes, on tiny sizes; no test measures time."""

import json

import pytest

from ttt_jax.cli import main
from ttt_jax.extras.bench.cases import BenchConfig, mlp_cases
from ttt_jax.extras.bench.fast_weights import run_bench

TINY = {"tokens": 64, "chunk_size": 4, "d_model": 6, "d_ff": 10}


def test_writes_tables_json_and_a_plot(tmp_path, capsys):
  report = run_bench(BenchConfig(**TINY, shards=4), "tiny", tmp_path)
  assert json.loads((tmp_path / "tiny.json").read_text()) == json.loads(json.dumps(report))
  assert (tmp_path / "tiny.png").stat().st_size > 10_000
  printed = capsys.readouterr().out
  for text in ("two products", "associative", "ring, bfloat16", "x dense", "Cost model", "cpu"):
    assert text in printed
  for record in report["mlp"]:
    assert len(record["seconds"]) == 5
    assert record["temp_bytes"] > 0
  sent = {r["case"]: r["sent_bytes"] / r["state_bytes"] for r in report["exchange"]}
  assert sent["ring"] == pytest.approx(1, rel=0.1)  # a tiny state: its 16 slices and keeps show
  assert sent["all_gather"] == pytest.approx(3, rel=0.1)


def test_one_way_of_the_op_alone(tmp_path):
  cases = mlp_cases(BenchConfig(**TINY, ways=("one product",), op_only=True))
  assert [(case.name, case.part) for case in cases] == [
    ("dense", "forward"),
    ("dense", "both passes"),
    ("one product", "forward"),
    ("one product", "both passes"),
  ]


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--repeats", "3"], "--repeats 3: a median of fewer than 5"),
    (["--tokens", "100"], "--tokens 100 is not a multiple of shards * chunk_size = 512"),
    (["--ways", "magic"], "--ways 'magic' is not one of 'one product'"),
    (["--d-ff", "0"], "--d-ff 0 must be at least 1"),
  ],
)
def test_bad_input_is_one_line(flags, message, capsys):
  assert main(["bench", "fast-weights", *flags]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1
