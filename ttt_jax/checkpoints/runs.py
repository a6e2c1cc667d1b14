"""The model of a run's newest checkpoint, without the trainer: what generation and evaluation open."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoints.orbax import open_checkpoints
from ttt_jax.checkpoints.resolve import initial_model, make_model
from ttt_jax.config import Config
from ttt_jax.config.recorded import beginning, with_beginning
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.processes import from_main

BASELINE = "baseline"  # the twin's directory inside the run's


def abstract_model(config: Config, mesh: Mesh) -> Transformer:
  """Shapes, dtypes and shardings of a resolved config's model."""
  shapes = jax.eval_shape(lambda: make_model(config))
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    shapes,
    shardings(shapes, mesh),
  )


def load_model(config: Config, mesh: Mesh, run_dir: Path) -> Transformer:
  """The model of a run's newest checkpoint.

  Raises:
    UserError: there is no checkpoint, it is damaged, or another model's.
  """
  if not (run_dir / "checkpoints").is_dir():
    raise UserError(f"run_dir={str(run_dir)!r} has no checkpoints: train there first")
  abstract = {"model": abstract_model(config, mesh)}
  with open_checkpoints(config.checkpoint, run_dir) as checkpoints:
    return checkpoints.restore(abstract, partial=True)[1]["model"]


def evaluated_model(config: Config, mesh: Mesh, *, is_run: bool) -> Transformer:
  """The model of a run's newest checkpoint, or the pretrained one of a resolved config as it is."""
  if is_run:
    return load_model(config, mesh, Path(config.resolved_run_dir))
  return initial_model(config, mesh)


def as_begun(config: Config) -> Config:
  """The config of a run that goes on: null for the ends of documents is what the run began with.

  One that was begun by a version of ttt_jax without `data.end_of_text` so keeps its tokens: there it is
  false.
  """
  return with_beginning(config, from_main(lambda: beginning(config.resolved_run_dir)))
