"""Maps a checkpoint's tensors to the model's parameters and back, by one table.

A linear layer of PyTorch stores `[out, in]`; here kernels are `[in, out]`, heads are a separate axis, and
equal layers are stacked. Every mapping is a reshape and a transposition, and so is its inverse.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array

from ttt_jax.nn.fast_mlp import LEARNED, TttMlp
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.trees import named_leaves

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_TTT_PARAMETERS = ("conv", "projection", *LEARNED)


@dataclass(frozen=True)
class TensorMapping:
  """Maps a tensor of the checkpoint to its place in the model.

  parameter[repeat] = tensor.reshape(split).transpose(axes)
  """

  name: str  # in the checkpoint
  parameter: str  # in the model, as in `named_parameters`
  repeat: int | None  # index on the axis of stacked layers; None: the parameter is not stacked
  shape: tuple[int, ...]  # in the checkpoint
  split: tuple[int, ...]
  axes: tuple[int, ...]

  @property
  def is_ttt(self) -> bool:
    """Tells whether only TTT layers have the parameter."""
    return self.parameter.rpartition("/")[2] in _TTT_PARAMETERS

  @property
  def layout(self) -> "TensorMapping":
    """Returns the mapping without names, so that equal tensors of all layers share one compiled program."""
    return dataclasses.replace(self, name="", parameter="", repeat=None)

  def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(self.split).transpose(self.axes)

  def to_tensor(self, parameter: Array) -> Array:
    inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
    return parameter.transpose(inverse).reshape(self.shape)


def named_parameters(model: Transformer) -> dict[str, Any]:
  """Returns the model's arrays by path, as `groups/0/0/attention/query`, in the order of its leaves."""
  return {name.removesuffix("/value"): leaf for name, leaf in named_leaves(model).items()}


def tensor_table(model: Transformer) -> tuple[TensorMapping, ...]:
  """Returns a mapping for every tensor of the model's checkpoint, by layer; the model may be abstract."""
  mappings = [_unchanged(EMBEDDING, "embed/table", model.embed.table.shape)]
  for layer, (g, p, repeat) in enumerate(model.layers()):
    mappings += _layer_mappings(model, layer, f"groups/{g}/{p}", model.groups[g][p].mlp, repeat)
  d, v = model.model.d_model, model.model.vocab_size
  mappings.append(_unchanged("model.norm.weight", "norm/scale", (d,)))
  if model.head is not None:
    mappings.append(TensorMapping(HEAD, "head", None, (v, d), (v, d), (1, 0)))
  return tuple(mappings)


def _unchanged(
  name: str, parameter: str, shape: tuple[int, ...], repeat: int | None = None
) -> TensorMapping:
  return TensorMapping(name, parameter, repeat, shape, shape, tuple(range(len(shape))))


def _layer_mappings(
  model: Transformer, layer: int, block: str, mlp: Any, repeat: int
) -> Iterator[TensorMapping]:
  config = model.model
  d, f = config.d_model, config.d_ff
  h, g, k = config.num_heads, config.num_kv_heads, config.head_size
  prefix = f"model.layers.{layer}"

  yield _unchanged(
    f"{prefix}.input_layernorm.weight", f"{block}/attention_norm/scale", (d,), repeat
  )
  for letter, name, heads in (("q", "query", h), ("k", "key", g), ("v", "value", g)):
    projection, parameter = f"{prefix}.self_attn.{letter}_proj", f"{block}/attention/{name}"
    shape, split = (heads * k, d), (heads, k, d)
    yield TensorMapping(f"{projection}.weight", parameter, repeat, shape, split, (2, 0, 1))
    if config.attention_bias is not None:
      split = (heads, k)
      yield TensorMapping(
        f"{projection}.bias", f"{parameter}_bias", repeat, (heads * k,), split, (0, 1)
      )
  projection, parameter = f"{prefix}.self_attn.o_proj", f"{block}/attention/out"
  yield TensorMapping(f"{projection}.weight", parameter, repeat, (d, h * k), (d, h, k), (1, 2, 0))
  if config.attention_bias == "qkvo":
    yield _unchanged(f"{projection}.bias", f"{parameter}_bias", (d,), repeat)
  if config.qk_norm:
    for letter, name in (("q", "query"), ("k", "key")):
      norm = f"{block}/attention/{name}_norm/scale"
      yield _unchanged(f"{prefix}.self_attn.{letter}_norm.weight", norm, (k,), repeat)

  yield _unchanged(
    f"{prefix}.post_attention_layernorm.weight", f"{block}/mlp_norm/scale", (d,), repeat
  )
  for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
    yield TensorMapping(
      f"{prefix}.mlp.{name}_proj.weight", f"{block}/mlp/{name}", repeat, shape, shape, (1, 0)
    )
  if isinstance(mlp, TttMlp):
    yield from _ttt_mappings(f"{prefix}.mlp", f"{block}/mlp", mlp, d, repeat)


def _ttt_mappings(
  prefix: str, parameter: str, mlp: TttMlp, d: int, repeat: int
) -> Iterator[TensorMapping]:
  """Yields the published names of convolution and projection, and our learned rate and half-life."""
  width = mlp.ttt.conv_width
  shape = (d, 1, width)
  yield TensorMapping(
    f"{prefix}.ttt_conv.weight", f"{parameter}/conv", repeat, shape, (d, width), (1, 0)
  )
  if mlp.projection is not None:
    # V = conv(x) P uses the stored matrix untransposed, unlike a linear layer's weight.
    yield _unchanged(f"{prefix}.ttt_proj.weight", f"{parameter}/projection", (d, d), repeat)
  for name in LEARNED:
    if getattr(mlp, name) is not None:
      shape = getattr(mlp, name).shape[1:]
      yield _unchanged(f"{prefix}.ttt_{name}", f"{parameter}/{name}", shape, repeat)
