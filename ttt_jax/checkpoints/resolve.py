"""Completes a config and makes the model that a run starts from: new, or pretrained (`init_from`).

A checkpoint sets the model's sections with `init_from`, and a recorded config sets them when a run is
evaluated. `resolve` and `resolve_run` fill these into the config, so that all later code, and the recorded
config, see a complete config.
"""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from ttt_jax.checkpoints.files import is_gguf, local_path
from ttt_jax.checkpoints.hf import load_checkpoint, open_checkpoint, resolve_sections
from ttt_jax.checkpoints.sections import (
  Fields,
  Sections,
  check_init,
  given_sections,
  with_given_fields,
)
from ttt_jax.config import Config, check_attend, check_layers, check_mesh, check_trainable
from ttt_jax.config.recorded import recorded_config
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.trees import named_leaves


def resolve(config: Config, devices: int | None = None) -> Config:
  """Fills in the sections of the model that `init_from` names, and the -1 of the mesh.

  Given fields of `model`, `attention` and `ttt` count (`ttt_jax.checkpoints.sections`); all other fields
  are the checkpoint's. So are the dtypes: a model that is stored in bfloat16 is trained and evaluated in
  bfloat16, with the optimiser's master copy in `train.master_dtype`.

  Args:
    config: the config to complete.
    devices: the number of devices to use, which this machine need not have; None: all of this machine.

  Raises:
    UserError: a given field of `model` or `attention` contradicts the checkpoint and neither stretches its
      positions (`model.rope_scaling`, `rope_theta`, `max_positions`) nor sets how it is computed; a layer
      does not exist; the mesh does not fit the devices, the rows or the model; the checkpoint cannot be
      loaded, as in `load_pretrained`.
  """
  config = _with_mesh(config, jax.device_count() if devices is None else devices)
  if config.init_from is None:
    return config
  path = Path(config.init_from).expanduser()
  if is_gguf(path) and not path.is_file():
    raise UserError(  # a name with this suffix is not a hub name
      f"init_from={config.init_from!r} does not exist: give the path of a GGUF file"
    )
  checkpoint = open_checkpoint(local_path(config.init_from))
  given = given_sections(config)
  source = f"the model of init_from={config.init_from!r}"
  return _with_sections(config, resolve_sections(checkpoint, given, source=source))


def resolve_run(config: Config) -> Config:
  """Returns the config that evaluates the run in `run_dir`: the model's sections are the recorded ones.

  Raises:
    UserError: there is no run; as `resolve`.
  """
  config = _with_mesh(config, jax.device_count())
  return _with_sections(config, run_sections(config.resolved_run_dir, given_sections(config)))


def run_sections(run_dir: str | Path, given: Fields) -> Sections:
  """Returns a run's recorded sections with the given fields over them (`ttt_jax.checkpoints.sections`).

  Raises:
    UserError: there is no run; as `with_given_fields`.
  """
  recorded = recorded_config(run_dir)
  trained = Sections(recorded.model, recorded.attention, recorded.ttt)
  source = f"the run in {run_dir}"
  sections = with_given_fields(trained, given, source=source)
  check_layers(*sections)
  # In a run, null means a new model's; `resolve` has replaced the null of a pretrained one.
  check_init(given.get("ttt", {}), trained.ttt.init or "next_token", source)
  # The other sections' given fields have no part in the shapes.
  if sections.ttt != trained.ttt and _parameter_shapes(sections) != _parameter_shapes(trained):
    changed = [
      f"ttt.{name}={value!r}"
      for name, value in given.get("ttt", {}).items()
      if getattr(sections.ttt, name) != getattr(trained.ttt, name)
    ]
    raise UserError(
      f"{', '.join(changed)} would change which parameters the model has, but the run in {run_dir} was "
      f"trained with ttt.layers={list(trained.ttt.layers)}: convert the run (ttt-jax convert), and give "
      "the fields there"
    )
  return sections


def _parameter_shapes(sections: Sections) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by path."""
  model = jax.eval_shape(lambda: Transformer(*sections, rngs=nnx.Rngs(0)))
  return {name: leaf.shape for name, leaf in named_leaves(model).items()}


def _with_mesh(config: Config, devices: int) -> Config:
  if -1 not in config.mesh.shape:
    return config
  return dataclasses.replace(config, mesh=config.mesh.filled(devices))


def _with_sections(config: Config, sections: Sections) -> Config:
  check_trainable(sections.ttt, config.train)
  check_mesh(sections.model, sections.ttt, config.mesh)
  check_attend(config.data, sections.ttt)
  return dataclasses.replace(config, **sections._asdict())


def make_model(config: Config) -> Transformer:
  """Makes a new model of a resolved config from its seed."""
  return Transformer(config.model, config.attention, config.ttt, rngs=nnx.Rngs(config.seed))


def initial_model(config: Config, mesh: Mesh) -> Transformer:
  """Makes or loads the model of a resolved config as it is before the first step, on the mesh.

  Raises:
    UserError: as `load_pretrained`.
  """
  if config.init_from is None:

    def make() -> Transformer:
      return make_model(config)

    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()
  checkpoint = open_checkpoint(local_path(config.init_from))
  return load_checkpoint(
    checkpoint, Sections(config.model, config.attention, config.ttt), mesh=mesh
  )
