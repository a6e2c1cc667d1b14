"""Holds, saves and loads the state from which a generation continues."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from ttt_jax.errors import UserError
from ttt_jax.files import atomic_file
from ttt_jax.generation.cache import FAST_CACHE, SOLVED_SUMS
from ttt_jax.generation.decoder import Cache, Reader
from ttt_jax.nn.attention import KEYS_AND_VALUES
from ttt_jax.nn.mixers import mixer_cache_dims
from ttt_jax.nn.transformer import Transformer
from ttt_jax.ops.attention.cached import KeyValueCache
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.trees import named_leaves

_FORMAT = "ttt_jax generation state 1"
NO_TOKEN = -1  # fills rows up where there is no token

# Logical dimensions of the logits and of the arrays of a `Cache`, except mixers' caches.
_DIMENSIONS = {
  "lengths": ("batch",),
  "logits": ("batch",),
  **KEYS_AND_VALUES._asdict(),
  **FAST_CACHE._asdict(),
  **SOLVED_SUMS._asdict(),
}


@dataclasses.dataclass(frozen=True)
class GenerationState:
  """Holds all that generation needs to continue its rows.

  Attributes:
    cache: fast weights, unfinished chunks, and the KV cache or the states of other mixers, after
      `cache.lengths` tokens of each row.
    logits: the logits of each row's next token; arbitrary where no token was read.
    origin: the model that made the cache, or its fingerprint. The model stays in memory until `model` is
      read or the state is saved.
  """

  cache: Cache
  logits: Float[Array, "B V"]
  origin: Reader | str

  @property
  def model(self) -> str:
    """Returns the fingerprint of the model.

    Raises:
      UserError: the model's arrays have been deleted or donated.
    """
    if isinstance(self.origin, str):
      return self.origin
    if any(x.is_deleted() for x in jax.tree.leaves(self.origin)):
      raise UserError(
        "the state's model was deleted or donated before its fingerprint was taken: save the state, or "
        "read state.model, before you delete the model"
      )
    fingerprint = self.origin.fingerprint()
    object.__setattr__(self, "origin", fingerprint)
    return fingerprint

  def check(self, reader: Reader) -> None:
    """Raises UserError unless this model made the state; computes fingerprints only for another reader."""
    if self.origin is not reader:
      check_model(self.model, reader.fingerprint())

  def fast_weights_only(self) -> "GenerationState":
    """Returns a state with only the fast weights: empty attention caches, positions from 0.

    The tokens after the last full chunk are dropped: no fast weight has learned them.
    """
    layers = tuple(
      layer._replace(
        attention=jax.tree.map(jnp.zeros_like, _first_slots(layer.attention, 0)),
        fast=None
        if layer.fast is None
        else layer.fast._replace(
          z=jnp.zeros_like(layer.fast.z), source=jnp.zeros_like(layer.fast.source)
        ),
      )
      for layer in self.cache.layers
    )
    return GenerationState(
      cache=Cache(jnp.zeros_like(self.cache.lengths), layers),
      logits=jnp.zeros_like(self.logits),
      origin=self.origin,
    )

  def save(self, path: str | Path) -> None:
    """Writes the state to a safetensors file; an existing file stays until the new one is whole.

    Empty slots of the KV cache are left out.
    """
    longest = int(jnp.max(self.cache.lengths, initial=0))
    layers = tuple(
      layer._replace(attention=_first_slots(layer.attention, longest))
      for layer in self.cache.layers
    )
    arrays = named_leaves(Cache(self.cache.lengths, layers), ".") | {"logits": self.logits}
    metadata = {"format": _FORMAT, "model": self.model}
    with atomic_file(path) as unfinished:
      save_file(
        {name: jax.device_put(x, jax.devices()[0]) for name, x in arrays.items()},
        unfinished,
        metadata,
      )


def _first_slots(cache: Any, slots: int) -> Any:
  """Cuts a KV cache to its first slots; the cache of another mixer has no slots and stays as it is."""
  if not isinstance(cache, KeyValueCache):
    return cache
  return jax.tree.map(lambda x: x[:, :slots], cache)


def load_state(path: str | Path, model: Transformer | Reader) -> GenerationState:
  """Loads a saved state onto the model's devices; the mesh may differ from the one that saved it.

  Raises:
    UserError: the file does not exist, is not a state, or is the state of another model.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"state {str(path)!r} is not there")
  try:
    with safe_open(path, framework="flax") as file:
      metadata = file.metadata() or {}
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise UserError(
      f"state {str(path)!r} cannot be read, it is cut off or no state: {error}"
    ) from error
  if metadata.get("format") != _FORMAT:
    raise UserError(f"{str(path)!r} is no saved state of ttt_jax: write one with state.save(path)")
  reader = Reader.of(model)
  check_model(metadata["model"], reader.fingerprint())
  logits = arrays.pop("logits")
  rows = logits.shape[0]
  update = any(".fast." in name for name in arrays)
  like = jax.eval_shape(lambda: reader.empty_cache(rows, 1, update=update))
  leaves = [arrays[name] for name in named_leaves(like, ".")]
  cache = jax.tree.unflatten(jax.tree.structure(like), leaves)
  return GenerationState(cache, logits, metadata["model"])


