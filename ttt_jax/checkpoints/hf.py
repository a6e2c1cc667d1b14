"""Pretrained weights into a model, tensor by tensor, straight to where they belong.

The model is never initialised: its shapes come from `jax.eval_shape`, each parameter is made as zeros on
its sharding, and every tensor is written into it by a donated update. The host holds one at a time.
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
  local_path,
  open_tensors,
  read_json,
)
from ttt_jax.checkpoints.hf_config import need_integer, read_config
from ttt_jax.checkpoints.sections import Fields, Sections, agreed
from ttt_jax.checkpoints.tensors import EMBEDDING, HEAD, Row, named_parameters, tensor_table
from ttt_jax.checkpoints.ttt_config import read_published, read_section
from ttt_jax.config import DTYPES, TTTConfig, check_layers
from ttt_jax.errors import UserError
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.parameters import shardings

_MAX_NAMED = 20  # how many misfits an error spells out
_TTT_TENSORS = tuple(
  f".mlp.{name}"
  for name in ("ttt_conv.weight", "ttt_proj.weight", "ttt_log_rate", "ttt_log_half_life")
)
# Constants of the rotary embedding that some checkpoints store; the model forms them itself.
_DERIVED = tuple(
  f".rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
)


class Checkpoint(NamedTuple):
  """A checkpoint as it lies on the disk, of whatever format."""

  where: str  # in messages
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
  """The model of a Hugging Face directory, a GGUF file or a hub name, with its weights.

  Args:
    path: a directory with config.json and safetensors of a Llama, Mistral, Qwen2 or Qwen3 model, with or
      without fast weights in the published format; a `.gguf` file of a Llama, any part of a split one, or
      the directory of one alone; or the name of a model on the hub, asked only if there is no such path.
    dtype: of the computation, "float32", "bfloat16" or "float64". None: the widest that the tensors are
      stored in, so that nothing is lost (float32 for float16 and GGUF).
    param_dtype: of the parameters; None: `dtype`.
    mesh: where the parameters live, split as `ttt_jax.parallel.parameters` says; None: on one device.
    ttt: which MLPs get fast weights. A `TTTConfig` takes the place of what the checkpoint says, a mapping
      of its fields, as `{"chunk_size": 256}`, counts over it. Tensors of the TTT layers are used where the
      checkpoint has them; others start as `ttt.init` says, by default so that the logits are bit for
      bit those of the plain model.

  Raises:
    UnsupportedError: an architecture, a rope type, a quantisation or a feature that is not there.
    UserError: damaged files; tensors that are missing, unknown, of another shape (all are listed) or
      not finite; fast weights in the checkpoint that its config does not say how to use; an unknown
      field of `ttt`.
  """
  checkpoint = open_checkpoint(local_path(path))
  given: dict[str, Any] = {"model": {"dtype": dtype, "param_dtype": param_dtype}}
  whole = ttt if isinstance(ttt, TTTConfig) else None
  if whole is None and ttt is not None:
    given["ttt"] = ttt
  sections = resolve_sections(checkpoint, given, ttt=whole)
  return load_checkpoint(checkpoint, sections, mesh=mesh, fresh_allowed=ttt is not None)


def resolve_sections(
  checkpoint: Checkpoint, given: Fields, *, source: str | None = None, ttt: TTTConfig | None = None
) -> Sections:
  """What the model of a checkpoint is, with the given fields over it (`ttt_jax.checkpoints.sections`).

  Args:
    given: fields by section; `dtype` and `param_dtype` of `model` may be None, as in `load_pretrained`.
    source: the checkpoint in messages.
    ttt: takes the place of what the checkpoint says of its fast weights.

  Raises:
    UserError: as `agreed`; fast weights in the checkpoint that its config does not say how to use.
  """
  source = checkpoint.where if source is None else source
  model = dict(given.get("model", {}))
  if model.get("dtype") is None:
    model["dtype"] = _widest(
      stored.dtype for name, stored in checkpoint.tensors.items() if not name.endswith(_DERIVED)
    )
  if model.get("param_dtype") is None:
    model["param_dtype"] = model["dtype"]
  for name in ("dtype", "param_dtype"):
    if model[name] not in DTYPES:
      raise UserError(f"{name}={model[name]!r} is not one of {', '.join(map(repr, DTYPES))}")
    if model[name] == "float64" and not jax.config.jax_enable_x64:
      raise UserError(f"{name}='float64' needs jax_enable_x64: set it, or give {name}='float32'")
  architecture = read_config(checkpoint.config, generation=checkpoint.generation)
  if ttt is not None:
    own = ttt
  elif "layers" in given.get("ttt", {}):
    own = stated_ttt(checkpoint) or TTTConfig()
  else:
    own = own_ttt(checkpoint)
  sections = Sections(architecture.model, architecture.attention, own)
  sections = agreed(sections, {**given, "model": model}, source=source)
  check_layers(*sections)
  is_given = ttt is not None or bool(given.get("ttt"))
  if sections.ttt.layers and sections.ttt.init is None and is_given:
    sections = sections._replace(ttt=dataclasses.replace(sections.ttt, init="identity"))
  return sections


def load_checkpoint(
  checkpoint: Checkpoint,
  sections: Sections,
  *,
  mesh: Mesh | None = None,
  fresh_allowed: bool = True,
) -> Transformer:
  """The model of a checkpoint as resolved sections say, with its weights.

  Args:
    mesh: as in `load_pretrained`.
    fresh_allowed: whether parameters of fast weights that the checkpoint does not speak of are new.

  Raises:
    UserError: as `load_pretrained`.
  """
  if sections.model.tie_embeddings:
    checkpoint = checkpoint._replace(tensors=_with_embedding(checkpoint.tensors))

  def make() -> Transformer:
    return Transformer(*sections, rngs=nnx.Rngs(0))

  abstract = jax.eval_shape(make)
  rows = tensor_table(abstract)
  _check_tensors(checkpoint, rows, fresh_allowed=fresh_allowed)
  where = dict.fromkeys(named_parameters(abstract))
  if mesh is not None:
    where = named_parameters(shardings(abstract, mesh))
  fresh = {row.parameter for row in rows if row.name not in checkpoint.tensors}
  values = _initial(make, fresh, where)
  _fill(values, abstract, checkpoint, rows, where)
  leaves = [values[name] for name in named_parameters(abstract)]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def open_checkpoint(path: Path) -> Checkpoint:
  """The checkpoint at a path, its weights not yet read."""
  if path.is_dir():
    if not (path / CONFIG).is_file() and (models := gguf_models(path)):
      raise UserError(
        f"{path} has no {CONFIG} but {len(models)} GGUF files, {', '.join(x.name for x in models[:5])}"
        f"{', ...' if len(models) > 5 else ''}: give the path of the one to read"
      )
    generation = path / GENERATION_CONFIG
    return Checkpoint(
      str(path),
      read_json(path / CONFIG),
      read_json(generation) if generation.is_file() else {},
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


def _widest(dtypes: Iterable[np.dtype]) -> str:
  """float64 over float32 over bfloat16; float16 needs float32 to keep its bits."""
  names = {np.dtype(dtype).name for dtype in dtypes}
  if "float64" in names:
    return "float64"
  return "bfloat16" if names == {"bfloat16"} else "float32"


def _with_embedding(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
  """The tensors of a tied model, whose one table may be stored under the head's name alone."""
  if EMBEDDING in tensors or HEAD not in tensors:
    return tensors
  return {EMBEDDING if name == HEAD else name: stored for name, stored in tensors.items()}


