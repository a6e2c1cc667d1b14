"""The table from a checkpoint's tensors to the model's parameters, read both ways.

A linear layer of PyTorch stores `[out, in]`; here kernels are `[in, out]`, heads are an axis of their own,
and equal layers are stacked. Every row is a reshape and a transposition, so its inverse is too.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array

from ttt_jax.nn.fast_mlp import TttMlp
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.trees import named_leaves

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_TTT_PARAMETERS = ("conv", "projection", "log_rate", "log_half_life")


@dataclass(frozen=True)
class Row:
  """A tensor of the checkpoint and its place in the model.

  parameter[repeat] = tensor.reshape(split).transpose(axes)
  """

  name: str  # in the checkpoint
  parameter: str  # in the model, as in `named_parameters`
  repeat: int | None  # its place on the stacking axis; None: the parameter is not stacked
  shape: tuple[int, ...]  # in the checkpoint
  split: tuple[int, ...]
  axes: tuple[int, ...]

  @property
  def is_ttt(self) -> bool:
    """Whether only TTT layers have it."""
    return self.parameter.rpartition("/")[2] in _TTT_PARAMETERS

  @property
  def layout(self) -> "Row":
    """The same layout without names, so that equal tensors of all layers share a program."""
    return dataclasses.replace(self, name="", parameter="", repeat=None)

  def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(self.split).transpose(self.axes)

  def to_tensor(self, parameter: Array) -> Array:
    inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
    return parameter.transpose(inverse).reshape(self.shape)


def named_parameters(model: Transformer) -> dict[str, Any]:
  """The model's arrays under their path, as `groups/0/0/attention/query`, in the order of its leaves."""
  return {name.removesuffix("/value"): leaf for name, leaf in named_leaves(model).items()}


def tensor_table(model: Transformer) -> tuple[Row, ...]:
  """A row for every tensor of the model's checkpoint, layer by layer; the model may be abstract."""
  rows = [_same(EMBEDDING, "embed/table", model.embed.table.shape)]
  for layer, (g, p, repeat) in enumerate(model.layers()):
    rows += _layer_rows(model, layer, f"groups/{g}/{p}", model.groups[g][p].mlp, repeat)
  d, v = model.model.d_model, model.model.vocab_size
  rows.append(_same("model.norm.weight", "norm/scale", (d,)))
  if model.head is not None:
    rows.append(Row(HEAD, "head", None, (v, d), (v, d), (1, 0)))
  return tuple(rows)


def _same(name: str, parameter: str, shape: tuple[int, ...], repeat: int | None = None) -> Row:
  return Row(name, parameter, repeat, shape, shape, tuple(range(len(shape))))


def _layer_rows(model: Transformer, layer: int, block: str, mlp: Any, repeat: int) -> Iterator[Row]:
  config = model.model
  d, f = config.d_model, config.d_ff
  h, g, k = config.num_heads, config.num_kv_heads, config.head_size
  prefix = f"model.layers.{layer}"

  yield _same(f"{prefix}.input_layernorm.weight", f"{block}/attention_norm/scale", (d,), repeat)
  for letter, name, heads in (("q", "query", h), ("k", "key", g), ("v", "value", g)):
    projection, parameter = f"{prefix}.self_attn.{letter}_proj", f"{block}/attention/{name}"
    shape, split = (heads * k, d), (heads, k, d)
    yield Row(f"{projection}.weight", parameter, repeat, shape, split, (2, 0, 1))
    if config.attention_bias is not None:
      split = (heads, k)
      yield Row(f"{projection}.bias", f"{parameter}_bias", repeat, (heads * k,), split, (0, 1))
  projection, parameter = f"{prefix}.self_attn.o_proj", f"{block}/attention/out"
  yield Row(f"{projection}.weight", parameter, repeat, (d, h * k), (d, h, k), (1, 2, 0))
  if config.attention_bias == "qkvo":
    yield _same(f"{projection}.bias", f"{parameter}_bias", (d,), repeat)
  if config.qk_norm:
    for letter, name in (("q", "query"), ("k", "key")):
      norm = f"{block}/attention/{name}_norm/scale"
      yield _same(f"{prefix}.self_attn.{letter}_norm.weight", norm, (k,), repeat)

  yield _same(f"{prefix}.post_attention_layernorm.weight", f"{block}/mlp_norm/scale", (d,), repeat)
  for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
    yield Row(
      f"{prefix}.mlp.{name}_proj.weight", f"{block}/mlp/{name}", repeat, shape, shape, (1, 0)
    )
  if isinstance(mlp, TttMlp):
    yield from _ttt_rows(f"{prefix}.mlp", f"{block}/mlp", mlp, d, repeat)


def _ttt_rows(prefix: str, parameter: str, mlp: TttMlp, d: int, repeat: int) -> Iterator[Row]:
  """Convolution and projection as the published code has them, our learned rate and half-life."""
  width = mlp.ttt.conv_width
  shape = (d, 1, width)
  yield Row(f"{prefix}.ttt_conv.weight", f"{parameter}/conv", repeat, shape, (d, width), (1, 0))
  if mlp.projection is not None:
    # Used as stored, V = conv(x) P, unlike a linear layer's weight.
    yield _same(f"{prefix}.ttt_proj.weight", f"{parameter}/projection", (d, d), repeat)
  if mlp.log_rate is not None:
    yield _same(f"{prefix}.ttt_log_rate", f"{parameter}/log_rate", (), repeat)
  if mlp.log_half_life is not None:
    yield _same(f"{prefix}.ttt_log_half_life", f"{parameter}/log_half_life", (), repeat)
