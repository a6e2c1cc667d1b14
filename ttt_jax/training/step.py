"""Defines one training step over the mesh, and its state, and makes both."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ttt_jax.checkpoints.resolve import initial_model, make_model
from ttt_jax.config import Config, TrainConfig
from ttt_jax.names import IGNORE
from ttt_jax.nn.fast_mlp import merge_stats
from ttt_jax.nn.loss import mean_loss, model_losses
from ttt_jax.nn.transformer import Transformer
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import constrain, rows_to_mesh, sharding
from ttt_jax.parallel.parameters import constrain_parameters, shardings
from ttt_jax.training.optimizer import learning_rate, make_optimizer
from ttt_jax.training.trainable import trained_parameters, with_parameters


class TrainState(NamedTuple):
  """Holds everything that a step takes and replaces.

  Attributes:
    model: in `model.param_dtype`.
    master: the parameters that train, in `train.master_dtype`; the model has rounded copies of them.
      None where the model's own are as wide.
    opt_state: the state of optax, for `master` (or the model's parameters without one).
    step: the number of steps done, skipped steps included.
    skipped: the number of steps whose loss or gradient was not finite; they changed only the counters.
    bad_in_a_row: the number of skipped steps since the last good one.
  """

  model: Transformer
  master: dict[str, Array] | None
  opt_state: Any
  step: Int[Array, ""]
  skipped: Int[Array, ""]
  bad_in_a_row: Int[Array, ""]


class Batch(NamedTuple):
  """Holds the rows of one step; without `data.attend` attention has the documents of the fast weights."""

  tokens: Int[Array, "B T"]
  labels: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"]
  attention_segment_ids: Int[Array, "B T"] | None = None


def new_state(config: Config, model: Transformer) -> TrainState:
  """Makes the state before the first step of training a model."""
  parameters = trained_parameters(model, config.train.trainable)
  master = None
  wide = jnp.dtype(config.train.master_dtype)
  if jnp.dtype(config.model.param_dtype).itemsize < wide.itemsize:
    master = {name: x.astype(wide) for name, x in parameters.items()}
  opt_state = make_optimizer(config.train).init(parameters if master is None else master)
  return TrainState(model, master, opt_state, *(jnp.zeros((), jnp.int32) for _ in range(3)))


def init_state(config: Config, mesh: Mesh) -> TrainState:
  """Makes the state before the first step on the mesh: parameters and fresh optimiser state."""
  model = initial_model(config, mesh)
  layout = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh)._replace(model=None))
  make = jax.jit(lambda model: new_state(config, model)._replace(model=None), out_shardings=layout)
  return make(model)._replace(model=model)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Returns shapes, dtypes and shardings of `init_state`, without computing it."""
  shapes = jax.eval_shape(lambda: new_state(config, make_model(config)))
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
    shapes,
    shardings(shapes, mesh),
  )


def train_step(
  state: TrainState, batch: Batch, *, config: Config
) -> tuple[TrainState, dict[str, Any]]:
  """Does one optimiser step on the mean loss of a batch, in the parameters that train.

  If the loss or a gradient is not finite, only the counters change. The function is pure; jit it under
  `jax.set_mesh`.

  Returns:
    The next state, and the metrics: `loss`, `grad_norm`, `update_norm` (0 if skipped), `learning_rate` of
    this update, `skipped` and `bad_in_a_row` after this step, and the fast weights' statistics, `ttt`.
  """
  loss, grads, stats = _gradients(state.model, batch, config.train)
  grad_norm = optax.tree.norm(grads)
  good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  # Beyond the limit every step counts as bad: the loop, which looks only at some steps, then sees it.
  good &= state.bad_in_a_row <= config.train.max_bad_steps
  with jax.named_scope("optimizer"):
    old = trained_parameters(state.model, config.train.trainable)
    wide = old if state.master is None else state.master
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, wide)
    updates, opt_state = make_optimizer(config.train).update(grads, state.opt_state, wide)
    wide, opt_state = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (optax.apply_updates(wide, updates), opt_state),
      (wide, state.opt_state),
    )
    rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, old)
  bad = (~good).astype(jnp.int32)
  new = TrainState(
    model=with_parameters(state.model, rounded),
    master=None if state.master is None else wide,
    opt_state=opt_state,
    step=state.step + 1,
    skipped=state.skipped + bad,
    bad_in_a_row=bad * (state.bad_in_a_row + 1),
  )
  metrics = {
    "loss": loss,
    "grad_norm": grad_norm,
    "update_norm": jnp.where(good, optax.tree.norm(updates), 0),
    # Optax counts updates, and a skipped step makes none.
    "learning_rate": learning_rate(config.train)(state.step - state.skipped),
    "skipped": new.skipped,
    "bad_in_a_row": new.bad_in_a_row,
    "ttt": stats,
  }
  return new, metrics


def _gradients(model: Transformer, batch: Batch, config: TrainConfig):
  """Returns the loss of a batch, its gradients in float32 or wider, and the `MlpStats`.

  `train.accumulate` splits the rows into so many parts. The mean is over all tokens of the whole batch
  with a label, so that the parts add up to the same numbers.
  """
  valid = (batch.labels != IGNORE).astype(jnp.float32)
  parameters = trained_parameters(model, config.trainable)

  @partial(jax.value_and_grad, has_aux=True)
  def loss(parameters: dict[str, Array], batch: Batch) -> tuple[Float[Array, ""], Any]:
    losses, _, stats = model_losses(
      with_parameters(model, parameters),
      batch.tokens,
      batch.labels,
      batch.segment_ids,
      batch.attention_segment_ids,
      z_loss=config.z_loss,
    )
    return mean_loss(losses, valid.astype(losses.dtype)), stats

  def widened(grads):
    return jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)

  if config.accumulate == 1:
    (value, stats), grads = loss(parameters, batch)
    return value, constrain_parameters(widened(grads)), stats

  def split(rows):
    """Cuts rows into parts, each with rows of every device, so that no row moves."""
    parts = rows.reshape(-1, config.accumulate, rows.shape[1]).swapaxes(0, 1)
    return constrain(parts, None, "batch", "sequence")

  def add(total, part):
    (value, stats), grads = loss(parameters, part)
    grads = constrain_parameters(widened(grads))
    return jax.tree.map(jnp.add, total, (value, grads)), stats

  zeros = constrain_parameters(widened(jax.tree.map(jnp.zeros_like, parameters)))
  initial = jnp.zeros((), accumulation_dtype(model.model.dtype)), zeros
  (value, grads), stats = jax.lax.scan(add, initial, jax.tree.map(split, batch))
  return value, grads, None if stats is None else merge_stats(stats)


def jit_train_step(config: Config, mesh: Mesh) -> Callable:
  """Jits `train_step` for the mesh; call or lower the result under `jax.set_mesh(mesh)`.

  The state that is passed in is donated.
  """
  state = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
  return jax.jit(
    partial(train_step, config=config), donate_argnums=0, out_shardings=(state, sharding(mesh))
  )


def put_batch(rows: dict[str, Any], mesh: Mesh) -> Batch:
  """Makes the batch on the mesh from the host rows of this process (`local_rows`)."""
  return Batch(**{name: rows_to_mesh(array, mesh, "sequence") for name, array in rows.items()})