def check_model(state_model: str, model: str) -> None:
  """Raises UserError unless the fingerprint of a state's model equals that of `model`."""
  if state_model != model:
    raise UserError(
      f"the state is of a model with fingerprint {state_model}, this model has {model}: give the state's "
      "model, since keys, values and fast weights belong to their model"
    )


def new_state(
  reader: Reader, rows: int, tokens: int, *, update: bool
) -> tuple[Cache, Float[Array, "B V"]]:
  """Returns an empty cache with room for `tokens` per row, and placeholder logits.

  Both are allocated on the model's devices in their sharded layout: never whole on one device.
  """
  config = reader.model

  def make():
    logits = jnp.zeros((rows, config.vocab_size), accumulation_dtype(jnp.dtype(config.dtype)))
    return {"cache": reader.empty_cache(rows, tokens, update=update), "logits": logits}

  shardings = _shardings(jax.eval_shape(make), reader, split_rows=True)
  return tuple(jax.jit(make, out_shardings=shardings)().values())


def copy_to_model(
  cache: Cache, logits: Float[Array, "B V"], reader: Reader, *, split_rows: bool
) -> tuple[Cache, Float[Array, "B V"]]:
  """Returns copies, which can be donated, on the model's devices in their sharded layout."""
  arrays = {"cache": cache, "logits": logits}
  shardings = _shardings(arrays, reader, split_rows=split_rows)
  return tuple(jax.tree.map(jnp.copy, jax.device_put(arrays, shardings)).values())


def _shardings(arrays: dict[str, Any], reader: Reader, *, split_rows: bool) -> Any:
  mesh = reader.mesh()
  if mesh is None:
    return reader.embed.table[...].sharding
  return state_shardings(arrays, mesh, split_rows=split_rows)


def state_shardings(arrays: dict[str, Any], mesh: Mesh, *, split_rows: bool) -> dict[str, Any]:
  """Returns the sharding of every array of `cache` and `logits`; `split_rows=False` does not split rows."""
  dimensions = _DIMENSIONS | mixer_cache_dims()

  def array_sharding(path, _):
    dims = dimensions[jax.tree_util.keystr(path[-1:], simple=True)]
    return sharding(mesh, *(dims if split_rows else (None, *dims[1:])))

  return jax.tree.map_with_path(array_sharding, arrays)


def grow(cache: Cache, reader: Reader, capacity: int) -> Cache:
  """Returns the cache padded to slots for rows of `capacity` tokens."""
  like = jax.eval_shape(lambda: reader.empty_cache(cache.lengths.shape[0], capacity))

  def fill(x, target):
    missing = target.shape[1] - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, max(0, missing)), (0, 0), (0, 0)])

  layers = tuple(
    layer._replace(attention=jax.tree.map(fill, layer.attention, wanted.attention))
    if isinstance(layer.attention, KeyValueCache)
    else layer
    for layer, wanted in zip(cache.layers, like.layers)
  )
  return cache._replace(layers=layers)
