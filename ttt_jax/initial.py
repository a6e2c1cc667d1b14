"""Where a run starts: new parameters from a seed, or those of a pretrained model (`init_from`).

With `init_from` the checkpoint decides what the model is. `resolve` fills that into the config, so
that everything after it, the recorded config included, sees one whole config of either kind.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from ttt_jax.config import Config, TTTConfig, check_layers, check_mesh, check_trainable
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.partition import shardings
from ttt_jax.pretrained.files import local_path
from ttt_jax.pretrained.hf_config import read_config
from ttt_jax.pretrained.load import load_pretrained, open_checkpoint, own_ttt

# Fields that say how a model is computed, which a checkpoint has no say in.
_HOW_COMPUTED = ("param_dtype", "dtype", "state_dtype", "remat", "implementation", "balance")
# Fields that may differ from the checkpoint's, so that it reads further than it was trained for.
_READS_FURTHER = ("rope_theta", "rope_scaling", "max_positions")


def resolve(config: Config) -> Config:
  """The config with the model that `init_from` names in its sections, and the mesh of all devices.

  A checkpoint's own fast weights count where the config's section `ttt` is empty.

  Raises:
    ValueError: a field of `model` or `attention` is neither its default nor the checkpoint's value,
      and none that stretches its positions (`model.rope_scaling`, `rope_theta`, `max_positions`);
      layers that do not exist; a mesh that does not fit the devices, the rows or the model; as
      `load_pretrained` for what cannot be read.
  """
  return resolve_for(config, jax.device_count())


def resolve_for(config: Config, devices: int) -> Config:
  """`resolve` for so many devices, which need not be here."""
  if -1 in config.mesh.shape:
    config = dataclasses.replace(config, mesh=config.mesh.filled(devices))
  if config.init_from is None:
    return config
  if config.init_from.endswith(".gguf") and not Path(config.init_from).expanduser().is_file():
    raise UserError(f"init_from={config.init_from!r} does not exist")  # nor is it a hub name
  checkpoint = open_checkpoint(local_path(config.init_from))
  there = read_config(checkpoint.config, generation=checkpoint.generation)
  ttt = config.ttt
  if ttt == TTTConfig():
    ttt = own_ttt(checkpoint)
  if ttt.layers and ttt.init is None:
    ttt = dataclasses.replace(ttt, init="identity")  # as `load_pretrained` does
  resolved = dataclasses.replace(
    config,
    model=_agreed("model", config.model, there.model, config.init_from),
    attention=_agreed("attention", config.attention, there.attention, config.init_from),
    ttt=ttt,
  )
  check_layers(resolved.model, resolved.attention, resolved.ttt)
  check_trainable(resolved.ttt, resolved.train)
  check_mesh(resolved.model, resolved.mesh)
  return resolved


def _agreed(section: str, given: Any, there: Any, init_from: str) -> Any:
  """The checkpoint's section, but for how it is computed; `given` may not contradict it."""
  computed = {}
  for field in dataclasses.fields(given):
    value, stored = getattr(given, field.name), getattr(there, field.name)
    if field.name in _HOW_COMPUTED or (field.name in _READS_FURTHER and value != field.default):
      computed[field.name] = value
    elif value != field.default and not _equal(value, stored):
      raise UserError(
        f"{section}.{field.name}={value!r}, but the model of init_from={init_from!r} has "
        f"{stored!r}: leave the field out"
      )
  return dataclasses.replace(there, **computed)


def _equal(value: Any, stored: Any) -> bool:
  if isinstance(value, float) and isinstance(stored, float):
    return math.isclose(value, stored, rel_tol=1e-6)  # GGUF stores float32
  return value == stored


def make_model(config: Config) -> Transformer:
  """A new model of a resolved config, from its seed."""
  return Transformer(config.model, config.attention, config.ttt, rngs=nnx.Rngs(config.seed))


def initial_model(config: Config, mesh: Mesh) -> Transformer:
  """The model of a resolved config before the first step, on the mesh.

  Raises:
    ValueError: as `load_pretrained`.
  """
  if config.init_from is None:

    def make() -> Transformer:
      return make_model(config)

    return jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()
  loaded = load_pretrained(
    config.init_from,
    dtype=config.model.dtype,
    param_dtype=config.model.param_dtype,
    mesh=mesh,
    ttt=config.ttt,
  )
  # The same parameters in a model that computes as the config says.
  structure = jax.tree.structure(jax.eval_shape(lambda: make_model(config)))
  return jax.tree.unflatten(structure, jax.tree.leaves(loaded))
