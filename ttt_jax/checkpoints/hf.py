"""Loads pretrained weights into a model, tensor by tensor, straight onto their shardings.

The model's shapes come from `jax.eval_shape`; only parameters that the checkpoint lacks are initialised.
Parameters of stacked layers start as zeros on their sharding, and a donated update writes each layer into
them. The host holds one tensor at a time.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from ttt_jax.checkpoints.files import (
  CONFIG,
  GENERATION_CONFIG,
  StoredTensor,
  gguf_models,
  is_gguf,
  load_json,
  local_path,
  open_tensors,
)
from ttt_jax.checkpoints.hf_config import need_integer, parse_config
from ttt_jax.checkpoints.sections import Fields, Sections, check_init, with_given_fields
from ttt_jax.checkpoints.tensors import (
  EMBEDDING,
  HEAD,
  TensorMapping,
  named_parameters,
  tensor_table,
)
from ttt_jax.checkpoints.ttt_config import parse_published, parse_section
from ttt_jax.config import DTYPES, TTTConfig, check_layers
from ttt_jax.config.given import given_fields
from ttt_jax.config.recorded import CONFIG_FILE as RUN_CONFIG
from ttt_jax.errors import UserError
from ttt_jax.nn.fast_mlp import LEARNED
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings

_MAX_NAMED = 20  # mismatches that an error lists
_TTT_TENSORS = tuple(
  f".mlp.{name}"
  for name in ("ttt_conv.weight", "ttt_proj.weight", *(f"ttt_{log}" for log in LEARNED))
)
# Constants of the rotary embedding that some checkpoints store; the model forms them itself.
_ROTARY_CONSTANTS = tuple(
  f".rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
)


class Checkpoint(NamedTuple):
  """Describes a checkpoint on disk, whatever its format; tensors are loaded when they are used."""

  name: str  # its path, for messages
  config: dict[str, Any]
  generation: dict[str, Any]
  tensors: dict[str, StoredTensor]


def load_pretrained(
  path: str | Path,
  *,
  dtype: str | None = None,
  param_dtype: str | None = None,
  mesh: Mesh | None = None,
  ttt: TTTConfig | Mapping[str, Any] | None = None,
) -> Transformer:
  """Loads the model of a Hugging Face directory, a GGUF file or a hub name.

  Args:
    path: a directory with config.json and safetensors of a Llama, Mistral, Qwen2 or Qwen3 model, with or
      without fast weights in the published format; a `.gguf` file of a Llama, any part of a split file, or
      a directory with just one GGUF model; or the name of a model on the hub, if there is no such path.
    dtype: the dtype of the computation, "float32", "bfloat16" or "float64". None: the widest dtype of the
      stored tensors, so that nothing is lost (float32 for float16 and GGUF).
    param_dtype: the dtype of the parameters; None: `dtype`.
    mesh: the mesh over which `ttt_jax.parallel.parameters` splits the parameters; None: one device.
    ttt: which MLPs get fast weights. A `TTTConfig` replaces the checkpoint's section; a mapping of fields,
      as `{"chunk_size": 256}`, overrides single fields. Tensors of TTT layers are loaded if the checkpoint
      has them; others start as `ttt.init` says, by default so that the logits equal those of the plain
      model bit for bit.

  Raises:
    UnsupportedError: an architecture, rope type, quantisation or feature is not supported.
    UserError: a file is damaged; tensors are missing, unknown, of another shape (all are listed) or not
      finite; the checkpoint has fast weights but its config does not say how they learn; `ttt` has an
      unknown field.
  """
  checkpoint = open_checkpoint(local_path(path))
  if param_dtype is None:
    param_dtype = dtype
  given: dict[str, Any] = {"model": {"dtype": dtype, "param_dtype": param_dtype}}
  section = ttt if isinstance(ttt, TTTConfig) else None
  if section is None and ttt is not None:
    given["ttt"] = ttt
  sections = resolve_sections(checkpoint, given, ttt=section)
  return load_checkpoint(checkpoint, sections, mesh=mesh, allow_new_ttt=ttt is not None)


def resolve_sections(
  checkpoint: Checkpoint, given: Fields, *, source: str | None = None, ttt: TTTConfig | None = None
) -> Sections:
  """Returns a checkpoint's sections with the given fields over them (`ttt_jax.checkpoints.sections`).

  Args:
    given: fields by section; `dtype` and `param_dtype` of `model` are those of the stored tensors unless
      they are given: the widest, so that nothing is lost (float32 for float16 and GGUF).
    source: the checkpoint in messages.
    ttt: replaces the checkpoint's own section.

  Raises:
    UserError: as `with_given_fields`; the checkpoint has fast weights but its config does not say how they
      learn.
  """
  source = checkpoint.name if source is None else source
  model = dict(given.get("model", {}))
  stored = _widest_dtype(
    tensor.dtype
    for name, tensor in checkpoint.tensors.items()
    if not name.endswith(_ROTARY_CONSTANTS)
  )
  for name in ("dtype", "param_dtype"):
    if model.get(name) is None:
      model[name] = stored
  for name in ("dtype", "param_dtype"):
    if model[name] not in DTYPES:
      raise UserError(f"{name}={model[name]!r} is not one of {', '.join(map(repr, DTYPES))}")
    if model[name] == "float64" and not jax.config.jax_enable_x64:
      raise UserError(f"{name}='float64' needs jax_enable_x64: set it, or give {name}='float32'")
  architecture = parse_config(checkpoint.config, generation=checkpoint.generation)
  if ttt is not None:
    base = ttt
  elif "layers" in given.get("ttt", {}):
    base = _ttt_from_config(checkpoint) or TTTConfig()
  else:
    base = _ttt_or_default(checkpoint)
  sections = Sections(architecture.model, architecture.attention, base)
  sections = with_given_fields(sections, {**given, "model": model}, source=source)
  check_layers(*sections)
  if sections.ttt.layers and not _layers_without_tensors(checkpoint, sections.ttt.layers):
    stored = base if ttt is None else _stored_or(checkpoint, ttt)
    fields = given.get("ttt", {}) if ttt is None else given_fields(ttt)
    check_init(fields, stored.init or "identity", source)
  is_given = ttt is not None or bool(given.get("ttt"))
  if sections.ttt.layers and sections.ttt.init is None and is_given:
    sections = sections._replace(ttt=dataclasses.replace(sections.ttt, init="identity"))
  return sections


def load_checkpoint(
  checkpoint: Checkpoint,
  sections: Sections,
  *,
  mesh: Mesh | None = None,
  allow_new_ttt: bool = True,
) -> Transformer:
  """Loads the weights of a checkpoint into the model of resolved sections.

  Args:
    mesh: as in `load_pretrained`.
    allow_new_ttt: whether parameters of TTT layers that the checkpoint lacks are initialised.

  Raises:
    UserError: as `load_pretrained`.
  """
  if sections.model.tie_embeddings:
    checkpoint = checkpoint._replace(tensors=_with_tied_embedding(checkpoint.tensors))

  def make() -> Transformer:
    return Transformer(*sections, rngs=nnx.Rngs(0))

  abstract = jax.eval_shape(make)
  mappings = tensor_table(abstract)
  _check_tensors(checkpoint, mappings, allow_new_ttt=allow_new_ttt)
  placement = dict.fromkeys(named_parameters(abstract))
  if mesh is not None:
    placement = named_parameters(shardings(abstract, mesh))
  fresh = {mapping.parameter for mapping in mappings if mapping.name not in checkpoint.tensors}
  values = _new_parameters(make, fresh, placement)
  _load_tensors(values, abstract, checkpoint, mappings, placement)
  leaves = [values[name] for name in named_parameters(abstract)]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def open_checkpoint(path: Path) -> Checkpoint:
  """Opens the checkpoint at a path without loading its weights."""
  if path.is_dir():
    if not (path / CONFIG).is_file() and (models := gguf_models(path)):
      raise UserError(
        f"{path} has no {CONFIG} but {len(models)} GGUF files, {', '.join(x.name for x in models[:5])}"
        f"{', ...' if len(models) > 5 else ''}: give the path of one"
      )
    if not (path / CONFIG).is_file() and (path / RUN_CONFIG).is_file():
      raise UserError(
        f"{path} is a run directory of `ttt-jax train`: make a checkpoint of it with `ttt-jax convert "
        f"{path} NEW_DIRECTORY`"
      )
    generation = path / GENERATION_CONFIG
    return Checkpoint(
      str(path),
      load_json(path / CONFIG),
      load_json(generation) if generation.is_file() else {},
      open_tensors(path),
    )
  if is_gguf(path):
    from ttt_jax.checkpoints.gguf import open_gguf

    config, tensors = open_gguf(path)
    return Checkpoint(str(path), config, {}, tensors)
  raise UserError(
    f"{path} is neither a directory nor a .gguf file: give the directory that holds {CONFIG} and the "
    "safetensors"
  )


def _widest_dtype(dtypes: Iterable[np.dtype]) -> str:
  """Returns the widest of float64, float32 and bfloat16; float16 needs float32 to keep its bits."""
  names = {np.dtype(dtype).name for dtype in dtypes}
  if "float64" in names:
    return "float64"
  return "bfloat16" if names == {"bfloat16"} else "float32"


def _with_tied_embedding(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
  """Names the table of a tied model as the embedding, if it is stored only under the head's name."""
  if EMBEDDING in tensors or HEAD not in tensors:
    return tensors
  return {EMBEDDING if name == HEAD else name: stored for name, stored in tensors.items()}