def stated_ttt(checkpoint: Checkpoint) -> TTTConfig | None:
  """How the checkpoint's config says that fast weights learn; None if it does not speak of any."""
  ttt = read_section(checkpoint.config)
  if ttt is not None:
    return ttt
  num_layers = need_integer(checkpoint.config, "num_hidden_layers")
  ttt, beyond = read_published(checkpoint.config, num_layers)
  if beyond:
    warnings.warn(
      f"{checkpoint.where}: ttt_layers names {beyond}, beyond num_hidden_layers={num_layers}: "
      "ignored, as the published code does",
      stacklevel=4,
    )
  return ttt


def own_ttt(checkpoint: Checkpoint) -> TTTConfig:
  """The fast weights a checkpoint comes with.

  Raises:
    UserError: its config does not speak of any, but their tensors are there.
  """
  ttt = stated_ttt(checkpoint)
  stored = [name for name in checkpoint.tensors if name.endswith(_TTT_TENSORS)]
  if ttt is None and stored:
    layers = sorted({int(name.split(".")[2]) for name in stored})
    raise UserError(
      f"{checkpoint.where} has fast weights ({stored[0]} and {len(stored) - 1} more) but its "
      "config.json does not say how they learn (no ttt_mode): pass ttt=TTTConfig(layers="
      f"{tuple(layers)}, chunk_size=..., inner_lr=..., ...), in a config file the section ttt, or "
      "ttt=TTTConfig() to leave them out"
    )
  return TTTConfig() if ttt is None else ttt


