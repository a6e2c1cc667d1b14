"""Generates in batches: prompts are prefilled in pieces, then every step makes one token per row.

Rows have prompts of different lengths, and each row has its own fast weights and chunks. This file has the
host's part: it counts tokens and calls the compiled programs of `programs.py`.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ttt_jax.errors import UserError
from ttt_jax.generation import programs
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.pieces import piece_length, room_for
from ttt_jax.generation.sampling import check_sampling
from ttt_jax.generation.state import (
  NO_TOKEN,
  GenerationState,
  copy_to_model,
  grow,
  new_state,
)
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import row_shards


@dataclass(frozen=True)
class Generation:
  """`generate` returns this: the tokens, and the state from which another call continues.

  Attributes:
    tokens: prompts and new tokens, right-padded with -1.
    prompt_lengths: the number of prompt tokens per row.
    lengths: the number of all tokens per row.
    state: the state after these tokens.
    read_seconds: time for the prompts, with compilation, if any.
    write_seconds: time for the new tokens, with compilation, if any.
  """

  tokens: Int[np.ndarray, "B T"]
  prompt_lengths: Int[np.ndarray, "B"]
  lengths: Int[np.ndarray, "B"]
  state: GenerationState
  read_seconds: float
  write_seconds: float

  @property
  def new_tokens(self) -> list[np.ndarray]:
    """Returns the new tokens of each row."""
    return [
      row[start:end] for row, start, end in zip(self.tokens, self.prompt_lengths, self.lengths)
    ]


def generate(
  model: Transformer | Reader,
  tokens: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  seed: int = 0,
  stop: Sequence[int] | None = None,
  state: GenerationState | None = None,
  update: bool = True,
) -> Generation:
  """Continues every row; its fast weights learn along the prompt and along the new tokens.

  A row's chunks are counted from its first token, over the tokens of earlier calls in `state`, the prompt
  and the new tokens. A chunk is learned when it is full; its own tokens are read with the state before it.
  Runs on the devices that hold the model, with prompts split over the mesh's `context` axis and rows over
  `data` and `fsdp`.

  Args:
    model: the model. Its layers are copied once, and the copy stays until a parameter is replaced or freed;
      give `Reader.of(model, donate=True)` where memory does not hold both.
    tokens: prompts, `[B, T]` or lists of different lengths. With a state they follow its tokens, and may be
      empty.
    max_new_tokens: the largest number of new tokens per row.
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw from this many likeliest tokens; None for all.
    top_p: draw, of these, from the fewest whose probabilities sum to at least this; None for all.
    min_p: draw from the tokens that are at least this times as likely as the likeliest; None for all.
    seed: the seed of the draws. A row's draws do not depend on the other rows, nor on interruptions.
    stop: tokens after which a row ends; None for the model's end tokens, () for none.
    state: the state of an earlier call with as many rows; it stays usable.
    update: False keeps the fast weights as they are.

  Raises:
    UserError: a prompt is empty, a token is outside the vocabulary, a value is out of range, or the state
      belongs to another model.

  Example:
      result = ttt_jax.generate(model, [[5, 7, 9], [4]], max_new_tokens=20)
      result.new_tokens[0]; result.state.save("state.safetensors")
  """
  stream = Stream(
    model,
    tokens,
    max_new_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    seed=seed,
    stop=stop,
    state=state,
    update=update,
  )
  for _ in stream:
    pass
  return stream.result()


class Stream:
  """Iterates over the new tokens of `generate`: yields, for each row, the tokens made since the last yield.

  The constructor prefills the prompts. `result()` can be called at any time.
  """

  def __init__(
    self,
    model: Transformer | Reader,
    tokens: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    state: GenerationState | None = None,
    update: bool = True,
  ):
    if max_new_tokens < 0:
      raise UserError(f"max_new_tokens={max_new_tokens} must not be negative")
    check_sampling(temperature, top_k, top_p, min_p)
    self._reader = model = Reader.of(model)
    if state is not None:
      state.check(model)
    stop = model.model.eos_ids if stop is None else tuple(stop)
    if any(not 0 <= token < model.model.vocab_size for token in stop):
      raise UserError(f"stop={list(stop)}: the model has tokens 0 to {model.model.vocab_size - 1}")
    self._prompts = _prompts(tokens, model.model.vocab_size, state)
    _check_positions(model, self._prompts, max_new_tokens, state)
    self._mesh = model.mesh()
    self._chunk = model.ttt.chunk_size if model.ttt.layers and update else None
    self._remaining = max_new_tokens
    self._written: list[list[int]] = [[] for _ in self._prompts]
    self._sampling = {
      "seed": jnp.int32(seed),
      "temperature": jnp.float32(temperature),
      "top_k": top_k,
      "top_p": top_p,
      "min_p": min_p,
      "stop": stop,
    }
    started = time.perf_counter()
    with self._devices():
      self._make_cache(state, max_new_tokens, update)
      self._prefill_prompts()
    self._read_seconds = time.perf_counter() - started
    self._write_seconds = 0.0

  def __iter__(self) -> Iterator[list[list[int]]]:
    return self

  def __next__(self) -> list[list[int]]:
    if not self._remaining or not self._active.any():
      raise StopIteration
    started = time.perf_counter()
    with self._devices():
      made = self._write()
    self._write_seconds += time.perf_counter() - started
    for row, tokens in zip(self._written, made):
      row.extend(tokens)
    return made

  def result(self) -> Generation:
    """Returns the tokens so far, and a state that later steps do not change."""
    rows = [[*prompt, *written] for prompt, written in zip(self._prompts, self._written)]
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.full((len(rows), lengths.max()), NO_TOKEN, np.int32)
    for row, filled in zip(rows, tokens):
      filled[: len(row)] = row
    copies = jax.tree.map(lambda x: jnp.copy(x[: len(rows)]), (self._cache, self._logits))
    return Generation(
      tokens=tokens,
      prompt_lengths=np.array([len(prompt) for prompt in self._prompts], np.int64),
      lengths=lengths,
      state=GenerationState(*copies, self._reader),
      read_seconds=self._read_seconds,
      write_seconds=self._write_seconds,
    )

  def _devices(self):
    return nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

  def _make_cache(self, state: GenerationState | None, max_new_tokens: int, update: bool) -> None:
    """Makes the cache, or copies that of `state`, with room for the prompts and all new tokens."""
    real = len(self._prompts)
    rows = real + -real % row_shards(self._mesh)  # empty rows fill up the shards
    new = np.array([len(prompt) + max_new_tokens for prompt in self._prompts])
    self._active = np.arange(rows) < real
    if state is None:
      self._lengths = np.zeros(rows, np.int64)
      room = room_for(int(new.max()))
      self._cache, self._logits = new_state(self._reader, rows, room, update=update)
      return
    copied = copy_to_model(state.cache, state.logits, self._reader, split_rows=False)
    cache, logits = jax.tree.map(lambda x: _pad_rows(x, rows), copied)
    self._lengths = np.asarray(cache.lengths).astype(np.int64)
    cache = grow(cache, self._reader, room_for(int(np.max(self._lengths[:real] + new))))
    self._cache, self._logits = copy_to_model(cache, logits, self._reader, split_rows=True)

  def _prefill_prompts(self) -> None:
    rest = [list(prompt) for prompt in self._prompts]
    rest += [[] for _ in range(len(self._active) - len(rest))]
    while any(rest):
      begun = self._lengths % self._chunk if self._chunk else np.zeros_like(self._lengths)
      length = piece_length([len(prompt) for prompt in rest], begun, self._chunk or 1)
      # Every row stops at the end of a chunk or of its prompt.
      counts = np.minimum([len(prompt) for prompt in rest], np.maximum(length - begun, 0))
      tokens = np.zeros((len(rest), length), np.int32)
      for row, count in enumerate(counts):
        tokens[row, :count] = rest[row][:count]
        del rest[row][:count]
      self._logits, self._cache = programs.prefill(
        self._reader,
        tokens,
        self._logits,
        self._cache,
        counts.astype(np.int32),
        aligned=not np.any(begun[counts > 0]),
      )
      self._lengths += counts
    jax.block_until_ready(self._logits)

  def _write(self) -> list[list[int]]:
    """Makes at most `STEPS` tokens per row; stops at a row's full chunk, or when all rows have ended."""
    steps = min(programs.STEPS, self._remaining)
    made, active, self._logits, self._cache = programs.write(
      self._reader,
      self._logits,
      self._cache,
      self._active,
      np.int32(steps),
      chunk_size=self._chunk,
      **self._sampling,
    )
    made = np.asarray(made)
    made = made[:, : np.max(np.sum(made != NO_TOKEN, axis=1))]
    counts = np.sum(made != NO_TOKEN, axis=1)
    self._remaining -= made.shape[1]
    self._lengths += counts
    self._active = np.asarray(active)
    if self._chunk:
      for row in np.flatnonzero((counts > 0) & (self._lengths % self._chunk == 0)):
        self._cache = programs.learn(self._reader, self._cache, np.int32(row))
    return [row[row != NO_TOKEN].tolist() for row in made[: len(self._prompts)]]


