"""Loads the model of a run's newest checkpoint, for generation and evaluation, without the trainer."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoints.orbax import open_checkpoints
from ttt_jax.checkpoints.resolve import initial_model, make_model
from ttt_jax.config import Config
from ttt_jax.config.recorded import recorded_data, with_recorded
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.processes import from_main

BASELINE = "baseline"  # the twin's directory inside the run's


def abstract_model(config: Config, mesh: Mesh) -> Transformer:
  """Returns the shapes, dtypes and shardings of a resolved config's model."""
  shapes = jax.eval_shape(lambda: make_model(config))
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    shapes,
    shardings(shapes, mesh),
  )


def load_model(config: Config, mesh: Mesh, run_dir: Path) -> Transformer:
  """Loads the model of a run's newest checkpoint.

  Raises:
    UserError: the run has no checkpoint, or one that is damaged or of another model.
  """
  if not (run_dir / "checkpoints").is_dir():
    raise UserError(f"run_dir={str(run_dir)!r} has no checkpoints: train there first")
  abstract = {"model": abstract_model(config, mesh)}
  with open_checkpoints(config.checkpoint, run_dir) as checkpoints:
    return checkpoints.restore(abstract, partial=True)[1]["model"]


def evaluated_model(config: Config, mesh: Mesh, *, is_run: bool) -> Transformer:
  """Loads the model of a run's newest checkpoint, or the initial model of a resolved config."""
  if is_run:
    return load_model(config, mesh, Path(config.resolved_run_dir))
  return initial_model(config, mesh)


def with_recorded_data(config: Config) -> Config:
  """Replaces null by the values that the run recorded, in the fields of `data` that keep its documents.

  A run of a version without `data.end_of_text` keeps its tokens: its value is false.
  """
  return with_recorded(config, from_main(lambda: recorded_data(config.resolved_run_dir)))
