"""Defines the configuration of a run: frozen dataclasses, their defaults and every check that needs no JAX.

A config file under `configs/` lists the fields that differ from these defaults. No module of this package
imports JAX, so a config is loaded and checked before any device is used. Sizes are in tokens unless a field
says otherwise.
"""

from ttt_jax.config.checks import DTYPES
from ttt_jax.config.machine import MeshConfig, PlanConfig, RuntimeConfig
from ttt_jax.config.model import AttentionConfig, ModelConfig, RopeScaling
from ttt_jax.config.run import (
  Config,
  check_attend,
  check_layers,
  check_mesh,
  check_trainable,
  check_ttt_fields,
)
from ttt_jax.config.training import (
  AttendBlocks,
  CheckpointConfig,
  DataConfig,
  EvalConfig,
  TrainConfig,
  WeightedSource,
)
from ttt_jax.config.ttt import TTTConfig

__all__ = [
  "DTYPES",
  "AttendBlocks",
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
  "check_attend",
  "check_layers",
  "check_mesh",
  "check_trainable",
  "check_ttt_fields",
]
