"""Measures without a model how much of a text its distant past tells: the reach of a corpus.

A compressor codes a block after c bytes of the document before it, for growing c. What it saves over the
smallest c is what a memory of c bytes can save. A compressor starts without knowledge, and would learn
from the document what every trained model knows, the language. So it first codes a primer, text of other
documents: then the savings are those of this document's own names, phrases and lines.
"""

import importlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ttt_jax.data.files import FORMATS, METADATA, find_files
from ttt_jax.data.formats import checked_text_field, load_texts
from ttt_jax.data.skipped import Skipped, stable_hash
from ttt_jax.errors import UserError

_ORDER = 24  # bytes of context in PPMd; more change nothing
_MEMORY_PER_BYTE = 128  # that PPMd gets; it needs about 50 and would forget everything with less
_LEAST_MEMORY, _MOST_MEMORY = 1 << 24, (1 << 32) - 64
_LISTED = 3  # lengths of the longest documents that a message lists


def _ppmd(before: bytes, block: bytes) -> int:
  """Codes with PPMd var. H, contexts of 24 bytes; bytes that are not yet flushed are those of `before`."""
  memory = max(_LEAST_MEMORY, _MEMORY_PER_BYTE * (len(before) + len(block)))
  encoder = _pyppmd().Ppmd7Encoder(_ORDER, min(memory, _MOST_MEMORY))
  encoder.encode(before)
  return len(encoder.encode(block))


def _pyppmd():
  try:
    return importlib.import_module("pyppmd")
  except ModuleNotFoundError as error:
    raise UserError(
      "compressor='ppmd' needs pyppmd: pip install 'ttt_jax[reach]', or take compressor='lzma'"
    ) from error


def _lzma(before: bytes, block: bytes) -> int:
  """Codes with LZMA2 twice, without and with the block, in a window that holds all."""
  window = max(1 << 16, len(before) + len(block))
  filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
  sizes = [
    len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))
    for data in (before + block, before)
  ]
  return sizes[0] - sizes[1]


COMPRESSORS: dict[str, Callable[[bytes, bytes], int]] = {"ppmd": _ppmd, "lzma": _lzma}


@dataclass(frozen=True)
class ReachConfig:
  """Describes a measurement of reach.

  Attributes:
    contexts: bytes of the document before the block, ascending; savings are over the first.
    block: bytes of a block.
    documents: documents at most, drawn from those that are long enough.
    blocks: blocks of a document, drawn anywhere behind the longest context.
    primer: bytes of the other documents that are coded before the context.
    compressor: `ppmd` (needs pyppmd), or `lzma`, which copies only.
    seed: the seed of every choice.
    text_field: as `data.text_field`.
  """

  contexts: tuple[int, ...] = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
  block: int = 4096
  documents: int = 32
  blocks: int = 4
  primer: int = 1 << 20
  compressor: str = "ppmd"
  seed: int = 0
  text_field: str | None = None

  def __post_init__(self):
    for name, least in (("block", 1), ("documents", 1), ("blocks", 1), ("primer", 0)):
      if getattr(self, name) < least:
        raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
    if self.primer and self.documents < 2:
      raise UserError(
        f"documents={self.documents} leaves no other document for primer={self.primer}: measure two or "
        "more, or give primer=0"
      )
    ascending = list(self.contexts) == sorted(set(self.contexts))
    if len(self.contexts) < 2 or self.contexts[0] < 0 or not ascending:
      raise UserError(
        f"contexts={list(self.contexts)} must be two or more ascending numbers of bytes, from 0 on"
      )
    if self.compressor not in COMPRESSORS:
      raise UserError(f"compressor={self.compressor!r} must be one of {', '.join(COMPRESSORS)}")
    if self.compressor == "ppmd" and self.read * _MEMORY_PER_BYTE > _MOST_MEMORY:
      raise UserError(
        f"the longest of contexts, {self.contexts[-1]}, with primer={self.primer} is more than PPMd "
        f"remembers, {_MOST_MEMORY // _MEMORY_PER_BYTE} bytes: give less, or take compressor='lzma'"
      )

  @property
  def length(self) -> int:
    """Returns the bytes that a document needs: the longest context and the block."""
    return self.contexts[-1] + self.block

  @property
  def read(self) -> int:
    """Returns the bytes that the compressor gets at most."""
    return self.primer + self.length


