"""Where a run starts: new parameters from a seed, or those of a pretrained model (`init_from`).

With `init_from` the checkpoint decides what the model is, and an evaluated run decides what its own is.
`resolve` fills that into the config, so that everything after it, the recorded config included, sees one
whole config of either kind.
"""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from ttt_jax.checkpoints.files import is_gguf, local_path
from ttt_jax.checkpoints.hf import load_checkpoint, open_checkpoint, resolve_sections
from ttt_jax.checkpoints.sections import Fields, Sections, agreed, given_sections
from ttt_jax.config import Config, check_layers, check_mesh, check_trainable
from ttt_jax.config.recorded import recorded_config
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings
from ttt_jax.parallel.trees import named_leaves


def resolve(config: Config) -> Config:
  """The config with the model that `init_from` names in its sections, and the mesh of all devices.

  A field of `model`, `attention` or `ttt` that was given counts (`ttt_jax.checkpoints.sections`); all
  others are the checkpoint's.

  Raises:
    UserError: a given field of `model` or `attention` is not the checkpoint's value, and none that
      stretches its positions (`model.rope_scaling`, `rope_theta`, `max_positions`) or says how it is
      computed; layers that do not exist; a mesh that does not fit the devices, the rows or the model; as
      `load_pretrained` for what cannot be read.
  """
  return resolve_for(config, jax.device_count())


def resolve_for(config: Config, devices: int) -> Config:
  """`resolve` for so many devices, which need not be here."""
  config = _with_mesh(config, devices)
  if config.init_from is None:
    return config
  path = Path(config.init_from).expanduser()
  if is_gguf(path) and not path.is_file():
    raise UserError(f"init_from={config.init_from!r} does not exist")  # nor is it a hub name
  checkpoint = open_checkpoint(local_path(config.init_from))
  given = given_sections(config)
  given["model"] = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype} | given[
    "model"
  ]
  source = f"the model of init_from={config.init_from!r}"
  return _with_sections(config, resolve_sections(checkpoint, given, source=source))


def resolve_run(config: Config) -> Config:
  """The config by which the run in `run_dir` is evaluated: its model is what the run recorded.

  Raises:
    UserError: there is no run; as `resolve`.
  """
  config = _with_mesh(config, jax.device_count())
  return _with_sections(config, run_sections(config.resolved_run_dir, given_sections(config)))


def run_sections(run_dir: str | Path, given: Fields) -> Sections:
  """What the model of a run is, with the given fields over it (`ttt_jax.checkpoints.sections`).

  Raises:
    UserError: there is no run; as `agreed`.
  """
  recorded = recorded_config(run_dir)
  own = Sections(recorded.model, recorded.attention, recorded.ttt)
  sections = agreed(own, given, source=f"the run in {run_dir}")
  check_layers(*sections)
  if _parameters(sections) != _parameters(own):
    changed = [
      f"ttt.{name}={value!r}"
      for name, value in given.get("ttt", {}).items()
      if getattr(sections.ttt, name) != getattr(own.ttt, name)
    ]
    raise UserError(
      f"{', '.join(changed)}: the model has other parameters then, and the run in {run_dir} holds those of "
      f"ttt.layers={list(own.ttt.layers)}: write it as a model of its own (ttt-jax convert), and give the "
      "fields there"
    )
  return sections


def _parameters(sections: Sections) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter by its path."""
  model = jax.eval_shape(lambda: Transformer(*sections, rngs=nnx.Rngs(0)))
  return {name: leaf.shape for name, leaf in named_leaves(model).items()}


def _with_mesh(config: Config, devices: int) -> Config:
  if -1 not in config.mesh.shape:
    return config
  return dataclasses.replace(config, mesh=config.mesh.filled(devices))


def _with_sections(config: Config, sections: Sections) -> Config:
  check_trainable(sections.ttt, config.train)
  check_mesh(sections.model, config.mesh)
  return dataclasses.replace(config, **sections._asdict())


def make_model(config: Config) -> Transformer:
  """A new model of a resolved config, from its seed."""
  return Transformer(config.model, config.attention, config.ttt, rngs=nnx.Rngs(config.seed))


def initial_model(config: Config, mesh: Mesh) -> Transformer:
  """The model of a resolved config before the first step, on the mesh.

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
