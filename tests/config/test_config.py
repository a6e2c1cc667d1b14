"""Tests every check that needs no device, and every file under configs/."""

import dataclasses
from pathlib import Path

import jax
import pytest

from ttt_jax.checkpoints.resolve import make_model, resolve
from ttt_jax.config import (
  AttendBlocks,
  AttentionConfig,
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  TTTConfig,
  WeightedSource,
)
from ttt_jax.config.yaml import dump_config, load_config
from ttt_jax.extras.ablation import load_ablation
from ttt_jax.nn.transformer import count_parameters
from ttt_jax.parallel.mesh import make_mesh

# The model that a config with `init_from` names, which is not there.
PRETRAINED = {
  "models/smollm2.gguf": ModelConfig(
    vocab_size=49152, num_layers=30, d_model=576, d_ff=1536, num_heads=9, num_kv_heads=3
  )
}
ALL = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ABLATIONS = [path for path in ALL if path.name.startswith("ablation_")]
CONFIGS = [path for path in ALL if path not in ABLATIONS]


def test_a_field_of_fast_weights_without_any_is_refused():
  with pytest.raises(ValueError, match=r"ttt\.chunk_size=8 is given, but the model has no fast"):
    Config(ttt=TTTConfig(chunk_size=8))
  Config(ttt=TTTConfig(layers=(), chunk_size=8))  # none, and said so


def test_there_are_configs():
  assert "quickstart.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_parses_and_builds(path):
  config = load_config(path)
  command = "plan" if config.plan.mode == "prefill" else "train"
  assert path.read_text().startswith(f"# ttt-jax {command} configs/{path.name}")
  assert config.name == path.stem
  if config.init_from is not None:
    # Either the checkpoint says what the model is, or the config does, so that it can be planned without.
    model = PRETRAINED.get(config.init_from, config.model)
    assert config.model in (ModelConfig(dtype=config.model.dtype), model)
    config = dataclasses.replace(config, model=model, init_from=None)
  model = jax.eval_shape(lambda: make_model(config))
  logits = jax.eval_shape(
    lambda m: m(jax.numpy.zeros((1, config.data.seq_len), jax.numpy.int32)), model
  )
  assert logits.shape == (1, config.data.seq_len, config.model.vocab_size)


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.name)
def test_ablation_parses(path):
  ablation = load_ablation(path)
  assert path.read_text().startswith(f"# ttt-jax ablate configs/{path.name}\n")
  assert ablation.name == path.stem
  assert len(ablation.seeds) >= 3
  computed = {dump_config(v.configs[0]).split("\nruntime", 1)[1] for v in ablation.variants}
  assert len(computed) == len(ablation.variants)  # no variant is another one by a new name


def test_quickstart_is_what_the_readme_says():
  config = load_config(CONFIGS[[p.name for p in CONFIGS].index("quickstart.yaml")])
  model = jax.eval_shape(lambda: make_model(config))
  assert 500_000 <= count_parameters(model) <= 2_000_000
  assert config.mesh.size == 8
  assert config.runtime.cpu_devices == 8
  assert config.data.seq_len >= 4096
  assert config.attention.window <= 128
  assert 64 <= config.ttt.chunk_size <= 512


def of_two(*weights):
  return tuple(WeightedSource(name, weight) for name, weight in zip("ab", weights))


@pytest.mark.parametrize(
  ("section", "fields", "message"),
  [
    (DataConfig, {"mixture": of_two(1.0, -0.5)}, r"data\.mixture\[1\]\.weight=-0\.5 must be"),
    (DataConfig, {"mixture": of_two(0.0, 0.0)}, r"data\.mixture has no weight above 0"),
    (
      DataConfig,
      {"mixture": of_two(1.0, 1.0), "path": "c"},
      r"data\.path='c' and data\.mixture excl",
    ),
    (DataConfig, {"max_bad_records": -1}, r"data\.max_bad_records=-1 must not be negative"),
    (MeshConfig, {"context": 0}, r"mesh\.context=0 must be positive"),
    (MeshConfig, {"data": -1, "fsdp": -1}, r"several -1"),
    (
      ModelConfig,
      {"remat": "full"},
      r"model\.remat='full' is not one of 'none', 'layer', 'minimal'",
    ),
    (TrainConfig, {"accumulate": 0}, r"train\.accumulate=0 must be positive"),
    (TrainConfig, {"z_loss": -1e-4}, r"train\.z_loss=-0\.0001 must not be negative"),
    (ModelConfig, {"num_heads": 5}, r"model\.num_kv_heads=4 does not divide model\.num_heads=5"),
    (ModelConfig, {"dtype": "fp8"}, r"model\.dtype='fp8' is not one of 'float32'"),
    (ModelConfig, {"head_dim": 7}, r"model\.head_dim=7 must be even"),
    (AttentionConfig, {"window": 0}, r"attention\.window=0 must be positive"),
    (AttentionConfig, {"implementation": "magic"}, r"attention\.implementation='magic'"),
    (TTTConfig, {"decay": 1.5}, r"ttt\.decay=1\.5 must be in \(0, 1\]"),
    (TTTConfig, {"half_life": 0.0}, r"ttt\.half_life=0\.0 must be positive"),
    (TTTConfig, {"half_life": 9.0, "decay": 0.5}, r"ttt\.half_life=9\.0 and ttt\.decay=0\.5"),
    (TTTConfig, {"clip_norm": 0.0}, r"ttt\.clip_norm=0\.0 must be positive"),
    (TTTConfig, {"conv_width": 4}, r"ttt\.conv_width=4 must be odd"),
    (TTTConfig, {"target": "logits"}, r"ttt\.target='logits' is not one of 'input_embed'"),
    (TTTConfig, {"implementation": "fast"}, r"ttt\.implementation='fast'"),
    (TTTConfig, {"collective": "mail"}, r"ttt\.collective='mail'"),
    (DataConfig, {"heldout_fraction": 1.0}, r"data\.heldout_fraction=1\.0"),
    (DataConfig, {"attend": "block"}, r"data\.attend='block' is neither 'document' nor \{block"),
    (
      DataConfig,
      {"attend": AttendBlocks((8, 4))},
      r"data\.attend\.block=\[8, 4\] must be \[a, b\]",
    ),
    (DataConfig, {"attend_fraction": 0.5}, r"data\.attend_fraction=0\.5 .* give data\.attend="),
    (
      DataConfig,
      {"attend": AttendBlocks((4, 8)), "attend_fraction": 0.0},
      r"data\.attend_fraction=0\.0 must be above 0",
    ),
  ],
)
def test_a_field_out_of_range_is_named(section, fields, message):
  with pytest.raises(ValueError, match=message):
    section(**fields)


