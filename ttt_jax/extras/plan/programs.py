"""Traces the programs of a run for a mesh that need not exist; nothing is computed or allocated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.config import Config
from ttt_jax.generation.programs import trace_read
from ttt_jax.parallel.mesh import sharding
from ttt_jax.training.step import Batch, abstract_state, jit_train_step


class Traced(NamedTuple):
  """Holds a traced program.

  Attributes:
    program: lower and compile it under `jax.set_mesh`.
    tokens: the number of tokens that one execution processes.
    runs: the number of executions in a step.
  """

  program: jax.stages.Traced
  tokens: int
  runs: int


def trace_training(config: Config, mesh: Mesh) -> Traced:
  """Traces the training step of `ttt_jax.training.loop` for a resolved config."""
  shape = (config.train.batch_size, config.data.seq_len)
  rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, "batch", "sequence"))
  with jax.set_mesh(mesh):
    program = jit_train_step(config, mesh).trace(
      abstract_state(config, mesh),
      Batch(*[rows] * (3 if config.data.attend_blocks is None else 4)),
    )
  return Traced(program, config.train.batch_size * config.data.seq_len, 1)


def trace_prefill(config: Config, mesh: Mesh) -> Traced:
  """Traces `generate`'s prefill of `train.batch_size` prompts of `data.seq_len` tokens, piece by piece."""
  rows, length = config.train.batch_size, config.data.seq_len
  model = jax.eval_shape(lambda: make_model(config))
  program, segment = trace_read(model, mesh, rows, length)
  return Traced(program, rows * segment, -(-length // segment))