def _ttt_from_config(checkpoint: Checkpoint) -> TTTConfig | None:
  """Returns the section ttt that the checkpoint's config.json describes; None if it describes none."""
  ttt = parse_section(checkpoint.config)
  if ttt is not None:
    return ttt
  num_layers = need_integer(checkpoint.config, "num_hidden_layers")
  ttt, beyond = parse_published(checkpoint.config, num_layers)
  if beyond:
    warnings.warn(
      f"{checkpoint.name}: ttt_layers names {beyond}, beyond num_hidden_layers={num_layers}: "
      "ignored, as the published code does",
      stacklevel=4,
    )
  return ttt


def _stored_or(checkpoint: Checkpoint, ttt: TTTConfig) -> TTTConfig:
  """Returns the section ttt of a checkpoint; `ttt` if its config.json has none or contradicts itself."""
  try:
    return _ttt_from_config(checkpoint) or ttt
  except UserError:
    return ttt


def _ttt_or_default(checkpoint: Checkpoint) -> TTTConfig:
  """Returns the section ttt of a checkpoint; the default if it has no fast weights.

  Raises:
    UserError: the checkpoint has tensors of fast weights, but its config does not describe them.
  """
  ttt = _ttt_from_config(checkpoint)
  stored = [name for name in checkpoint.tensors if name.endswith(_TTT_TENSORS)]
  if ttt is None and stored:
    layers = sorted({int(name.split(".")[2]) for name in stored})
    raise UserError(
      f"{checkpoint.name} has fast weights ({stored[0]} and {len(stored) - 1} more) but its "
      "config.json does not say how they learn (no ttt_mode): pass ttt=TTTConfig(layers="
      f"{tuple(layers)}, chunk_size=..., inner_lr=..., ...), in a config file the section ttt, or "
      "ttt=TTTConfig() to ignore them"
    )
  return TTTConfig() if ttt is None else ttt


