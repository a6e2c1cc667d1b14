"""Tokenises text on the host, as bytes or with a tokenizer.

In `ttt_jax.data` a `Tokenizer | None` is None for bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.data.boundaries import Boundaries
from ttt_jax.errors import UserError

VOCAB_SIZE = 256  # one token per byte

_BATCH_BYTES = 1 << 22  # of text that a tokenizer gets at a time, for all its threads
_PROBE = (
  "Don't  panic:\n\tx_1 = 3.14e-5  # \u00e9t\u00e9 \u4f60\u597d \u0417\u0434\u0440 \U0001f600\r\n"
)


def encode(text: str) -> Int32[np.ndarray, "T"]:
  """Returns the UTF-8 bytes of `text`, one token each."""
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: Integer[Any, "T"] | Sequence[int]) -> str:
  """Returns the text of these bytes; U+FFFD replaces bytes that are not UTF-8.

  Raises:
    UserError: a token is not a byte.
  """
  tokens = np.asarray(tokens, np.int64)
  foreign = tokens[(tokens < 0) | (tokens >= VOCAB_SIZE)]
  if foreign.size:
    raise UserError(f"token {foreign[0]} is not a byte: decode takes 0 to {VOCAB_SIZE - 1}")
  return tokens.astype(np.uint8).tobytes().decode(errors="replace")


def vocab_size(tokenizer: Tokenizer | None) -> int:
  return VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size


def token_dtype(tokenizer: Tokenizer | None) -> np.dtype:
  """Returns the narrowest dtype that holds every token: uint8, uint16 or uint32."""
  return np.min_scalar_type(vocab_size(tokenizer) - 1)


def fingerprint(tokenizer: Tokenizer | None) -> str:
  """Hashes the vocabulary and an encoded text, so that equal tokenizers have equal fingerprints.

  The saved file is not hashed, because it differs between versions of the tokenizer library.
  """
  if tokenizer is None:
    return "bytes"
  behaviour = [sorted(tokenizer.vocabulary().items()), tokenizer.encode(_PROBE)]
  return hashlib.blake2b(json.dumps(behaviour).encode(), digest_size=16).hexdigest()


def tokenized(
  texts: Iterable[tuple[str, bytes]],
  tokenizer: Tokenizer | None,
  boundaries: Boundaries,
) -> Iterator[tuple[str, Integer[np.ndarray, "T"]]]:
  """Yields (name, tokens) for every (name, UTF-8), in order, with a few MB of text in memory at a time.

  Args:
    boundaries: the tokens around the documents of this tokenizer; not used for bytes.
  """
  if tokenizer is None:
    yield from ((name, np.frombuffer(text, np.uint8)) for name, text in texts)
    return
  dtype = token_dtype(tokenizer)

  def encoded(batch):
    ids = tokenizer.encode_batch(
      [text.decode() for _, text in batch], add_special_tokens=boundaries.special
    )
    documents = map(boundaries.add_to, ids)
    return ((name, np.asarray(tokens, dtype)) for (name, _), tokens in zip(batch, documents))

  batch, size = [], 0
  for name, text in texts:
    batch.append((name, text))
    size += len(text)
    if size >= _BATCH_BYTES:
      yield from encoded(batch)
      batch, size = [], 0
  if batch:
    yield from encoded(batch)