class Text(NamedTuple):
  """Holds the name of a document and its UTF-8."""

  name: str
  data: bytes


class Sample(NamedTuple):
  """Holds the documents to measure, and counts of the whole corpus: long documents, all, their bytes."""

  documents: list[Text]
  long: int
  all: int
  bytes: int


def sample(path: str | None, config: ReachConfig, skipped: Skipped) -> Sample:
  """Draws `config.documents` documents of `config.length` bytes from `path`, which is as `data.path`.

  No more texts than these are in memory at a time.

  Raises:
    UserError: no document is long enough, or only one though a primer is wanted; `path` is a prepared
      corpus; pyppmd is needed and missing; as `find_files` and `load_texts`.
  """
  if config.compressor == "ppmd":
    _pyppmd()  # before all is read
  if path and (Path(path).expanduser() / METADATA).is_file():
    raise UserError(
      f"path={path!r} is a prepared corpus of tokens: reach is that of text, so name the text that it "
      "was made from"
    )
  lengths: list[int] = []
  documents = nsmallest(
    config.documents,
    (text for text in _texts(path, config, skipped, lengths) if len(text.data) >= config.length),
    key=lambda text: (stable_hash(f"{config.seed}:{text.name}"), text.name),
  )
  if len(documents) < (2 if config.primer else 1):
    if not lengths:
      raise UserError(
        f"path={path!r} holds no text (skipped: {skipped}): give a directory or glob of {FORMATS}"
      )
    longest = ", ".join(f"{n:,}" for n in nlargest(_LISTED, lengths))
    what = "holds one document" if documents else "holds no document"
    primer = " (a primer needs a second one; --primer 0 does without)" if documents else ""
    raise UserError(
      f"path={path!r} {what} of {config.length:,} bytes, the longest of --contexts and the --block "
      f"behind it{primer}: the longest of its {len(lengths):,} documents have {longest} bytes (skipped: "
      f"{skipped}); give shorter --contexts, or join the files of a package or a book into one document "
      "with ttt-jax data join"
    )
  return Sample(documents, sum(n >= config.length for n in lengths), len(lengths), sum(lengths))


def _texts(path, config: ReachConfig, skipped: Skipped, lengths: list[int]) -> Iterator[Text]:
  """Yields all documents, and appends their lengths."""
  files = find_files(path, skipped, field="path")
  text_field = checked_text_field(config.text_field, files)
  for file in files.paths:
    for name, data in load_texts(file, files.name_of(file), text_field=text_field, skipped=skipped):
      lengths.append(len(data))
      yield Text(name, data)


def bits(
  documents: Sequence[Text], config: ReachConfig, on_coded: Callable[[], None] = lambda: None
) -> Float[np.ndarray, "documents contexts"]:
  """Returns the bits that code a block after each context, the mean over the blocks of a document.

  bits[d, c] = mean over blocks b of 8 * (size(primer_d + context_c(b) + b) - size(primer_d + context_c(b)))

  Args:
    documents: texts of `config.length` bytes or more.
    config: the measurement.
    on_coded: called after each block of a document and context.

  Raises:
    UserError: pyppmd is missing.
  """
  code = COMPRESSORS[config.compressor]
  result = np.empty((len(documents), config.blocks, len(config.contexts)))
  for d, document in enumerate(documents):
    rng = np.random.default_rng(stable_hash(f"{config.seed}:{document.name}"))
    primer = _primer([text.data for text in documents if text is not document], config.primer, rng)
    starts = rng.integers(
      config.contexts[-1], len(document.data) - config.block, size=config.blocks, endpoint=True
    )
    for b, start in enumerate(starts):
      block = document.data[start : start + config.block]
      for c, context in enumerate(config.contexts):
        result[d, b, c] = 8 * code(primer + document.data[start - context : start], block)
        on_coded()
  return result.mean(axis=1)


def _primer(others: Sequence[bytes], size: int, rng: np.random.Generator) -> bytes:
  """Joins one piece of each of the other documents, drawn anywhere in it, to `size` bytes or less."""
  if not others or not size:
    return b""
  share = -(-size // len(others))
  starts = [int(rng.integers(max(len(text) - share, 0), endpoint=True)) for text in others]
  return b"".join(text[start : start + share] for text, start in zip(others, starts))[:size]