def _check_tensors(checkpoint: Checkpoint, rows: tuple[Row, ...], *, fresh_allowed: bool) -> None:
  """Raises UserError with a line for every tensor that is missing, unknown or of another shape."""
  stored = checkpoint.tensors
  lines = []
  for row in rows:
    if row.name not in stored:
      if not (fresh_allowed and row.is_ttt):
        lines.append(f"{row.name}: {list(row.shape)} expected, missing in the checkpoint")
    elif stored[row.name].shape != row.shape:
      there = list(stored[row.name].shape)
      lines.append(f"{row.name}: {list(row.shape)} expected, {there} in the checkpoint")
  expected = {row.name for row in rows}
  unused = [name for name in stored if name not in expected and not name.endswith(_DERIVED)]
  if HEAD in unused and EMBEDDING in stored:
    _check_tied(checkpoint)
    unused.remove(HEAD)
  left_out = [name for name in unused if fresh_allowed and name.endswith(_TTT_TENSORS)]
  if left_out:
    warnings.warn(f"{checkpoint.where}: left out, as ttt says: {', '.join(left_out)}", stacklevel=3)
  lines += [
    f"{name}: {list(stored[name].shape)} in the checkpoint, not expected"
    for name in unused
    if name not in left_out
  ]
  if lines:
    rest = len(lines) - _MAX_NAMED
    shown = lines[:_MAX_NAMED] + ([f"and {rest} more"] if rest > 0 else [])
    raise UserError(
      f"{checkpoint.where}: {len(lines)} tensor{'s do' if len(lines) > 1 else ' does'} not fit the model "
      "of its config.json\n  " + "\n  ".join(shown)
    )


def _check_tied(checkpoint: Checkpoint) -> None:
  """Raises UserError unless the head stored beside a tied embedding is that embedding."""
  head, table = (checkpoint.tensors[name] for name in (HEAD, EMBEDDING))
  if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
    raise UserError(
      f"{checkpoint.where} stores a {HEAD} that is not its {EMBEDDING}, but tie_word_embeddings is true: "
      "set it to false in config.json to use the head, or delete the tensor"
    )


def _initial(make, names: set[str], where: dict[str, Any]) -> dict[str, Array]:
  """The parameters `names` of a new model; the others are not computed."""
  if not names:
    return {}

  def chosen() -> dict[str, Array]:
    return {name: x for name, x in named_parameters(make()).items() if name in names}

  shared = {name: where[name] for name in names}
  return jax.jit(chosen, out_shardings=None if None in shared.values() else shared)()


def _fill(
  values: dict[str, Array],
  abstract: Transformer,
  checkpoint: Checkpoint,
  rows: tuple[Row, ...],
  where: dict[str, Any],
) -> None:
  """Reads every tensor into its place in `values`, the largest first, while there is most room."""
  shapes = named_parameters(abstract)
  present = [row for row in rows if row.name in checkpoint.tensors]
  finite = {}
  for row in sorted(present, key=lambda row: -np.prod(row.shape)):
    if row.parameter not in values:
      kind = shapes[row.parameter]
      values[row.parameter] = jnp.zeros(kind.shape, kind.dtype, device=where[row.parameter])
    value = row.to_parameter(checkpoint.tensors[row.name].read())
    there = _unstacked(where[row.parameter], stacked=row.repeat is not None)
    value = jax.device_put(value, there, may_alias=True)
    values[row.parameter], finite[row.name] = _place(values[row.parameter], value, row.repeat)
    jax.block_until_ready(values[row.parameter])  # else the next tensor is read beside this one
  broken = [name for name, ok in finite.items() if not ok]
  if broken:
    raise UserError(
      f"{checkpoint.where}: {len(broken)} tensors hold NaN or infinities: {', '.join(broken[:_MAX_NAMED])}"
      f"{', ...' if len(broken) > _MAX_NAMED else ''}: the checkpoint is damaged or of a diverged run"
    )


def _unstacked(where: NamedSharding | None, *, stacked: bool) -> NamedSharding | None:
  """Where a layer of a parameter lies, so that every device is sent its own part of it alone."""
  if where is None or not stacked:
    return where
  return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))


@partial(jax.jit, donate_argnums=0)
def _place(parameter: Array, value: Array, repeat: Int[Array, ""] | None):
  """The parameter with a layer's value in it, and whether all of that is finite."""
  finite = jnp.all(jnp.isfinite(value))
  value = value.astype(parameter.dtype)
  if repeat is not None:
    value = jax.lax.dynamic_update_index_in_dim(parameter, value, repeat, 0)
  return value, finite