def _prompts(tokens, vocab_size: int, state: GenerationState | None) -> list[list[int]]:
  """Returns the prompts as lists; raises UserError for prompts that the model cannot read."""
  if isinstance(tokens, (jax.Array, np.ndarray)):
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
      raise UserError(
        f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, expected integers [B, T]"
      )
    tokens = np.asarray(tokens).tolist()
  prompts = [list(map(int, prompt)) for prompt in tokens]
  if not prompts:
    raise UserError("tokens has no rows: give at least one prompt")
  if state is not None and len(prompts) != len(state.cache.lengths):
    raise UserError(f"tokens has {len(prompts)} rows, the state {len(state.cache.lengths)}")
  for row, prompt in enumerate(prompts):
    if not prompt and (state is None or not state.cache.lengths[row]):
      raise UserError(
        f"prompt {row} is empty: give at least one token, the model's bos for instance"
      )
    for token in prompt:
      if not 0 <= token < vocab_size:
        raise UserError(
          f"prompt {row} holds token {token}, the model has 0 to {vocab_size - 1}: is it another "
          "model's tokenizer?"
        )
  return prompts


def _check_positions(model, prompts, max_new_tokens, state) -> None:
  read = [0] * len(prompts) if state is None else np.asarray(state.cache.lengths).tolist()
  longest = max(n + len(prompt) for n, prompt in zip(read, prompts)) + max_new_tokens
  limit = model.model.max_positions
  if limit is not None and longest > limit:
    warnings.warn(
      f"{longest} tokens are more than the model's max_positions={limit}: its attention was not trained "
      "there; its fast weights keep learning",
      stacklevel=4,
    )


def _pad_rows(x: Array, rows: int) -> Array:
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
