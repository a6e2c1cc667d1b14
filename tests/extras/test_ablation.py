"""Tests grids of runs: their configs, their resumption, their report."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from ttt_jax import cli
from ttt_jax.extras.ablation import load_ablation, runs
from ttt_jax.extras.ablation.picture import draw_ablation, plot_ablation
from ttt_jax.extras.ablation.report import interval, report
from ttt_jax.extras.ablation.runs import run_all
from ttt_jax.training.rundir import open_run

BASE = """
model: {num_layers: 2, d_model: 16, d_ff: 24, num_heads: 2, num_kv_heads: 2}
ttt: {layers: [1], chunk_size: 8}
data: {seq_len: 32}
train: {steps: 2, warmup_steps: 1, log_every: 1}
eval: {documents: 2, buckets: 2, prompt_tokens: 8, sample_tokens: 2}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("base.yaml").write_text(BASE)
  return tmp_path


def _write(text: str) -> Path:
  Path("question.yaml").write_text(text)
  return Path("question.yaml")


def test_variants_are_the_grid_and_the_named_ones(here):
  ablation = load_ablation(
    _write("""
name: q
base: base.yaml
set: {train.steps: 7, data.seq_len: 64}
grid: {ttt.chunk_size: [8, 16], ttt.layers: [[0], [0, 1]]}
variants: {none: {ttt.layers: []}}
seeds: [3, 5]
"""),
    {"data": {"seq_len": 128}},
  )
  names = [variant.name for variant in ablation.variants]
  assert names == [
    "chunk_size=8, layers=[0]",
    "chunk_size=8, layers=[0, 1]",
    "chunk_size=16, layers=[0]",
    "chunk_size=16, layers=[0, 1]",
    "none",
  ]
  last = ablation.variants[3].configs
  assert [config.seed for config in last] == [3, 5]
  assert last[0].ttt.chunk_size == 16
  assert last[0].ttt.layers == (0, 1)
  assert (last[0].train.steps, last[0].data.seq_len) == (7, 128)
  assert ablation.variants[4].configs[0].ttt.layers == ()
  places = [config.resolved_run_dir for _, config in ablation.runs()]
  assert len(set(places)) == 10
  assert [config.seed for _, config in ablation.runs()] == [3] * 5 + [5] * 5
  elsewhere = load_ablation("question.yaml", directory="shared/here")
  assert elsewhere.directory == Path("shared/here")
  assert all(config.run_dir.startswith("shared/here/") for _, config in elsewhere.runs())


GOOD = "name: q\nbase: base.yaml\nseeds: [0]\n"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("name: q\nbase: base.yaml\n", "lacks seeds"),
    (GOOD, "has no variants"),
    (GOOD + "gird: {}\n", "has gird; an ablation has name"),
    (GOOD + "grid: {ttt.chunk_sise: [8]}\n", r"variant 'chunk_sise=8'.*ttt\.chunk_size"),
    (GOOD + "grid: {ttt.chunk_size: 8}\n", r"grid\.ttt\.chunk_size=8 must be a list"),
    (GOOD + "grid: {ttt.chunk_size: [8, 7]}\n", "variant 'chunk_size=7': data.seq_len=32"),
    (GOOD + "grid: {ttt.chunk_size: [8, 8]}\n", "several variants named chunk_size=8"),
    (GOOD + "variants: {a: 3}\n", r"variants\.a=3"),
    ("name: q\nbase: base.yaml\nseeds: [1, 1]\n", r"seeds=\[1, 1\]"),
    (
      GOOD + "variants: {a: {}}\nprobe: {lenghts: [8]}\n",
      "probe has lenghts; it has lengths, block",
    ),
    (GOOD + "variants: {a: {}}\nprobe: {lengths: 8}\n", "lengths=8 must be a list of integers"),
    (GOOD + "variants: {a: {}}\nprobe: {block: 0.5}\n", r"probe\.block=0.5 must be an integer"),
    (GOOD + "variants: {a: {}}\nprobe: {block: 0}\n", r"probe\.block=0 must be positive"),
    (GOOD + "variants: {a: {}}\nrecall: true\n", "recall=True must be of type int"),
    (GOOD + "variants: {a: {}}\nrecall: 0\n", "recall=0 must be positive"),
    (GOOD + "variants: {a: {}}\nreference: b\n", "reference='b' is no variant; .* are 'a'"),
    ("name: q\nbase: other.yaml\nseeds: [1]\nvariants: {a: {}}\n", "no config file other.yaml"),
  ],
)
def test_mistakes_are_found_before_anything_runs(here, text, message, capsys):
  _write(text)
  assert cli.main(["ablate", "question.yaml"]) == 2
  assert not Path("runs").exists()
  with pytest.raises(ValueError, match=message):
    load_ablation("question.yaml")


