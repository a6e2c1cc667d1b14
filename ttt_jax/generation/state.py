"""What generation leaves behind, to read and write on: in memory, and in a file."""

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
from ttt_jax.files import whole_file
from ttt_jax.generation.cache import FAST_CACHE
from ttt_jax.generation.decoder import Cache, Reader
from ttt_jax.nn.attention import KEYS_AND_VALUES
from ttt_jax.nn.mixers import mixer_cache_dims
from ttt_jax.nn.transformer import Transformer
from ttt_jax.ops.attention.cached import KeyValueCache
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import sharding
from ttt_jax.parallel.trees import named_leaves

_FORMAT = "ttt_jax generation state 1"
NO_TOKEN = -1  # in place of a token

# Logical dimensions of the arrays of a `Cache` but for those of mixers, and of the logits.
_DIMENSIONS = {
  "lengths": ("batch",),
  "logits": ("batch",),
  **KEYS_AND_VALUES._asdict(),
  **FAST_CACHE._asdict(),
}


@dataclasses.dataclass(frozen=True)
class GenerationState:
  """Where every row of a generation stands.

  Attributes:
    cache: fast weights, unfinished chunks, keys and values or the states in their place;
      `cache.lengths` tokens of a row were read.
    logits: of each row's next token; of no meaning where nothing was read.
    origin: the model whose parameters give the cache its meaning, or its fingerprint. The model is kept
      in memory until the fingerprint is asked for, or the state is saved.
  """

  cache: Cache
  logits: Float[Array, "B V"]
  origin: Reader | str

  @property
  def model(self) -> str:
    """The fingerprint of the model.

    Raises:
      UserError: the model's arrays were deleted or donated since.
    """
    if isinstance(self.origin, str):
      return self.origin
    if any(x.is_deleted() for x in jax.tree.leaves(self.origin)):
      raise UserError(
        "the state's model was deleted or donated before its fingerprint was taken: save the state, or "
        "ask for state.model, before that"
      )
    fingerprint = self.origin.fingerprint()
    object.__setattr__(self, "origin", fingerprint)
    return fingerprint

  def check(self, reader: Reader) -> None:
    """Raises UserError unless the state is of this model; only another reader takes fingerprints."""
    if self.origin is not reader:
      check_model(self.model, reader.fingerprint())

  def fast_weights_only(self) -> "GenerationState":
    """What was learned, without the text: no keys and values, linear attention empty, positions from 0.

    The tokens behind the last full chunk were never learned, and are gone.
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
    """Writes the state to a safetensors file; one that is there is replaced only by a whole one.

    Slots for tokens that were not read yet are left out.
    """
    longest = int(jnp.max(self.cache.lengths, initial=0))
    layers = tuple(
      layer._replace(attention=_first_slots(layer.attention, longest))
      for layer in self.cache.layers
    )
    arrays = named_leaves(Cache(self.cache.lengths, layers), ".") | {"logits": self.logits}
    metadata = {"format": _FORMAT, "model": self.model}
    with whole_file(path) as unfinished:
      save_file(
        {name: jax.device_put(x, jax.devices()[0]) for name, x in arrays.items()},
        unfinished,
        metadata,
      )


def _first_slots(cache: Any, slots: int) -> Any:
  """The keys and values of that many tokens; a state has no tokens."""
  if not isinstance(cache, KeyValueCache):
    return cache
  return jax.tree.map(lambda x: x[:, :slots], cache)


def load_state(path: str | Path, model: Transformer | Reader) -> GenerationState:
  """A state that was saved, on the model's devices: the mesh may be another one.

  Raises:
    UserError: no such file, not a state, or one of another model.
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


def check_model(state_of: str, model: str) -> None:
  """Raises UserError unless a state's fingerprint is the model's."""
  if state_of != model:
    raise UserError(
      f"the state is of a model with fingerprint {state_of}, this one's is {model}: keys, values and "
      "fast weights of one model mean nothing to another"
    )


def new_state(
  reader: Reader, rows: int, tokens: int, *, update: bool
) -> tuple[Cache, Float[Array, "B V"]]:
  """The cache of rows that have read nothing, with room for `tokens` each, and logits of no meaning.

  Made where the model is, split over its mesh as it reads them: never whole on one device.
  """
  config = reader.model

  def make():
    logits = jnp.zeros((rows, config.vocab_size), accumulation_dtype(jnp.dtype(config.dtype)))
    return {"cache": reader.empty_cache(rows, tokens, update=update), "logits": logits}

  where = _where(jax.eval_shape(make), reader, split_rows=True)
  return tuple(jax.jit(make, out_shardings=where)().values())


def place(
  cache: Cache, logits: Float[Array, "B V"], reader: Reader, *, split_rows: bool
) -> tuple[Cache, Float[Array, "B V"]]:
  """Copies, which can be donated, where the model is, split over its mesh as it reads them."""
  arrays = {"cache": cache, "logits": logits}
  where = _where(arrays, reader, split_rows=split_rows)
  return tuple(jax.tree.map(jnp.copy, jax.device_put(arrays, where)).values())


def _where(arrays: dict[str, Any], reader: Reader, *, split_rows: bool) -> Any:
  mesh = reader.mesh()
  if mesh is None:
    return reader.embed.table[...].sharding
  return state_shardings(arrays, mesh, split_rows=split_rows)


def state_shardings(arrays: dict[str, Any], mesh: Mesh, *, split_rows: bool) -> dict[str, Any]:
  """Where a `cache` and `logits` lie on the mesh: as the model reads them, or with whole rows."""

  dimensions = _DIMENSIONS | mixer_cache_dims()

  def where(path, _):
    dims = dimensions[jax.tree_util.keystr(path[-1:], simple=True)]
    return sharding(mesh, *(dims if split_rows else (None, *dims[1:])))

  return jax.tree.map_with_path(where, arrays)


def grow(cache: Cache, reader: Reader, capacity: int) -> Cache:
  """The cache with slots for rows of `capacity` tokens."""
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