def _layers_without_tensors(checkpoint: Checkpoint, layers: Iterable[int]) -> list[int]:
  """Returns the layers of which the checkpoint has no tensor of fast weights."""
  stored = {int(name.split(".")[2]) for name in checkpoint.tensors if name.endswith(_TTT_TENSORS)}
  return [layer for layer in layers if layer not in stored]


def _check_tensors(
  checkpoint: Checkpoint, mappings: tuple[TensorMapping, ...], *, allow_new_ttt: bool
) -> None:
  """Raises UserError with a line for every tensor that is missing, unknown or of another shape."""
  stored = checkpoint.tensors
  lines = []
  for mapping in mappings:
    if mapping.name not in stored:
      if not (allow_new_ttt and mapping.is_ttt):
        lines.append(f"{mapping.name}: {list(mapping.shape)} expected, missing in the checkpoint")
    elif stored[mapping.name].shape != mapping.shape:
      found = list(stored[mapping.name].shape)
      lines.append(f"{mapping.name}: {list(mapping.shape)} expected, {found} in the checkpoint")
  expected = {mapping.name for mapping in mappings}
  unused = [
    name for name in stored if name not in expected and not name.endswith(_ROTARY_CONSTANTS)
  ]
  if HEAD in unused and EMBEDDING in stored:
    _check_tied(checkpoint)
    unused.remove(HEAD)
  ignored = [name for name in unused if allow_new_ttt and name.endswith(_TTT_TENSORS)]
  if ignored:
    warnings.warn(
      f"{checkpoint.name}: left out, because ttt does not use them: {', '.join(ignored)}",
      stacklevel=3,
    )
  lines += [
    f"{name}: {list(stored[name].shape)} in the checkpoint, not expected"
    for name in unused
    if name not in ignored
  ]
  if lines:
    rest = len(lines) - _MAX_NAMED
    shown = lines[:_MAX_NAMED] + ([f"and {rest} more"] if rest > 0 else [])
    raise UserError(
      f"{checkpoint.name}: {len(lines)} tensor{'s do' if len(lines) > 1 else ' does'} not fit the model "
      "of its config.json\n  " + "\n  ".join(shown)
    )


