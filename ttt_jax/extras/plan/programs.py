"""The programs of a run, traced for a mesh that need not exist: nothing is computed, nothing allocated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.config import Config
from ttt_jax.generation.generate import trace_read
from ttt_jax.parallel.mesh import sharding
from ttt_jax.training.step import Batch, abstract_state, jit_train_step


class Traced(NamedTuple):
  """A program to compile.

  Attributes:
    program: traced; lower and compile it under `jax.set_mesh`.
    tokens: that one run of it reads.
    runs: of it, in what the user calls a step.
  """

  program: jax.stages.Traced
  tokens: int
  runs: int


def trace_training(config: Config, mesh: Mesh) -> Traced:
  """The training step of `ttt_jax.training.loop`, of a resolved config."""
  shape = (config.train.batch_size, config.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, "batch", "sequence"))
  with jax.set_mesh(mesh):
    program = jit_train_step(config, mesh).trace(abstract_state(config, mesh), Batch(*[rows] * 3))
  return Traced(program, config.train.batch_size * config.data.seq_len, 1)


def trace_prefill(config: Config, mesh: Mesh) -> Traced:
  """What `generate` runs for every segment of prompts: `train.batch_size` rows of `data.seq_len` tokens."""
  rows, length = config.train.batch_size, config.data.seq_len
  model = jax.eval_shape(lambda: make_model(config))
  program, segment = trace_read(model, mesh, rows, length)
  return Traced(program, rows * segment, -(-length // segment))