def test_runs_report_and_go_on(here, capsys, monkeypatch):
  """One variant works and one cannot; the same command again runs only that one."""
  Path("text").mkdir()
  rng = np.random.default_rng(0)
  for i in range(8):
    Path(f"text/{i}.txt").write_bytes(bytes(rng.integers(97, 120, 200).tolist()))
  _write(
    GOOD
    + "set: {data.path: text}\nvariants: {works: {ttt.decay: 0.5}, fails: {data.path: nowhere}}\n"
    + "probe: {lengths: [8, 24], block: 8, documents: 2}\n"
  )
  assert cli.main(["ablate", "question.yaml"]) == 1
  said = capsys.readouterr().out
  assert "1/2  works, seed 0: held-out loss" in said
  assert "2/2  fails, seed 0: failed: ttt-jax train: data.path='nowhere'" in said
  found = json.loads(Path("runs/q/ablation.json").read_text())
  assert [row["seeds"] for row in found["variants"]] == [[0], []]
  summary = json.loads(Path("runs/q/works/seed0/summary.json").read_text())
  assert found["variants"][0]["loss"] == pytest.approx(summary["heldout_loss"])
  assert found["variants"][0]["state_numbers"] == 16 * 24
  probe = json.loads(Path("runs/q/works/seed0/probe/perplexity.json").read_text())
  updating = [row["loss"] for row in probe["by_context"] if row["mode"] == "updating"]
  assert [row["context"] for row in found["variants"][0]["by_context"]] == [8, 24]
  assert [row["loss"] for row in found["variants"][0]["by_context"]] == updating
  assert found["failed"][0]["variant"] == "fails"
  assert Path("runs/q/ablation.png").stat().st_size > 10_000

  started = []

  def start(command, **_):
    started.append(command[-1])
    return SimpleNamespace(returncode=1)

  monkeypatch.setattr(runs.subprocess, "run", start)
  assert cli.main(["ablate", "question.yaml"]) == 1
  assert started == ["runs/q/fails/seed0/config.yaml"]
  assert cli.main(["ablate", "question.yaml", "--report-only"]) == 0
  assert cli.main(["ablate", "question.yaml", "--ttt.decay", "0.7"]) == 2
  assert "holds a run of another config" in capsys.readouterr().err
  other = _write(Path("question.yaml").read_text().replace("documents: 2}", "documents: 1}"))
  assert cli.main(["ablate", str(other)]) == 2
  assert "has no finished run" in capsys.readouterr().err
  # The probe alone is made again, of fewer documents: its command ends with its seed.
  assert started[1:] == ["0", "runs/q/fails/seed0/config.yaml"]


def _recall(config, right, window=8):
  rows = [{"from": 0, "to": 8, "queries": 5, "right": r} for r in right]
  report = {"window": window, "by_distance": {"updates on": rows, "updates off": []}}
  path = Path(config.resolved_run_dir, "recall", "recall.json")
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(report))


