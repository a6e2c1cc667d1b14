"""Any model this library knows, by its path: a Hugging Face directory, a `.gguf` file, a run directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx

from ttt_jax.config import MeshConfig, TTTConfig
from ttt_jax.errors import UserError
from ttt_jax.load_config import load_config, override_section
from ttt_jax.nn.transformer import Transformer
from ttt_jax.pretrained.files import is_gguf, local_path
from ttt_jax.pretrained.load import load_pretrained, open_checkpoint, stated_ttt
from ttt_jax.pretrained.tokenizer import BYTES, Tokenizer, load_tokenizer
from ttt_jax.run import load_model
from ttt_jax.rundir import CONFIG_FILE
from ttt_jax.sharding import make_mesh


def is_run(path: Path) -> bool:
  """Whether a path is a run directory of `ttt-jax train`."""
  return (path / CONFIG_FILE).is_file()


def open_model(
  source: str | Path, *, dtype: str | None = None, ttt_overrides: Sequence[str] = ()
) -> Transformer:
  """The model at a path or of a hub name, on one device.

  Args:
    dtype: of parameters and computation; None: as in the source.
    ttt_overrides: words like `--ttt.layers "[2]"`, over what the source says of its fast weights.
  """
  path = local_path(source)
  if is_run(path):
    return _from_run(path, dtype, ttt_overrides)
  return load_pretrained(path, dtype=dtype, ttt=_ttt(path, ttt_overrides))


def open_tokenizer(source: str | Path) -> Tokenizer:
  """The tokenizer of the model there."""
  path = local_path(source)
  if is_run(path):
    path = load_config(path / CONFIG_FILE).tokenizer or BYTES
  return load_tokenizer(path)


def _ttt(path: Path, overrides: Sequence[str]) -> TTTConfig | None:
  """The source's fast weights with overrides; None, as the source says, without any."""
  if not overrides:
    return None
  # A GGUF file says nothing of fast weights, and takes seconds to parse.
  stated = None if is_gguf(path) else stated_ttt(open_checkpoint(path))
  return override_section(TTTConfig() if stated is None else stated, "ttt", overrides)


def _from_run(run_dir: Path, dtype: str | None, overrides: Sequence[str]) -> Transformer:
  if overrides:
    raise UserError(
      f"{overrides[0]} cannot be given for the run directory {run_dir}: its model has learned with its own "
      "config; convert it, then convert the result"
    )
  config = load_config(run_dir / CONFIG_FILE)
  model = load_model(config, make_mesh(MeshConfig()), run_dir)
  return model if dtype is None else _cast(model, dtype)


def _cast(model: Transformer, dtype: str) -> Transformer:
  """The model with parameters and computation in another dtype."""
  config = dataclasses.replace(model.model, dtype=dtype, param_dtype=dtype)
  target = jax.eval_shape(lambda: Transformer(config, model.attention, model.ttt, rngs=nnx.Rngs(0)))
  leaves = [x.astype(dtype) for x in jax.tree.leaves(model)]
  return jax.tree.unflatten(jax.tree.structure(target), leaves)
