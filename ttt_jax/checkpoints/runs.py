"""The model of a run's newest checkpoint, without the trainer: what generation and evaluation open."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoints.orbax import open_checkpoints
from ttt_jax.checkpoints.resolve import make_model
from ttt_jax.config import Config
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings


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