def test_what_was_recalled(here, monkeypatch):
  """Trained runs are evaluated, then the report has the mean over the seeds."""
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0, 1]\nvariants: {a: {}, b: {}}\nrecall: 8\n")
  )
  for _, config in ablation.runs():
    open_run(config.resolved_run_dir, config, may_change=())
    _finish(config, [1.0])
  asked = []

  def ask(command, **_):
    asked.append(command[3:])
    return SimpleNamespace(returncode=1)

  monkeypatch.setattr(runs.subprocess, "run", ask)
  assert len(run_all(ablation, Console(quiet=True))) == 4
  words = ["--window", "8", "--out", "runs/q/b/seed0/recall"]
  assert asked[1] == ["eval", "recall", "runs/q/b/seed0", *words]
  for _, config in ablation.runs():
    _recall(config, [0.1, 0.1], window=16)  # of another question
  with pytest.raises(ValueError, match="no finished run"):
    report(ablation, {})
  for config, right in zip(ablation.variants[0].configs, (0.5, 1.0)):
    _recall(config, [right, None])
  found = report(ablation, {})
  assert found["variants"][0]["by_distance"] == [
    {"from": 0, "to": 8, "queries": 10, "right": 0.75, "rights": [0.5, 1.0]},
    {"from": 0, "to": 8, "queries": 10, "right": None, "rights": [None, None]},
  ]
  assert found["variants"][1] == {"variant": "b", "seeds": []}
  plot_ablation(found, here / "a.png")


def _finish(config, losses):
  """Writes the files of a run that the report loads."""
  path = Path(config.resolved_run_dir)
  path.mkdir(parents=True, exist_ok=True)
  summary = {
    "heldout_loss": None if None in losses else float(np.mean(losses)),
    "heldout_loss_updates_off": 3.0,
    "params": 100,
    "tokens_per_second": 50.0,
    "heldout_by_position": [
      {"from": i, "to": i + 1, "loss": loss, "loss_updates_off": 3.0}
      for i, loss in enumerate(losses)
    ],
  }
  (path / "summary.json").write_text(json.dumps(summary))


def test_report_of_several_seeds(here):
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0, 1, 2]\ngrid: {ttt.decay: [0.5, 0.9, 1.0]}\n")
  )
  with pytest.raises(ValueError, match="no finished run"):
    report(ablation, {})
  first, second, _ = ablation.variants
  for config, shift in zip(first.configs, (0.0, 0.3, 0.9)):
    _finish(config, [2.0 + shift, 1.0 + shift])
  _finish(second.configs[0], [None, 1.0])
  found = report(ablation, {})
  row, diverged, unfinished = found["variants"]
  assert row["loss"] == pytest.approx(1.9)
  assert [part["loss"] for part in row["by_position"]] == pytest.approx([2.4, 1.4])
  # t of two degrees of freedom is 4.303; the deviation of 0, 0.3, 0.9 is 0.4583.
  assert row["high"] - row["loss"] == pytest.approx(4.303 * 0.4583 / 3**0.5, rel=1e-3)
  assert row["loss"] - row["low"] == pytest.approx(row["high"] - row["loss"])
  assert diverged["loss"] is None
  assert unfinished == {"variant": "decay=1.0", "seeds": []}
  plot_ablation(found, here / "a.png")
  assert draw_ablation(found).axes[0].get_title(loc="left") == "q (1 to 3 seeds)"
  diverged_alone = found | {"variants": [diverged, unfinished]}
  assert draw_ablation(diverged_alone).axes[0].get_title(loc="left") == "q (1 seed)"
  _finish(second.configs[1], [1.0, 1.0])
  _finish(second.configs[2], [1.0, 1.0])
  assert draw_ablation(report(ablation, {})).axes[0].get_title(loc="left") == "q (3 seeds)"


def test_the_numbers_of_a_state_are_those_of_its_rule(here):
  _write(
    GOOD
    + "variants: {sum: {}, squares: {ttt.rule: least_squares}, "
    + "projected: {ttt.rule: least_squares, ttt.key_rank: 10}, none: {ttt.layers: []}}\n"
  )
  ablation = load_ablation("question.yaml")
  for _, config in ablation.runs():
    _finish(config, [2.0, 1.0])
  numbers = {row["variant"]: row["state_numbers"] for row in report(ablation, {})["variants"]}
  f, d = 24, 16
  assert numbers == {
    "sum": f * d,
    "squares": f * (f + d),
    "projected": 10 * (10 + d),
    "none": 0,
  }


