"""The configuration of a run: frozen dataclasses, their defaults and every check that needs no JAX.

A config file under `configs/` holds what differs from these defaults. Nothing here imports JAX, so a
config can be read and refused before a device is touched. Sizes in tokens unless said otherwise.
"""

from ttt_jax.config.checks import DTYPES
from ttt_jax.config.machine import MeshConfig, PlanConfig, RuntimeConfig
from ttt_jax.config.model import AttentionConfig, ModelConfig, RopeScaling, TTTConfig
from ttt_jax.config.run import Config, check_given, check_layers, check_mesh, check_trainable
from ttt_jax.config.training import (
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  TrainConfig,
  WeightedSource,
)

__all__ = [
  "DTYPES",
  "AttentionConfig",
  "CheckpointConfig",
  "Config",
  "DataConfig",
  "EvalConfig",
  "MeshConfig",
  "ModelConfig",
  "PlanConfig",
  "RopeScaling",
  "RuntimeConfig",
  "TTTConfig",
  "TrainConfig",
  "WeightedSource",
  "check_given",
  "check_layers",
  "check_mesh",
  "check_trainable",
]