@pytest.mark.parametrize(
  ("sections", "message"),
  [
    (
      {"data": DataConfig(seq_len=1000), "ttt": TTTConfig(layers=(0,))},
      r"data\.seq_len=1000 is not a multiple of .* = 1 \* 512 = 512.*data\.seq_len=1024",
    ),
    (
      {"mesh": MeshConfig(context=3)},
      r"mesh\.context=3 does not divide data\.seq_len=4096",
    ),
    (
      {"mesh": MeshConfig(context=8), "ttt": TTTConfig(layers=(0,), chunk_size=1024)},
      r"data\.seq_len=4096 is not a multiple of .* = 8 \* 1024",
    ),
    (
      {"attention": AttentionConfig(window=4097)},
      r"attention\.window=4097 is larger than data\.seq_len=4096",
    ),
    ({"ttt": TTTConfig(layers=(4,))}, r"ttt\.layers=\[4\] names layer 4.*use 0 to 3"),
    ({"attention": AttentionConfig(full_layers=(9,))}, r"attention\.full_layers=\[9\]"),
    ({"mesh": MeshConfig(data=2)}, r"train\.batch_size=1 is not a multiple of .* = 2"),
    (
      {"train": TrainConfig(batch_size=6, accumulate=2), "mesh": MeshConfig(data=-1, fsdp=2)},
      r"train\.batch_size=6 is not a multiple of .* = 4",
    ),
    (
      {"data": DataConfig(attend=AttendBlocks((500, 1000))), "ttt": TTTConfig(layers=(0,))},
      r"data\.attend\.block=\[500, 1000\] is not whole chunks of .*512.*: use \[512, 1024\]",
    ),
    (
      {"data": DataConfig(attend=AttendBlocks((4096, 8192)))},
      r"data\.attend\.block=\[4096, 8192\] cuts no row of data\.seq_len=4096",
    ),
    ({"mesh": MeshConfig(tensor=8)}, r"mesh\.tensor=8 does not divide model\.num_heads=4"),
    (
      {
        "mesh": MeshConfig(tensor=4),
        "ttt": TTTConfig(layers=(1,), rule="least_squares", key_rank=10),
      },
      r"mesh\.tensor=4 does not divide ttt\.key_rank=10",
    ),
    (
      {"mesh": MeshConfig(tensor=4), "model": ModelConfig(num_kv_heads=2)},
      r"mesh\.tensor=4 does not divide model\.num_kv_heads=2",
    ),
    (
      {"mesh": MeshConfig(tensor=2), "model": ModelConfig(d_ff=287)},
      r"mesh\.tensor=2 does not divide model\.d_ff=287",
    ),
    (
      {"mesh": MeshConfig(tensor=2), "model": ModelConfig(vocab_size=257)},
      r"mesh\.tensor=2 does not divide model\.vocab_size=257",
    ),
    (
      {"mesh": MeshConfig(fsdp=5), "train": TrainConfig(batch_size=5)},
      r"mesh\.fsdp=5 does not divide model\.d_model=96",
    ),
  ],
)
def test_sections_that_do_not_fit_together(sections, message):
  with pytest.raises(ValueError, match=message):
    Config(**sections)


def test_more_devices_than_there_are():
  with pytest.raises(
    ValueError, match=r"needs 16 devices, but there are 8.*runtime\.cpu_devices=16"
  ):
    make_mesh(MeshConfig(context=16))
  with pytest.raises(ValueError, match=r"needs 4 devices, but there are 8.*size -1"):
    make_mesh(MeshConfig(data=2, tensor=2))


def test_one_axis_takes_the_rest():
  config = resolve(Config(mesh=MeshConfig(context=2, fsdp=-1), train=TrainConfig(batch_size=4)))
  assert config.mesh == MeshConfig(context=2, fsdp=4)
  assert make_mesh(config.mesh).shape == {"data": 1, "fsdp": 4, "context": 2, "tensor": 1}
  with pytest.raises(ValueError, match=r"mesh\.data=-1: the other axes need 3 devices .* are 8"):
    make_mesh(MeshConfig(data=-1, context=3))
  with pytest.raises(ValueError, match=r"train\.batch_size=2 is not a multiple of .* = 4"):
    resolve(Config(mesh=MeshConfig(context=2, fsdp=-1), train=TrainConfig(batch_size=2)))
  with pytest.raises(ValueError, match=r"mesh\.context=8 does not divide data\.seq_len=100"):
    resolve(Config(mesh=MeshConfig(context=-1), data=DataConfig(seq_len=100)))


def test_the_twin_differs_in_the_ttt_layers_alone():
  config = Config(ttt=TTTConfig(layers=(1,)))
  twin = config.without_ttt()
  assert twin.ttt.layers == ()
  assert dataclasses.replace(twin, ttt=config.ttt) == config
