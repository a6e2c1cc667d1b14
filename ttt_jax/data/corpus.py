"""Loads the documents of a run and splits them into training and held-out documents.

Rows are made from `Documents`, which give random access by number and know all lengths. Text is tokenised
when it is loaded and stays in memory; a prepared corpus (`prepared.py`) stays on disk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.config import DataConfig
from ttt_jax.data.boundaries import boundaries, special_ids
from ttt_jax.data.files import FORMATS, METADATA, Files, find_files, real_paths
from ttt_jax.data.formats import has_text_field, load_texts
from ttt_jax.data.interleave import Interleave
from ttt_jax.data.prepared import PreparedCorpus, PreparedDocuments
from ttt_jax.data.skipped import Skipped, stable_hash
from ttt_jax.data.tokens import decode, tokenized
from ttt_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Document:
  """Holds the tokens of one document."""

  name: str  # the path below the source's root; PATH:RECORD if a file holds several
  tokens: Integer[np.ndarray, "T"]


@runtime_checkable
class Documents(Protocol):
  """Gives random access to documents by number.

  Attributes:
    lengths: the number of tokens of each document.
  """

  lengths: Integer[np.ndarray, "documents"]

  def __len__(self) -> int: ...

  def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, "T"] | None:
    """Returns tokens `start` to `stop` of a document, or to its end; None if they are corrupt (counted).

    Several threads call this method.
    """

  def order(self, seed: int) -> Sequence[int]:
    """Returns the numbers of all documents in an order drawn from the seed."""


class InMemory(tuple[Document, ...]):
  """Holds `Documents` as a tuple in memory."""

  @property
  def lengths(self) -> Integer[np.ndarray, "documents"]:
    return np.array([document.tokens.size for document in self], np.int64)

  def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, "T"]:
    return self[document].tokens[start:stop]

  def order(self, seed: int) -> Sequence[int]:
    keys = [(stable_hash(f"{seed}:{d.name}"), d.name, i) for i, d in enumerate(self)]
    return [i for *_, i in sorted(keys)]


@dataclass(frozen=True, eq=False)
class Source:
  """Describes one source of a mixture, split into training and held-out documents."""

  name: str  # for messages
  train: Documents
  heldout: Documents
  weight: float = 1.0  # share of the tokens, relative to other weights
  end_of_text: bool = False  # whether each document ends with an end-of-text token
  text_field: str | None = None  # the field that a prepared corpus was made from


@dataclass(frozen=True, eq=False)
class Corpus:
  """Holds all documents of a run, and the counts of what was skipped."""

  sources: tuple[Source, ...]
  skipped: Skipped = field(default_factory=Skipped)
  tokenizer: Tokenizer | None = None  # None: bytes

  def decode(
    self, tokens: Integer[Any, "T"] | Sequence[int], *, skip_special_tokens: bool = False
  ) -> str:
    """Returns the text of tokens; U+FFFD replaces bytes that are not UTF-8."""
    if self.tokenizer is None:
      return decode(tokens)
    return self.tokenizer.decode(
      np.asarray(tokens).tolist(), skip_special_tokens=skip_special_tokens
    )

  def report(self) -> str:
    unit = "bytes" if self.tokenizer is None else "tokens"
    weights = sum(source.weight for source in self.sources)

    def size(documents):
      return f"{len(documents):,} ({documents.lengths.sum(dtype=np.int64):,} {unit})"

    def ends(source):
      if special_ids(self.tokenizer)[1] is None:
        return ""
      return f"each with{'' if source.end_of_text else 'out'} an end-of-text token; "

    def line(source):
      share = f" {source.weight / weights:.1%} of the tokens," if len(self.sources) > 1 else ""
      field = "" if source.text_field is None else f" prepared from the field {source.text_field};"
      return (
        f"{source.name}:{share}{field} documents for training {size(source.train)}, held out "
        f"{size(source.heldout)}; {ends(source)}"
      )

    return "\n".join(map(line, self.sources)) + f"skipped: {self.skipped}."


def load_corpus(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
  """Loads the documents of `config.path` or `config.mixture`; prepared documents stay on disk.

  A document is held out if `hash(name) < heldout_fraction`, whatever the seed and the other documents
  are. Only if a side would be empty, the document with the lowest hash is held out, or the document with
  the highest hash is trained on. The seed sets the order on each side. `skipped` counts what is not loaded.
  The tokenizer, None for bytes, changes neither the split nor the order.

  Raises:
    UserError: a source does not exist, holds fewer than two readable documents, or was prepared with
      another tokenizer, from another text field, with other document boundaries or incompletely; two
      sources hold the same file; there are too many corrupt records; the tokenizer has no token for a
      requested boundary; no source has the requested text field.
  """
  skipped = Skipped(config.max_bad_records)
  found: list[PreparedCorpus | Files] = []
  owners: dict[str, str] = {}
  for name, path, _ in config.sources:
    if path and (Path(path).expanduser() / METADATA).is_file():
      corpus = PreparedCorpus(
        path,
        field=name,
        tokenizer=tokenizer,
        skipped=skipped,
        start_of_text=config.start_of_text,
        end_of_text=config.end_of_text,
      )
      _check_unshared([Path(path).expanduser()], f"{name}={path!r}", owners)
      found.append(corpus)
    else:
      files = find_files(path, skipped, field=name)
      _check_unshared(files.paths, f"{name}={path!r}", owners)
      found.append(files)
  _check_text_field(config.text_field, found)

  sources = []
  for (name, path, weight), source in zip(config.sources, found, strict=True):
    if isinstance(source, PreparedCorpus):
      is_heldout = _heldout_mask(source.name_hashes, config.heldout_fraction)
      train, heldout = (
        PreparedDocuments(source, np.flatnonzero(x)) for x in (~is_heldout, is_heldout)
      )
      field = source.text_field or None
      sources.append(Source(path, train, heldout, weight, source.end_of_text, field))
    else:
      shown = f"{name}={path!r}"
      sources.append(_load_source(config, source, weight, shown, seed, tokenizer, skipped))
  return Corpus(tuple(sources), skipped, tokenizer)


def _check_text_field(given: str | None, sources: Sequence[PreparedCorpus | Files]) -> None:
  """Raises UserError if no source has or may have records with the given field."""
  if given is None:
    return
  prepared = [x.text_field for x in sources if isinstance(x, PreparedCorpus)]
  has_records = any(
    has_text_field(path) for x in sources if not isinstance(x, PreparedCorpus) for path in x.paths
  )
  if has_records or given in prepared or None in prepared:  # None: an older version made it
    return
  if fields := sorted(set(filter(None, prepared))):
    raise UserError(
      f"data.text_field={given!r}, but the corpus was prepared from the field {', '.join(fields)}: leave "
      f"it out, or prepare the corpus again with --text-field {given}"
    )
  raise UserError(
    f"data.text_field={given!r} has no effect, no source has records with fields: leave it out"
  )


def _load_source(config, files, weight, shown, seed, tokenizer, skipped) -> Source:
  """Loads a source into memory."""
  text_field = "text" if config.text_field is None else config.text_field
  texts = (
    text
    for file in files.paths
    for text in load_texts(file, files.name_of(file), text_field=text_field, skipped=skipped)
  )
  ends = boundaries(
    tokenizer,
    start_of_text=config.start_of_text,
    end_of_text=config.end_of_text,
    name=config.tokenizer or "of init_from",
  )
  documents = [Document(name, tokens) for name, tokens in tokenized(texts, tokenizer, ends)]
  if len(documents) < 2:
    found = "one readable document only" if documents else "no readable document"
    raise UserError(
      f"{shown} holds {found} (skipped: {skipped}): give a "
      f"directory or glob with two documents or more, one to train on and one to hold out, in "
      f"{FORMATS}; a single long text can be cut into several files"
    )
  documents.sort(key=lambda document: (stable_hash(f"{seed}:{document.name}"), document.name))
  hashes = np.array([stable_hash(document.name) for document in documents], np.uint64)
  is_heldout = _heldout_mask(hashes, config.heldout_fraction)
  train, heldout = (
    InMemory(documents[i] for i in np.flatnonzero(x)) for x in (~is_heldout, is_heldout)
  )
  return Source(files.source, train, heldout, weight, ends.end is not None)


def _check_unshared(paths: Sequence[Path], source: str, owners: dict[str, str]) -> None:
  """Raises UserError if another source has one of these files: the two splits could differ."""
  for path, real in zip(paths, real_paths(paths)):
    if owners.setdefault(real, source) != source:
      raise UserError(
        f"{owners[real]} and {source} both hold {path}: one would train on documents that the other "
        "holds out; leave it out of one of them, and to use it more often raise the weight of the other"
      )


def _heldout_mask(name_hashes: np.ndarray, fraction: float) -> np.ndarray:
  """Returns the mask of held-out documents: at least one is held out, and at least one is not."""
  heldout = name_hashes < np.uint64(int(fraction * 2**64))
  heldout[np.argmax(name_hashes)] = False
  heldout[np.argmin(name_hashes)] = True
  return heldout


def heldout_rows(
  sources: Sequence[Source],
  *,
  seq_len: int,
  max_documents: int,
  seed: int,
  name: str = "eval.seq_len",
) -> Int32[np.ndarray, "B T"]:
  """Returns the first `seq_len` tokens of at most `max_documents` held-out documents, ordered by the seed.

  Several sources contribute by weight, as long as they have documents of that length.

  Args:
    name: the field of `seq_len`, for messages.

  Raises:
    UserError: no held-out document has `seq_len` tokens.
  """
  lengths = [source.heldout.lengths for source in sources]
  if not any(array.size for array in lengths):
    raise UserError("no held-out documents: data.path must hold at least two documents")
  rows = [_long_rows(source.heldout, seq_len, seed) for source in sources]
  turns = Interleave([source.weight for source in sources])
  turn, exhausted, found = 0, set(), []
  while len(found) < max_documents and len(exhausted) < len(sources):
    source, _ = turns(turn)
    turn += 1
    row = next(rows[source], None)
    if row is None:
      exhausted.add(source)
    else:
      found.append(row)
  if not found:
    longest = max(int(array.max(initial=0)) for array in lengths)
    raise UserError(
      f"{name}={seq_len} is longer than each of the {sum(array.size for array in lengths)} "
      f"held-out documents, the longest of which has {longest} tokens: use {longest} or "
      "less, or hold out more or longer documents (data.heldout_fraction, data.path)"
    )
  return np.stack(found).astype(np.int32)


def _long_rows(documents: Documents, seq_len: int, seed: int) -> Iterator[np.ndarray]:
  lengths = documents.lengths
  for document in map(int, documents.order(seed)):
    if lengths[document] >= seq_len:
      row = documents.read(document, 0, seq_len)
      if row is not None:
        yield row
