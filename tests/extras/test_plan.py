"""Tests plans for CPU devices, which need no libtpu, and for a TPU slice if libtpu is installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest

from ttt_jax.cli import main
from ttt_jax.config import (
  AttentionConfig,
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.config.yaml import dump_config, make_config
from ttt_jax.errors import UserError
from ttt_jax.extras.plan import command, plan
from ttt_jax.extras.plan.command import swept_meshes
from ttt_jax.extras.plan.planner import _too_large
from ttt_jax.extras.plan.topology import Topology, open_topology
from ttt_jax.extras.plan.traced import TracedArray
from ttt_jax.training.flops import training_flops

CONFIG = Config(
  mesh=MeshConfig(data=2, context=4),
  model=ModelConfig(vocab_size=64, num_layers=4, d_model=32, d_ff=96, num_heads=4, num_kv_heads=2),
  ttt=TTTConfig(layers=(1, 3), chunk_size=16, decay=0.9, collective="ring"),
  data=DataConfig(seq_len=256),
  train=TrainConfig(batch_size=4),
)


pytestmark = pytest.mark.usefixtures("standard_promotion")


def changed(**sections):
  return dataclasses.replace(
    CONFIG,
    **{
      name: dataclasses.replace(getattr(CONFIG, name), **fields)
      for name, fields in sections.items()
    },
  )


def here(hbm_gib: float = 1.0) -> Topology:
  return Topology("eight CPU devices", jax.devices(), hbm_gib)


@pytest.fixture(scope="module")
def planned():
  return plan(CONFIG, here())


def test_what_a_plan_says(planned):
  assert (planned.devices, planned.mode, planned.fits) == (8, "train", True)
  assert planned.mesh == {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}
  assert planned.tokens_per_step == 4 * 256
  memory = planned.hbm_per_device_gib
  # Parameters and both moments of Adam, in float32, whole on every device.
  assert memory["arguments"] * 2**30 == pytest.approx(3 * 4 * planned.params, rel=0.02)
  assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"])
  assert memory["temporaries"] > 0
  assert planned.flops_per_device * 8 > training_flops(CONFIG)
  step = planned.step_seconds
  terms = {name: step[name] for name in ("compute", "memory", "communication")}
  assert step["bound"] == max(terms.values()) == terms[step["limit"]]
  assert planned.tokens_per_second == pytest.approx(4 * 256 / step["bound"])
  assert 0 < planned.mfu_bound < 1
  json.dumps(planned._asdict(), allow_nan=False)


def test_the_exchange_of_fast_weights_is_what_the_method_promises(planned):
  """`ring` sends a state per layer and pass, `all_to_all` `2 S (P-1)/P`; nothing else is as large."""
  state = 2 * 96 * 32 * 4  # two rows a device
  other = plan(changed(ttt={"collective": "all_to_all"}), here())
  for of_one, kind, promised in (
    (planned, "collective-permute", state),
    (other, "all-to-all", 2 * state * 3 // 4),
  ):
    sent = [
      entry
      for entry in of_one.collectives
      if (entry["part"], entry["kind"], entry["axis"]) == ("fast weights", kind, "context")
    ]
    assert sum(entry["bytes"] for entry in sent) == pytest.approx(2 * 2 * promised, rel=0.05)


def test_over_context_only_keys_and_values_are_gathered(planned):
  gathered = [
    (entry["part"], entry["bytes"])
    for entry in planned.collectives
    if entry["kind"] == "all-gather" and "context" in entry["axis"]
  ]
  # What else there is, are a few numbers: decays and documents.
  assert max(gathered, key=lambda x: x[1])[0] == "keys and values"
  activation = 2 * 64 * 32 * 4
  assert all(size < activation for part, size in gathered if part != "keys and values")


def test_memory_falls_with_the_context_axis():
  long = {"data": {"seq_len": 4096}, "train": {"batch_size": 1}}
  sizes = [
    plan(changed(mesh={"data": 1, "context": n}, **long), here_of(n)).hbm_per_device_gib
    for n in (1, 8)
  ]
  assert sizes[0]["temporaries"] > 2 * sizes[1]["temporaries"]


def here_of(devices: int) -> Topology:
  return Topology(f"{devices} CPU devices", jax.devices()[:devices], 1.0)


def test_without_fast_weights_and_with_too_little_memory(planned):
  without = plan(CONFIG.without_ttt(), here(1e-6))
  assert not without.fits
  assert without.flops_per_device < planned.flops_per_device
  assert not any(entry["part"] == "fast weights" for entry in without.collectives)


@pytest.mark.parametrize("window", [None, 24])
def test_prefill(window):
  """A prefill splits keys and values over heads, fast weights over F."""
  config = changed(
    mesh={"data": 1, "context": 4, "tensor": 2},
    data={"seq_len": 9984},
    train={"batch_size": 2},
  )
  config = dataclasses.replace(config, attention=AttentionConfig(window=window))
  planned = plan(config, here(), mode="prefill")
  assert planned.mode == "prefill"
  assert planned.tokens_per_step >= 2 * 9984
  slots = 10240 if window is None else window
  cache = 4 * 2 * 2 * slots * 1 * 8 * 4  # layers, k and v, rows, one head of the two
  memory = planned.hbm_per_device_gib["arguments"] * 2**30
  assert cache < memory < cache + 4 * planned.params + 2e5


def test_the_compilers_own_words_when_there_is_no_room():
  message = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(54.63G) exceeds available HBM (15.75G)."
  )
  known = {
    "topology": "v5e:2x2",
    "devices": 4,
    "mesh": {"fsdp": 4},
    "mode": "train",
    "params": 1,
    "tokens_per_step": 1,
    "hbm_limit_gib": 15.75,
    "flops_per_device": 1.0,
  }
  arrays = [
    TracedArray(6 * 2**30, "float32[64,32768,3072]", "mlp/btd,df->btf"),
    TracedArray(2**30, "float32[64,1024,32000]", "head/btd,dv->btv"),
  ]
  planned = _too_large(message, known, arrays, 3.0)
  assert not planned.fits
  assert planned.hbm_per_device_gib == {"total": 54.63}
  assert [buffer.gib for buffer in planned.largest] == [6, 1]
  assert "train.accumulate" in planned.largest[0].remedy
  assert "mesh.tensor splits the vocabulary" in planned.largest[1].remedy


def test_swept_meshes():
  config = changed(mesh={"data": 1, "context": 1, "tensor": 2}, train={"batch_size": 8})
  shapes = [mesh.shape for mesh in swept_meshes(config, 16)]
  assert shapes == [(1, 8, 1, 2), (1, 4, 2, 2), (1, 2, 4, 2), (1, 1, 8, 2)]
  with pytest.raises(ValueError, match=r"finds no mesh: 7 devices .*batch_size=8 rows"):
    swept_meshes(config, 7)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v9:2x2", r"plan\.topology='v9:2x2' is none that is known: use one of v5e:2x2, .*v5p:4x4x4"),
    ("v5p", "is none that is known"),
  ],
)
def test_a_topology_that_does_not_exist(name, message):
  with pytest.raises(ValueError, match=message):
    open_topology(name)


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'ttt_jax\[tpu\]'"):
    open_topology("v5e:2x2")


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / "tiny.yaml"
  path.write_text(dump_config(CONFIG))
  return path


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "plan.topology is not set"),
    (["--topology", "v9:1x7"], "v9:1x7"),
    (["--plan.mode", "decode"], "plan.mode='decode'"),
    (["--topologie", "v5e:2x2"], "topologie"),
  ],
)
def test_mistakes_are_one_line(config_file, words, message, monkeypatch, capsys):
  monkeypatch.setattr("ttt_jax.extras.plan.topology.prepare_environment", lambda: None)
  assert main(["plan", str(config_file), *words]) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("ttt-jax plan: ")


SHAPES = {
  "vocab_size": 256,
  "num_layers": 4,
  "d_model": 96,
  "d_ff": 288,
  "num_heads": 4,
  "num_kv_heads": 4,
  "dtype": "float32",
  "param_dtype": "float32",
}


def test_a_checkpoint_that_is_not_here_needs_all_shapes(monkeypatch):
  """A shape or dtype at its default counts if it is given; one that is not given is never assumed."""
  assert {name: getattr(ModelConfig(), name) for name in SHAPES} == SHAPES
  resolved = []
  monkeypatch.setattr(command, "resolve", lambda config, devices: resolved.append(config) or config)
  monkeypatch.setattr(command, "plan", lambda *_, **options: None)

  def planned(shapes):
    config = make_config({"init_from": "somebody/model", "model": shapes})
    unchecked = getattr(command._plan, "__wrapped__", command._plan)
    return unchecked(config, "v5e:2x2", "train", 1)

  planned(SHAPES)
  assert resolved[0].init_from is None
  assert resolved[0].model == ModelConfig()
  for name in SHAPES:
    rest = {other: value for other, value in SHAPES.items() if other != name}
    with pytest.raises(UserError, match=rf"somebody/model.* does not give model\.{name}:"):
      planned(rest)


with_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu] has it"
)


def run(*words):
  """Runs `plan` in a new process, since libtpu reads its environment when it is loaded."""
  command = [sys.executable, "-m", "ttt_jax.cli", "plan", *map(str, words)]
  return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@with_libtpu
def test_a_slice_by_name(tmp_path):
  path = tmp_path / "tiny.yaml"
  config = changed(
    model={"d_model": 256, "d_ff": 512, "head_dim": 128, "num_heads": 2, "dtype": "bfloat16"},
    mesh={"data": 1},
    ttt={"chunk_size": 128},
    data={"seq_len": 2048},
  )
  path.write_text(dump_config(config))
  result = run(path, "--topology", "v5e:2x2", "--json")
  assert result.returncode == 0, result.stderr
  planned = json.loads(result.stdout)
  assert planned["fits"]
  assert planned["hbm_limit_gib"] == 15.75
  assert {"fast weights", "keys and values"} <= {x["part"] for x in planned["collectives"]}
  assert 0 < planned["mfu_bound"] < 1
  result = run(
    path, "--topology", "v5e:2x2", "--data.seq_len", "1048576", "--train.batch_size", "64"
  )
  assert result.returncode == 1, result.stderr
  assert "it does not fit; its largest buffers" in result.stdout
  assert "GiB  " in result.stdout
  result = run(path, "--topology", "v5e:1x7")
  assert result.returncode == 2
  assert "plan.topology='v5e:1x7' is no slice" in result.stderr
