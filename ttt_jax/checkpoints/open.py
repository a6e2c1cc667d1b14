"""Opens a model by its path: a Hugging Face directory, a `.gguf` file or a run directory."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ttt_jax.checkpoints.files import local_path
from ttt_jax.checkpoints.hf import load_checkpoint, open_checkpoint, resolve_sections
from ttt_jax.checkpoints.resolve import run_sections
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.checkpoints.tokenizer import BYTES, Tokenizer, load_tokenizer
from ttt_jax.config import MeshConfig
from ttt_jax.config.recorded import CONFIG_FILE, recorded_config
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import make_mesh


def is_run(path: Path) -> bool:
  """Tells whether a path is a run directory of `ttt-jax train`."""
  return (path / CONFIG_FILE).is_file()


def open_model(
  source: str | Path, *, dtype: str | None = None, fields: Fields | None = None
) -> Transformer:
  """Loads the model at a path or of a hub name, on one device.

  Args:
    dtype: the dtype of parameters and computation; None: as in the source.
    fields: fields of `model`, `attention` and `ttt` by section, which override the source, as
      `{"ttt": {"layers": (2,)}}` (`ttt_jax.checkpoints.sections`).

  Raises:
    UserError, UnsupportedError: a field contradicts the source; as `load_pretrained`.
  """
  path = local_path(source)
  fields = {} if fields is None else {name: dict(section) for name, section in fields.items()}
  if is_run(path):
    return _from_run(path, dtype, fields)
  if dtype is not None:
    fields["model"] = _with_dtype(fields.get("model", {}), dtype)
  checkpoint = open_checkpoint(path)
  sections = resolve_sections(checkpoint, fields, source=str(source))
  return load_checkpoint(checkpoint, sections, allow_new_ttt=bool(fields.get("ttt")))


def open_tokenizer(source: str | Path) -> Tokenizer:
  """Loads the tokenizer of the model at a path or of a hub name."""
  path = local_path(source)
  if is_run(path):
    path = recorded_config(path).tokenizer or BYTES
  return load_tokenizer(path)


def _from_run(run_dir: Path, dtype: str | None, fields: dict[str, dict[str, Any]]) -> Transformer:
  from ttt_jax.checkpoints.runs import load_model  # loads Orbax, which no other source needs

  recorded = recorded_config(run_dir)
  dtypes = {"dtype": recorded.model.dtype, "param_dtype": recorded.model.param_dtype}
  loadable = {**fields, "model": {**fields.get("model", {}), **dtypes}}
  config = dataclasses.replace(
    recorded, mesh=MeshConfig(), **run_sections(run_dir, loadable)._asdict()
  )
  model = load_model(config, make_mesh(config.mesh), run_dir)
  wanted = dict(fields.get("model", {}))
  if dtype is not None:
    wanted = _with_dtype(wanted, dtype)
  return _cast(model, wanted.get("dtype"), wanted.get("param_dtype"))


def _with_dtype(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  return {"dtype": dtype, "param_dtype": dtype, **fields}


def _cast(model: Transformer, dtype: str | None, param_dtype: str | None) -> Transformer:
  """Casts the model to a computation dtype and a parameter dtype; None keeps a dtype."""
  config = dataclasses.replace(
    model.model,
    dtype=model.model.dtype if dtype is None else dtype,
    param_dtype=model.model.param_dtype if param_dtype is None else param_dtype,
  )
  if config == model.model:
    return model
  target = jax.eval_shape(lambda: Transformer(config, model.attention, model.ttt, rngs=nnx.Rngs(0)))
  leaves = [x.astype(config.param_dtype) for x in jax.tree.leaves(model)]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)
