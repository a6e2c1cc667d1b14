"""Compiles the programs of `generate`: `prefill` reads a piece of the prompts, `write` makes new tokens.

A third, `learn`, runs when a row's chunk is full. All three take the cache and return the new one.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.generation.decoder import Cache, Reader
from ttt_jax.generation.pieces import piece_length, room_for
from ttt_jax.generation.sampling import sample
from ttt_jax.generation.state import NO_TOKEN, state_shardings
from ttt_jax.nn.transformer import Transformer
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.parameters import shardings

STEPS = 16  # tokens per row of one call of `write`, after which the host sees them


@partial(jax.jit, static_argnames="aligned", donate_argnames=("logits", "cache"))
def prefill(
  reader: Reader,
  tokens: Int[Array, "B T"],
  logits: Float[Array, "B V"],
  cache: Cache,
  counts: Int[Array, "B"],
  *,
  aligned: bool,
) -> tuple[Float[Array, "B V"], Cache]:
  """Reads one piece of the prompts; rows without new tokens keep their logits."""
  new, cache = reader.read(tokens, cache, counts, aligned=aligned)
  return jnp.where((counts > 0)[:, None], new, logits), cache


def trace_read(
  model: Transformer, mesh: Mesh, rows: int, tokens: int
) -> tuple[jax.stages.Traced, int]:
  """Traces the prefill of a whole piece of prompts, on a mesh that need not exist.

  Args:
    model: a model of arrays or `jax.ShapeDtypeStruct`; only its shapes and dtypes count.
    mesh: the mesh.
    rows, tokens: the size of the prompts.

  Returns:
    The program, to be compiled under `jax.set_mesh(mesh)`, and the tokens per row of a piece.
  """

  def with_shardings(shapes, shardings):
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      shapes,
      shardings,
    )

  reader = jax.eval_shape(Reader.of, model)
  reader = with_shardings(reader, shardings(reader, mesh))
  config = reader.model
  with jax.set_mesh(mesh):
    length = piece_length([tokens], np.zeros(1, int), reader.ttt.chunk_size)
    state = {
      "cache": jax.eval_shape(lambda: reader.empty_cache(rows, room_for(tokens))),
      "logits": jax.ShapeDtypeStruct(
        (rows, config.vocab_size), accumulation_dtype(jnp.dtype(config.dtype))
      ),
    }
    state = with_shardings(state, state_shardings(state, mesh, split_rows=True))
    program = prefill.trace(
      reader,
      jax.ShapeDtypeStruct((rows, length), jnp.int32),
      state["logits"],
      state["cache"],
      jax.ShapeDtypeStruct((rows,), jnp.int32),
      aligned=True,
    )
  return program, length


@partial(
  jax.jit,
  static_argnames=("chunk_size", "top_k", "top_p", "min_p", "stop"),
  donate_argnames=("logits", "cache"),
)
def write(
  reader: Reader,
  logits: Float[Array, "B V"],
  cache: Cache,
  active: Bool[Array, "B"],
  limit: Int[Array, ""],
  *,
  seed: Int[Array, ""],
  temperature: Float[Array, ""],
  chunk_size: int | None,
  top_k: int | None,
  top_p: float | None,
  min_p: float | None,
  stop: tuple[int, ...],
) -> tuple[Int[Array, "B steps"], Bool[Array, "B"], Float[Array, "B V"], Cache]:
  """Draws a token for every active row and reads it, up to `limit` times.

  Stops earlier when all rows have ended, or when a chunk is full and has to be learned.

  Returns:
    The tokens (-1 where a row made none), the rows that have not ended, the logits and the cache.
  """
  ends = jnp.asarray(stop, jnp.int32)

  def unfinished(carry):
    step, active, full, *_ = carry
    return (step < limit) & jnp.any(active) & ~full

  def step_once(carry):
    step, active, _, made, logits, cache = carry
    token = sample(logits, seed, cache.lengths, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    new, cache = reader.read(jnp.where(active, token, 0)[:, None], cache, active.astype(jnp.int32))
    logits = jnp.where(active[:, None], new, logits)
    made = made.at[:, step].set(jnp.where(active, token, NO_TOKEN))
    full = jnp.zeros((), bool)
    if chunk_size is not None:
      full = jnp.any(active & (cache.lengths % chunk_size == 0))
    if stop:
      active &= jnp.all(token[:, None] != ends[None], axis=1)
    return step + 1, active, full, made, logits, cache

  made = jnp.full((logits.shape[0], STEPS), NO_TOKEN, jnp.int32)
  start = (jnp.int32(0), active, jnp.zeros((), bool), made, logits, cache)
  _, active, _, made, logits, cache = jax.lax.while_loop(unfinished, step_once, start)
  return made, active, logits, cache


@partial(jax.jit, donate_argnames="cache")
def learn(reader: Reader, cache: Cache, row: Int[Array, ""]) -> Cache:
  """Learns the full chunk of one row."""
  return reader.learn_pending(cache, row)
