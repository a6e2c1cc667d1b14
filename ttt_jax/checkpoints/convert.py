"""Converts any model that this library opens to a Hugging Face directory (`ttt-jax convert`)."""

import shutil
import time
from pathlib import Path

from rich.console import Console

from ttt_jax.checkpoints.files import GENERATION_CONFIG, is_gguf, local_path
from ttt_jax.checkpoints.open import is_run, open_model, open_tokenizer
from ttt_jax.checkpoints.save import write_model
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.checkpoints.tokenizer import TOKENIZER_FILES, load_tokenizer
from ttt_jax.files import new_directory
from ttt_jax.nn.transformer import count_parameters


def convert(
  source: str | Path,
  destination: str | Path,
  *,
  dtype: str | None = None,
  fields: Fields | None = None,
  console: Console | None = None,
) -> None:
  """Writes a model and its tokenizer to a new Hugging Face directory, and prints a summary.

  Args:
    source: a Hugging Face directory, a hub name, a `.gguf` file, or a run directory of `ttt-jax train`.
    destination: a directory that does not exist yet.
    dtype: the dtype of the written tensors; None: as in the source.
    fields: as `open_model`.
    console: where to print.

  Raises:
    UserError, UnsupportedError: as `load_pretrained` and `save_pretrained`.
  """
  console = Console() if console is None else console
  started = time.perf_counter()
  path = local_path(source)
  with new_directory(destination) as directory:
    model = open_model(path, dtype=dtype, fields=fields)
    # A Hugging Face directory's tokenizer is copied file by file.
    tokenizer = open_tokenizer(path) if is_run(path) or is_gguf(path) else None
    write_model(model, directory, tokenizer)
    if tokenizer is None:
      _copy_tokenizer(path, directory)
    written = sorted(file.name for file in directory.iterdir())
  fast = f", fast weights in {sorted(model.ttt.layers)}" if model.ttt.layers else ""
  console.print(
    f"{source} -> {destination}: {count_parameters(model):,} parameters in "
    f"{model.model.param_dtype}{fast}, {time.perf_counter() - started:.1f} s",
    highlight=False,
    soft_wrap=True,
  )
  console.print(f"written: {', '.join(written)}", highlight=False, soft_wrap=True)
  if not set(written) & set(TOKENIZER_FILES):
    console.print(f"{source} has no tokenizer, so none was written", soft_wrap=True)


def _copy_tokenizer(source: Path, directory: Path) -> None:
  if (source / "tokenizer.json").is_file():
    load_tokenizer(source)  # checks the vocabulary against the model's
  for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
    if (source / name).is_file():
      shutil.copyfile(source / name, directory / name)
