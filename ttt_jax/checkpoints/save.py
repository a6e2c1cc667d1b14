"""Saves a model as a Hugging Face directory, tensor by tensor, completely or not at all."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ttt_jax.checkpoints.files import CONFIG, write_safetensors
from ttt_jax.checkpoints.hf_config import write_config
from ttt_jax.checkpoints.tensors import TensorMapping, named_parameters, tensor_table
from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.checkpoints.ttt_config import SECTION, write_published, write_section
from ttt_jax.errors import UserError
from ttt_jax.files import new_directory, write_json
from ttt_jax.nn.fast_mlp import LOG_SCALE
from ttt_jax.nn.transformer import Transformer


def save_pretrained(
  model: Transformer, path: str | Path, *, tokenizer: Tokenizer | None = None
) -> None:
  """Writes a model as a Hugging Face directory: config.json and safetensors in the parameters' dtype.

  `load_pretrained` reads it back bit for bit. `transformers` loads it as Qwen3 (qk_norm), Qwen2 (qkv bias),
  Mistral (a window in every layer) or else Llama. Fast weights are written in the published format where
  the published code computes the same; otherwise its keys are left out, and a warning says why. All files
  are written beside `path` and renamed when complete: a failed call leaves no files.

  Args:
    model: the model.
    path: a directory that does not exist yet, or is empty.
    tokenizer: saved beside the model. If the model's config names no token that begins or ends a text,
      config.json gets the tokenizer's.

  Raises:
    UserError: the path exists and is not an empty directory, a parameter holds NaN or infinities, or the
      tokenizer has more tokens than the model.
    UnsupportedError: no architecture of `transformers` has these features together.
  """
  with new_directory(path) as directory:
    write_model(model, directory, tokenizer)


def write_model(model: Transformer, directory: Path, tokenizer: Tokenizer | None) -> None:
  """Writes config.json, safetensors and tokenizer of a model into a directory."""
  architecture = model.model
  if tokenizer is not None:
    tokenizer.check_vocabulary(architecture.vocab_size)
    tokenizer.save(directory)
    architecture = dataclasses.replace(
      architecture,
      bos_id=tokenizer.bos_id if architecture.bos_id is None else architecture.bos_id,
      eos_ids=architecture.eos_ids or tokenizer.eos_ids,
    )
  config = write_config(architecture, model.attention)
  if model.ttt.layers:
    published, reasons = write_published(model.ttt, _inner_rates(model))
    config |= published | {SECTION: write_section(model.ttt, published)}
    if reasons:
      warnings.warn(
        "the published code will read this checkpoint without TTT, and report its ttt_* tensors as unused, "
        "because it cannot express " + "; ".join(reasons),
        stacklevel=3,
      )
  mappings = tensor_table(model)
  dtype = np.dtype(model.model.param_dtype)
  write_safetensors(
    directory,
    {m.name: (m.shape, dtype) for m in mappings},
    _mapped_tensors(model, mappings),
  )
  write_json(directory / CONFIG, config)


def _inner_rates(model: Transformer) -> list[float]:
  """Returns the inner rate of every TTT layer."""
  rates = []
  for layer, (g, p, repeat) in enumerate(model.layers()):
    if layer in model.ttt.layers:
      mlp = model.groups[g][p].mlp
      learned = 0.0 if mlp.log_rate is None else float(mlp.log_rate[...][repeat])
      rates.append(mlp.base_rate * math.exp(LOG_SCALE * learned))
  return rates


def _mapped_tensors(
  model: Transformer, mappings: tuple[TensorMapping, ...]
) -> Iterator[np.ndarray]:
  """Yields the checkpoint's tensors on the host, one at a time."""
  parameters = named_parameters(model)
  for mapping in mappings:
    tensor, finite = _finite_tensor(
      parameters[mapping.parameter], mapping.repeat, layout=mapping.layout
    )
    if not finite:
      raise UserError(
        f"{mapping.name} holds NaN or infinities: the run has diverged: save an earlier checkpoint"
      )
    yield np.asarray(tensor)


@partial(jax.jit, static_argnames="layout")
def _finite_tensor(parameter: Array, repeat: Int[Array, ""] | None, *, layout: TensorMapping):
  """Returns the tensor of a mapping, and whether all its numbers are finite."""
  if repeat is not None:
    parameter = jax.lax.dynamic_index_in_dim(parameter, repeat, 0, keepdims=False)
  tensor = layout.to_tensor(parameter)
  return tensor, jnp.all(jnp.isfinite(tensor))