def _check_tied(checkpoint: Checkpoint) -> None:
  """Raises UserError unless a head stored beside a tied embedding equals the embedding."""
  head, table = (checkpoint.tensors[name] for name in (HEAD, EMBEDDING))
  if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
    raise UserError(
      f"{checkpoint.name} stores a {HEAD} that differs from {EMBEDDING}, but tie_word_embeddings is true: "
      "set it to false in config.json to use the head, or delete the tensor"
    )


def _new_parameters(make, names: set[str], placement: dict[str, Any]) -> dict[str, Array]:
  """Initialises the parameters `names` of a new model; the others are not computed."""
  if not names:
    return {}

  def chosen() -> dict[str, Array]:
    return {name: x for name, x in named_parameters(make()).items() if name in names}

  shared = {name: placement[name] for name in names}
  return jax.jit(chosen, out_shardings=None if None in shared.values() else shared)()


def _load_tensors(
  values: dict[str, Array],
  abstract: Transformer,
  checkpoint: Checkpoint,
  mappings: tuple[TensorMapping, ...],
  placement: dict[str, Any],
) -> None:
  """Loads every tensor into its place in `values`, the largest first, while most memory is free."""
  shapes = named_parameters(abstract)
  present = [mapping for mapping in mappings if mapping.name in checkpoint.tensors]
  finite = {}
  for mapping in sorted(present, key=lambda mapping: -np.prod(mapping.shape)):
    kind, stacked = shapes[mapping.parameter], mapping.repeat is not None
    if stacked and mapping.parameter not in values:
      values[mapping.parameter] = jnp.zeros(
        kind.shape, kind.dtype, device=placement[mapping.parameter]
      )
    value = mapping.to_parameter(checkpoint.tensors[mapping.name].read())
    sharding = _layer_sharding(placement[mapping.parameter], stacked=stacked)
    value = jax.device_put(value, sharding, may_alias=stacked)
    finite[mapping.name] = _all_finite(value)
    if stacked:
      values[mapping.parameter] = _write_layer(values[mapping.parameter], value, mapping.repeat)
    else:
      values[mapping.parameter] = value.astype(kind.dtype)
    del value
    jax.block_until_ready(values[mapping.parameter])  # so that the host never holds two tensors
  broken = [name for name, ok in finite.items() if not ok]
  if broken:
    raise UserError(
      f"{checkpoint.name}: {len(broken)} tensors hold NaN or infinities: {', '.join(broken[:_MAX_NAMED])}"
      f"{', ...' if len(broken) > _MAX_NAMED else ''}: the checkpoint is damaged or from a diverged run"
    )


def _layer_sharding(sharding: NamedSharding | None, *, stacked: bool) -> NamedSharding | None:
  """Returns the sharding of one layer of a parameter, so that each device receives only its part."""
  if sharding is None or not stacked:
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@jax.jit
def _all_finite(value: Array) -> Array:
  return jnp.all(jnp.isfinite(value))


@partial(jax.jit, donate_argnums=0)
def _write_layer(parameter: Array, value: Array, repeat: Int[Array, ""]) -> Array:
  """Returns the parameter with a layer's value written into it."""
  return jax.lax.dynamic_update_index_in_dim(parameter, value.astype(parameter.dtype), repeat, 0)
