"""Unstacks a model's layers for inference, and reads token by token with their caches."""

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig
from ttt_jax.generation.cache import LayerCache, empty_fast_cache, learn_pending, read_block
from ttt_jax.nn.layers import Embed, RMSNorm, rotary_angles
from ttt_jax.nn.transformer import (
  Block,
  Transformer,
  next_token_logits,
  split_tokens,
)
from ttt_jax.parallel.mesh import constrain
from ttt_jax.parallel.parameters import gathered
from ttt_jax.parallel.trees import named_leaves


class Cache(NamedTuple):
  """Holds the caches of all layers for the rows of a batch.

  Attributes:
    lengths: tokens read per row, which is the next token's position.
    layers: the caches from the first layer to the last.
  """

  lengths: Int[Array, "B"]
  layers: tuple[LayerCache, ...]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=["embed", "blocks", "norm", "head"],
  meta_fields=["model", "attention", "ttt"],
)
@dataclasses.dataclass(frozen=True)
class Reader:
  """Holds the layers of a `Transformer` unstacked, for programs that read token by token.

  A program that slices stacked layers copies them at every call. A reader is a second copy of the layers in
  memory: delete the model if you do not need it, or donate it. The reader keeps its parameters when the
  model's are replaced.
  """

  embed: Embed
  blocks: list[Block]
  norm: RMSNorm
  head: nnx.Param | None
  model: ModelConfig
  attention: AttentionConfig
  ttt: TTTConfig

  @staticmethod
  def of(model: "Transformer | Reader", *, donate: bool = False) -> "Reader":
    """Returns the reader of a model, and the same reader again while the model's parameters are the same.

    Args:
      model: the model; its reader is released when one of its parameters is replaced or freed.
      donate: delete the model's stacked layers one array after another, so that two copies never exist;
        the model cannot be used afterwards.
    """
    if isinstance(model, Reader):
      return model
    if donate:
      return _reader(model, _unstacked_in_place(model))
    leaves = jax.tree.leaves(model)
    if not all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in leaves):
      return _reader(model, _copied_layers(model))  # shapes only: not worth caching
    cached = _READERS.get(id(model))
    if cached is not None:
      arrays, reader = cached
      configs = reader.model, reader.attention, reader.ttt
      if _same_arrays(arrays, leaves) and configs == (model.model, model.attention, model.ttt):
        return reader
    reader = _reader(model, _copied_layers(model))
    forget = partial(_READERS.pop, id(model), None)
    _READERS[id(model)] = _references(leaves, forget), reader
    return reader

  def read(
    self,
    tokens: Int[Array, "B T"],
    cache: Cache,
    counts: Int[Array, "B"],
    *,
    aligned: bool = False,
  ) -> tuple[Float[Array, "B V"], Cache]:
    """Reads new tokens after the cached ones; fast weights keep learning.

    The arguments are those of `hidden`.

    Returns:
      The logits of the successor of each row's last new token, in float32 or wider, and the cache.
    """
    x, cache = self.hidden(tokens, cache, counts, aligned=aligned)
    last = jnp.clip(counts - 1, 0)[:, None, None]
    x = jnp.take_along_axis(x, last, axis=1)
    logits = next_token_logits(x, self.embed, self.norm, self.head)[:, 0]
    return constrain(logits, "batch", None), cache

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    cache: Cache,
    counts: Int[Array, "B"],
    *,
    aligned: bool = False,
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the last block's output for every new token, and the cache with the new tokens.

    If a call with one token completes a row's chunk, `learn_pending` has to learn the chunk before the
    row's next token.

    Args:
      tokens: T new tokens per row, right-padded.
      cache: the cache, first made by `empty_cache`.
      counts: the number of real tokens per row.
      aligned: no row with new tokens has an unfinished chunk, which saves work.
    """
    position = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=cache.lengths.dtype)[None]
    config = self.model
    angles = rotary_angles(
      position.reshape(-1), config.head_size, config.rope_theta, config.rope_scaling
    )
    rotary = tuple(a.reshape(*position.shape, -1) for a in angles)
    with jax.named_scope("embed"):
      x = embeddings = constrain(self.embed(tokens), "batch", split_tokens(tokens), None)
    layers = []
    for block, layer in zip(self.blocks, cache.layers):
      block = gathered(block, x.dtype)
      x, layer = read_block(
        block, x, embeddings, rotary, layer, cache.lengths, counts, aligned=aligned
      )
      layers.append(layer)
    return x, Cache(cache.lengths + counts, tuple(layers))

  def learn_pending(self, cache: Cache, row: Int[Array, ""]) -> Cache:
    """Learns one row's full chunk in every TTT layer and returns the cache with the new states."""
    layers = tuple(
      layer
      if layer.fast is None
      else layer._replace(fast=learn_pending(block.mlp, layer.fast, row))
      for block, layer in zip(self.blocks, cache.layers)
    )
    return cache._replace(layers=layers)

  def empty_cache(self, rows: int, capacity: int, *, update: bool = True) -> Cache:
    """Returns the cache of rows that have read nothing, with room for `capacity` tokens each.

    Args:
      rows: the number of rows.
      capacity: tokens per row.
      update: whether fast weights learn; False caches nothing for them and reads with W.
    """
    dtype = jnp.dtype(self.model.dtype)
    layers = []
    for layer, block in enumerate(self.blocks):
      cache = block.attention.empty_cache(rows, capacity, dtype)
      learns = update and layer in self.ttt.layers
      layers.append(LayerCache(cache, empty_fast_cache(block.mlp, rows, dtype) if learns else None))
    return Cache(jnp.zeros((rows,), jnp.int32), tuple(layers))

  def mesh(self) -> Mesh | None:
    """Returns the mesh of the parameters; None for a single device."""
    sharding = self.embed.table[...].sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None

  def fingerprint(self) -> str:
    """Returns a hash of the configs and of every bit of the parameters, which tells models apart.

    The first call reads all parameters.
    """
    leaves = jax.tree.leaves(self)
    arrays, fingerprint = self.__dict__.get(_FINGERPRINT, ((), ""))
    if not fingerprint or not _same_arrays(arrays, leaves):
      fingerprint = self._computed_fingerprint()
      object.__setattr__(self, _FINGERPRINT, (_references(leaves), fingerprint))
    return fingerprint

  def _computed_fingerprint(self) -> str:
    configs = [
      {
        name: value
        for name, value in dataclasses.asdict(config).items()
        # A field at its default does not count, so that a later version can add fields.
        if name not in ignored and value != getattr(type(config)(), name)
      }
      for config, ignored in zip((self.model, self.attention, self.ttt), _IGNORED_FIELDS)
    ]
    sums = {name: int(x) for name, x in named_leaves(_bit_sums(self), ".").items()}
    text = json.dumps([configs, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Fields of the model, attention and ttt configs that do not count in the fingerprint: they choose how the
# same numbers are computed, or, as a layer's mixer and short convolution, show in the names of its
# parameters.
_IGNORED_FIELDS = (
  ("remat",),
  ("implementation", "balance", "mixer", "mixer_layers", "short_conv"),
  ("implementation", "merge", "collective", "wire_dtype"),
)


# The attribute in which a reader keeps references to its parameters, and their fingerprint.
_FINGERPRINT = "_fingerprint"
# Readers by the id of their model, each with references to the model's parameters.
_READERS: dict[int, tuple[tuple[weakref.ref, ...], Reader]] = {}


def _references(
  leaves: list[Array], forget: Callable[[], Any] = lambda: None
) -> tuple[weakref.ref, ...]:
  """Makes weak references to arrays; `forget` is called when one of the arrays is freed."""
  return tuple(weakref.ref(x, lambda _: forget()) for x in leaves)


def _same_arrays(references: tuple[weakref.ref, ...], leaves: list[Array]) -> bool:
  """Tells whether the references are to these very arrays: a module's parameters may be replaced."""
  return len(references) == len(leaves) and all(ref() is x for ref, x in zip(references, leaves))


def _reader(model: Transformer, blocks: list[Block]) -> Reader:
  # New modules: else a training step that replaces parameters in place would change half of the reader.
  embed, norm, head = jax.tree.map(lambda x: x, (model.embed, model.norm, model.head))
  return Reader(embed, blocks, norm, head, model.model, model.attention, model.ttt)


def _copied_layers(model: Transformer) -> list[Block]:
  return [_layer(model.groups[g][p], r) for g, p, r in model.layers()]


def _unstacked_in_place(model: Transformer) -> list[Block]:
  """Slices a model's stacked layers, deletes each stack as soon as it is sliced, and returns the layers."""
  layers = {}
  for g, group in enumerate(model.groups):
    for p, stacked in enumerate(group):
      stacks, structure = jax.tree.flatten(stacked)
      parts = []
      for stack in stacks:
        parts.append(_slices(stack))
        stack.delete()
      for r, layer in enumerate(zip(*parts)):
        layers[g, p, r] = jax.tree.unflatten(structure, layer)
  return [layers[index] for index in model.layers()]


@jax.jit
def _slices(stack: Array) -> tuple[Array, ...]:
  return tuple(stack[i] for i in range(stack.shape[0]))


@partial(jax.jit, static_argnums=1)
def _layer(blocks: Block, repeat: int) -> Block:
  return jax.tree.map(lambda x: x[repeat], blocks)


@jax.jit
def _bit_sums(reader: Reader) -> Any:
  """Sums each parameter's elements as integers, weighted by their index from 1: equal on every mesh."""

  def bit_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    indices = jnp.arange(1, bits.size + 1, dtype=jnp.uint32).reshape(bits.shape)
    return jnp.sum(bits.astype(jnp.uint32) * indices, dtype=jnp.uint32)

  return jax.tree.map(bit_sum, reader)