def test_differences_are_of_pairs_with_one_seed(here):
  """Differences cancel the seed's effect: the losses of the variants overlap, their differences do not."""
  ablation = load_ablation(
    _write(
      "name: q\nbase: base.yaml\nseeds: [5, 6, 7]\nreference: plain\n"
      "variants: {better: {ttt.decay: 0.5}, plain: {}, other: {}, none: {}}\n"
    )
  )
  better, plain, other, _ = ablation.variants
  for config, seed, gain in zip(plain.configs, (0.0, 0.4, 0.8), (0.1, 0.2, 0.3)):
    _finish(config, [2.0 + seed, 1.0 + seed])
    _finish(better.configs[plain.configs.index(config)], [2.0 + seed, 1.0 + seed - gain])
  _finish(other.configs[2], [3.0, None])
  found = report(ablation, {})
  gained, base, one, none = found["variants"]
  assert gained["low"] < base["loss"] < gained["high"]
  assert gained["difference"] == pytest.approx(-0.1)
  # t of two degrees of freedom is 4.303; the deviation of 0.05, 0.1, 0.15 is 0.05.
  half = 4.303 * 0.05 / 3**0.5
  assert gained["difference_low"] == pytest.approx(-0.1 - half, rel=1e-3)
  assert gained["difference_high"] == pytest.approx(-0.1 + half, rel=1e-3)
  assert [part["difference"] for part in gained["by_position"]] == pytest.approx([0.0, -0.2])
  assert one["difference"] is None
  assert [part["difference"] for part in one["by_position"]] == [pytest.approx(3.0 - 2.8), None]
  assert one["by_position"][0]["difference_low"] is None
  assert "difference" not in base
  assert none == {"variant": "none", "seeds": []}
  titles = [axes.get_title(loc="left") for axes in draw_ablation(found).axes]
  assert titles == ["q (1 to 3 seeds)", "", "less than 'plain', same seed"]
  drawn = draw_ablation(found).axes[2].get_lines()
  assert drawn[0].get_ydata() == pytest.approx([0.0, 0.2])


def test_nothing_is_compared_with_a_reference_that_is_not_finished(here):
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0]\nreference: b\nvariants: {a: {}, b: {}}\n")
  )
  _finish(ablation.variants[0].configs[0], [1.0])
  found = report(ablation, {})
  assert "difference" not in found["variants"][0]
  assert len(draw_ablation(found).axes) == 2


def test_interval_of_one_value():
  assert interval([1.0]) == (None, None)


@pytest.mark.parametrize(
  ("question", "message"),
  [
    (
      "probe: {lengths: [8, 190], block: 16}",
      r"variant 'b': the longest of probe.lengths and the probe.block behind it=206 is longer than each",
    ),
    (
      "probe: {lengths: [8], block: 8, reset_every: [8, 12]}",
      r"variant 'a': probe.reset_every=12 is not a multiple of ttt.chunk_size=8",
    ),
    ("recall: 8", "variant 'a': the documents hold no pair twice"),
  ],
)
def test_questions_that_documents_cannot_answer_are_refused_before_training(
  here, monkeypatch, question, message
):
  """A missing corpus is no error of the check; the run reports it."""
  for name, size in (("long", 300), ("short", 200)):
    Path(name).mkdir()
    for i in range(8):
      Path(f"{name}/{i}.txt").write_text("to read is to learn " * (size // 20))
  ablation = load_ablation(
    _write(
      GOOD
      + "variants: {nowhere: {data.path: none}, a: {data.path: long}, b: {data.path: short}}\n"
      + question
    )
  )
  monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: pytest.fail("was run"))
  with pytest.raises(ValueError, match=message):
    run_all(ablation, Console(quiet=True))


def test_a_run_that_another_grid_is_at_is_waited_for_and_left_alone(here, monkeypatch):
  """Two calls share a grid: no run is done twice, no log is overwritten, both report everything."""
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0]\nvariants: {a: {}, b: {}}\n")
  )
  (_, a), (_, b) = ablation.runs()
  for config in (a, b):
    open_run(config.resolved_run_dir, config, may_change=())
  other = FileLock(Path(a.resolved_run_dir).with_suffix(".lock"), thread_local=False)
  other.acquire()
  log = Path(a.resolved_run_dir).with_suffix(".log")
  log.write_text("the other's words")
  started = []

  def start(command, **_):
    started.append(command[-1])
    _finish(b, [1.0])
    _finish(a, [2.0])  # by the other one, meanwhile
    other.release()
    return SimpleNamespace(returncode=0)

  monkeypatch.setattr(runs.subprocess, "run", start)
  assert run_all(ablation, Console(quiet=True)) == {}
  assert started == ["runs/q/b/seed0/config.yaml"]
  assert log.read_text() == "the other's words"


