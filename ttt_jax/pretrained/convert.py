"""`ttt-jax convert`: any model this library knows, written as a Hugging Face directory."""

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx
from rich.console import Console

from ttt_jax.config import MeshConfig, TTTConfig
from ttt_jax.load_config import load_config, override_section
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.pretrained.files import GENERATION_CONFIG, local_path, new_directory
from ttt_jax.pretrained.load import load_pretrained, open_checkpoint, stated_ttt
from ttt_jax.pretrained.save import write_model
from ttt_jax.pretrained.tokenizer import (
  TOKENIZER_FILES,
  Tokenizer,
  byte_tokenizer,
  load_tokenizer,
)
from ttt_jax.run import load_model
from ttt_jax.rundir import CONFIG_FILE
from ttt_jax.sharding import make_mesh


def convert(
  source: str | Path,
  destination: str | Path,
  *,
  dtype: str | None = None,
  ttt_overrides: Sequence[str] = (),
  console: Console | None = None,
) -> None:
  """Writes a model and its tokenizer to a new Hugging Face directory, and prints what it did.

  Args:
    source: a Hugging Face directory, a hub name, a `.gguf` file, or a run directory of `ttt-jax train`.
    destination: a directory that does not exist yet.
    dtype: of the tensors written; None: as in the source.
    ttt_overrides: words like `--ttt.layers "[2]"`, over what the source says of its fast weights.
    console: where to print.

  Raises:
    ValueError, NotImplementedError: as `load_pretrained` and `save_pretrained`.
  """
  console = Console() if console is None else console
  started = time.perf_counter()
  path = local_path(source)
  with new_directory(destination) as directory:
    if (path / CONFIG_FILE).is_file():
      model, tokenizer = _from_run(path, dtype, ttt_overrides), byte_tokenizer()
    else:
      model = load_pretrained(path, dtype=dtype, ttt=_ttt(path, ttt_overrides))
      tokenizer = load_tokenizer(path) if path.suffix == ".gguf" else None
    write_model(model, directory)
    _write_tokenizer(path, tokenizer, model, directory)
    there = sorted(file.name for file in directory.iterdir())
  fast = f", fast weights in {sorted(model.ttt.layers)}" if model.ttt.layers else ""
  console.print(
    f"{source} -> {destination}: {count_parameters(model):,} parameters in "
    f"{model.model.param_dtype}{fast}, {time.perf_counter() - started:.1f} s",
    highlight=False,
    soft_wrap=True,
  )
  console.print(f"written: {', '.join(there)}", highlight=False, soft_wrap=True)
  if not set(there) & set(TOKENIZER_FILES):
    console.print(f"{source} has no tokenizer, so there is none beside the model")


def _ttt(path: Path, overrides: Sequence[str]) -> TTTConfig | None:
  """The source's fast weights with overrides; None, as the source says, without any."""
  if not overrides:
    return None
  stated = stated_ttt(open_checkpoint(path))
  return override_section(TTTConfig() if stated is None else stated, "ttt", overrides)


def _from_run(run_dir: Path, dtype: str | None, overrides: Sequence[str]) -> Transformer:
  if overrides:
    raise ValueError(
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


def _write_tokenizer(
  source: Path, tokenizer: Tokenizer | None, model: Transformer, directory: Path
) -> None:
  """The tokenizer given, or the files of the source's; each is checked against the model."""
  if tokenizer is not None:
    tokenizer.check_vocabulary(model.model.vocab_size)
    tokenizer.save(directory)
    return
  if (source / "tokenizer.json").is_file():
    load_tokenizer(source)  # refuses a vocabulary larger than the model's
  for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
    if (source / name).is_file():
      shutil.copyfile(source / name, directory / name)
