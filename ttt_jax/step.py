"""One training step over the mesh: the state that it reads and replaces, and how both are made."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ttt_jax.config import Config
from ttt_jax.initial import initial_model, make_model
from ttt_jax.loss import mean_loss, model_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.optim import make_optimizer
from ttt_jax.sharding import sharding
from ttt_jax.trainable import trained_parameters, with_parameters


class TrainState(NamedTuple):
  """Everything a step reads and replaces."""

  model: Transformer
  opt_state: Any
  step: Int[Array, ""]  # steps done


class Batch(NamedTuple):
  tokens: Int[Array, "B T"]
  labels: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"]


def init_state(config: Config, mesh: Mesh) -> TrainState:
  """The parameters before the first step and fresh optimiser state, made on the mesh."""
  model = initial_model(config, mesh)
  start = jax.jit(
    lambda parameters: (make_optimizer(config.train).init(parameters), jnp.zeros((), jnp.int32)),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
  return TrainState(model, *start(trained_parameters(model, config.train.trainable)))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of `init_state`, without computing it."""
  replicated = NamedSharding(mesh, PartitionSpec())

  def make() -> TrainState:
    model = make_model(config)
    parameters = trained_parameters(model, config.train.trainable)
    return TrainState(model, make_optimizer(config.train).init(parameters), jnp.int32(0))

  shapes = jax.eval_shape(make)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  optimizer: optax.GradientTransformation,
  trainable: str,
) -> tuple[TrainState, dict[str, Any]]:
  """One step of gradient descent on the mean loss of a batch, in the parameters that train.

  Pure; jit it under `jax.set_mesh`.
  """

  def loss(parameters: dict[str, Array]) -> tuple[Float[Array, ""], Any]:
    model = with_parameters(state.model, parameters)
    losses, valid, stats = model_losses(model, batch.tokens, batch.labels, batch.segment_ids)
    return mean_loss(losses, valid), stats

  parameters = trained_parameters(state.model, trainable)
  (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(parameters)
  with jax.named_scope("optimizer"):
    updates, opt_state = optimizer.update(grads, state.opt_state, parameters)
    model = with_parameters(state.model, optax.apply_updates(parameters, updates))
  metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "ttt": stats}
  return TrainState(model, opt_state, state.step + 1), metrics


def jit_train_step(config: Config, mesh: Mesh) -> Callable:
  """`train_step`, compiled for the mesh, to be called (or lowered) under `jax.set_mesh(mesh)`.

  The state passed in is donated.
  """
  return jax.jit(
    partial(train_step, optimizer=make_optimizer(config.train), trainable=config.train.trainable),
    donate_argnums=0,
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )


def put_batch(rows: dict[str, Any], mesh: Mesh) -> Batch:
  """Host rows `[B, T]` on the mesh."""
  where = sharding(mesh, "batch", "sequence")
  return Batch(*(jax.device_put(rows[name], where) for name in Batch._fields))