def test_a_run_that_another_grid_finished_meanwhile(here, monkeypatch):
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0]\nvariants: {a: {}, b: {}}\n")
  )
  (_, a), (_, b) = ablation.runs()
  started = []

  def start(command, **_):
    started.append(command[-1])
    _finish(a, [1.0])
    _finish(b, [2.0])  # by another ttt-jax ablate
    return SimpleNamespace(returncode=0)

  monkeypatch.setattr(runs.subprocess, "run", start)
  assert run_all(ablation, Console(quiet=True)) == {}
  assert started == ["runs/q/a/seed0/config.yaml"]


def test_an_evaluation_of_half_a_training_is_no_finished_run(here):
  ablation = load_ablation(_write("name: q\nbase: base.yaml\nseeds: [0]\nvariants: {a: {}}\n"))
  ((_, config),) = ablation.runs()
  _finish(config, [1.0])
  path = Path(config.resolved_run_dir) / "summary.json"
  for steps, is_finished in ((1, False), (2, True)):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps}))
    assert runs.finished(ablation, config) == is_finished


def test_groups_of_devices_run_side_by_side(here, monkeypatch):
  """Every run is given one group's devices, and no group two runs at a time."""
  ablation = load_ablation(
    _write("name: q\nbase: base.yaml\nseeds: [0, 1]\ngrid: {ttt.decay: [0.5, 0.9, 1.0]}\n")
  )
  busy, seen = set(), []

  def run(variant, config, groups, environment):
    group = groups.get()
    assert group not in busy
    busy.add(group)
    seen.append((config.resolved_run_dir, group))
    _finish(config, [1.0, 1.0])
    busy.remove(group)
    groups.put(group)

  monkeypatch.setattr(runs, "_run", run)
  assert run_all(ablation, Console(quiet=True), device_groups=("0,1", "2,3")) == {}
  assert len({where for where, _ in seen}) == 6
  assert {group for _, group in seen} <= {"0,1", "2,3"}


def test_what_a_run_beside_others_is_told(here, monkeypatch):
  """A run has its devices; the user's settings stay."""
  ablation = load_ablation(_write("name: q\nbase: base.yaml\nseeds: [0]\nvariants: {a: {}}\n"))
  told = []

  def start(command, env, **_):
    told.append((env.get("CUDA_VISIBLE_DEVICES"), env.get("OPENBLAS_NUM_THREADS")))
    return SimpleNamespace(returncode=1)

  monkeypatch.setattr(runs.subprocess, "run", start)
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
  run_all(ablation, Console(quiet=True))
  run_all(ablation, Console(quiet=True), device_groups=("2,3",))
  assert told == [(None, "4"), ("2,3", "4")]


def test_runs_share_what_they_compile(here, monkeypatch):
  """Runs share compiled programs in a temporary directory, or in the user's, which stays."""
  ablation = load_ablation(_write("name: q\nbase: base.yaml\nseeds: [0, 1]\nvariants: {a: {}}\n"))
  told = []

  def start(command, env, **_):
    where = Path(env["JAX_COMPILATION_CACHE_DIR"])
    assert where.is_dir()
    (where / f"program{len(told)}").touch()
    told.append(where)
    return SimpleNamespace(returncode=1)

  monkeypatch.setattr(runs.subprocess, "run", start)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  run_all(ablation, Console(quiet=True))
  assert len(set(told)) == 1
  assert len(told) == 2
  assert not told[0].exists()
  Path("mine").mkdir()
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
  run_all(ablation, Console(quiet=True))
  assert sorted(p.name for p in Path("mine").iterdir()) == ["program2", "program3"]
