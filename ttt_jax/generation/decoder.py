"""A model laid out to read on, token by token, with a cache of what it has read."""

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
  """What a model keeps of the rows it reads.

  Attributes:
    lengths: tokens read of each row: the next one's position.
    layers: from the first to the last.
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
  """Every layer of a `Transformer` by itself, as a program that reads token by token needs them.

  Cut out of the stacked layers inside of such a program, they would be copied again at every call.
  A reader takes the memory of the layers once more: delete the model if it is not needed, or donate it.
  It keeps the parameters that it was made of, whatever is written into the model afterwards.
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
    """The reader of a model: the same one at every call, while the model and its parameters stay.

    Args:
      model: one whose parameters change or go takes the reader that is kept for it along.
      donate: delete the model's stacked layers one array after another, so that there are never two
        copies of them; the model cannot be used afterwards.
    """
    if isinstance(model, Reader):
      return model
    if donate:
      return _reader(model, _take_apart(model))
    leaves = jax.tree.leaves(model)
    if not all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in leaves):
      return _reader(model, _copied_layers(model))  # shapes only: nothing to be kept
    kept = _KEPT.get(id(model))
    if kept is not None:
      arrays, reader = kept
      configs = reader.model, reader.attention, reader.ttt
      if _are(arrays, leaves) and configs == (model.model, model.attention, model.ttt):
        return reader
    reader = _reader(model, _copied_layers(model))
    _KEPT[id(model)] = _references(leaves, partial(_KEPT.pop, id(model), None)), reader
    return reader

  def read(
    self,
    tokens: Int[Array, "B T"],
    cache: Cache,
    counts: Int[Array, "B"],
    *,
    aligned: bool = False,
  ) -> tuple[Float[Array, "B V"], Cache]:
    """Reads new tokens behind those in a cache, made by `empty_cache`; fast weights learn on.

    Arguments are those of `hidden`.

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
    """What the logits of every new token are made of, and the cache with the new tokens.

    A row's chunk that is full after a call with one token is not learned yet: `learn_pending` does
    that, before the row's next token.

    Args:
      tokens: T new tokens a row, of which the first `counts` are there; the others fill up rows of
        different lengths.
      aligned: no row that reads has an unfinished chunk, which saves work.
    """
    place = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=cache.lengths.dtype)[None]
    config = self.model
    angles = rotary_angles(
      place.reshape(-1), config.head_size, config.rope_theta, config.rope_scaling
    )
    rotary = tuple(a.reshape(*place.shape, -1) for a in angles)
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
    """The cache after every TTT layer learned one row's chunk, which is full."""
    layers = tuple(
      layer
      if layer.fast is None
      else layer._replace(fast=learn_pending(block.mlp, layer.fast, row))
      for block, layer in zip(self.blocks, cache.layers)
    )
    return cache._replace(layers=layers)

  def empty_cache(self, rows: int, capacity: int, *, update: bool = True) -> Cache:
    """Of rows that have read nothing, with room for `capacity` tokens each.

    Args:
      update: whether fast weights learn; False keeps nothing for them and reads with W.
    """
    dtype = jnp.dtype(self.model.dtype)
    layers = []
    for layer, block in enumerate(self.blocks):
      cache = block.attention.empty_cache(rows, capacity, dtype)
      learns = update and layer in self.ttt.layers
      layers.append(LayerCache(cache, empty_fast_cache(block.mlp, rows, dtype) if learns else None))
    return Cache(jnp.zeros((rows,), jnp.int32), tuple(layers))

  def mesh(self) -> Mesh | None:
    """The mesh that the parameters lie on; None for a single device."""
    where = self.embed.table[...].sharding
    return where.mesh if isinstance(where, NamedSharding) and where.mesh.size > 1 else None

  def fingerprint(self) -> str:
    """A number that tells models apart: of their configs and of every bit of their parameters.

    All parameters are read for it, once.
    """
    leaves = jax.tree.leaves(self)
    arrays, known = self.__dict__.get(_FINGERPRINT, ((), ""))
    if not known or not _are(arrays, leaves):
      known = self._computed_fingerprint()
      object.__setattr__(self, _FINGERPRINT, (_references(leaves), known))
    return known

  def _computed_fingerprint(self) -> str:
    configs = [
      {
        name: value
        for name, value in dataclasses.asdict(config).items()
        # A field that a later version adds changes nothing where it is not used.
        if name not in computed and value != getattr(type(config)(), name)
      }
      for config, computed in zip((self.model, self.attention, self.ttt), _HOW_COMPUTED)
    ]
    sums = {name: int(x) for name, x in named_leaves(_bit_sums(self), ".").items()}
    text = json.dumps([configs, sums], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Fields of the three configs that say how numbers are computed, not which; a layer's mixer and its short
# convolution show in the names of its parameters.
_HOW_COMPUTED = (
  ("remat",),
  ("implementation", "balance", "mixer", "mixer_layers", "short_conv"),
  ("implementation", "merge", "collective", "wire_dtype"),
)


_FINGERPRINT = "_fingerprint"  # of a reader: references to its parameters, and theirs
# By the id of a model: references to its parameters, and the reader made of them.
_KEPT: dict[int, tuple[tuple[weakref.ref, ...], Reader]] = {}


def _references(
  leaves: list[Array], forget: Callable[[], Any] = lambda: None
) -> tuple[weakref.ref, ...]:
  """Weak references, so that what is kept for some arrays does not outlive them."""
  return tuple(weakref.ref(x, lambda _: forget()) for x in leaves)


def _are(arrays: tuple[weakref.ref, ...], leaves: list[Array]) -> bool:
  """Whether they refer to these very arrays: a module's parameters may be written anew."""
  return len(arrays) == len(leaves) and all(ref() is x for ref, x in zip(arrays, leaves))


def _reader(model: Transformer, blocks: list[Block]) -> Reader:
  # Modules of its own, so that a reader is not half new after a training step in place.
  embed, norm, head = jax.tree.map(lambda x: x, (model.embed, model.norm, model.head))
  return Reader(embed, blocks, norm, head, model.model, model.attention, model.ttt)


def _copied_layers(model: Transformer) -> list[Block]:
  return [_layer(model.groups[g][p], r) for g, p, r in model.layers()]


def _take_apart(model: Transformer) -> list[Block]:
  """The layers of a model whose stacks are deleted, each as soon as it is cut."""
  cut = {}
  for g, group in enumerate(model.groups):
    for p, stacked in enumerate(group):
      stacks, structure = jax.tree.flatten(stacked)
      parts = []
      for stack in stacks:
        parts.append(_slices(stack))
        stack.delete()
      for r, layer in enumerate(zip(*parts)):
        cut[g, p, r] = jax.tree.unflatten(structure, layer)
  return [cut[place] for place in model.layers()]


@jax.jit
def _slices(stack: Array) -> tuple[Array, ...]:
  return tuple(stack[i] for i in range(stack.shape[0]))


@partial(jax.jit, static_argnums=1)
def _layer(blocks: Block, repeat: int) -> Block:
  return jax.tree.map(lambda x: x[repeat], blocks)


@jax.jit
def _bit_sums(reader: Reader) -> Any:
  """Of every parameter, the sum of its numbers' bits times their places: equal on every mesh."""

  def bit_sum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    places = jnp.arange(1, bits.size + 1, dtype=jnp.uint32).reshape(bits.shape)
    return jnp.sum(bits.astype(jnp.uint32) * places, dtype=jnp.uint32)

  return jax.tree.map(bit_sum, reader)
