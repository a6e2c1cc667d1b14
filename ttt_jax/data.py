"""Text as tokens: files to documents, documents to packed training rows and to held-out rows.

A token is a byte, or what a tokenizer makes of the text, document by document while it is read.

A document longer than a row is cut into pieces of `seq_len` tokens; its shorter rest, and every
document that fits a row, is a piece of its own. All pieces are indexed beforehand, so that Grain
reads them in any order from one counter, and Grain's best-fit packer lays them into rows without
cutting any further. Concat-then-split would pad nothing, but cuts documents that fit a row;
first fit pads more where rows are long. Padding on the standard library, in percent of all tokens,
best fit and first fit: 1.8 and 1.8 in rows of 4096, 1.9 and 2.3 in rows of 32768. The iterator's
state is a small dict of integers; to restore it Grain packs the last 64 rows or fewer once more.

Host side only: arrays here are NumPy's, and nothing is put on a device.
"""

import gzip
import hashlib
import json
import os
import platform
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Integer

from ttt_jax.config import DataConfig
from ttt_jax.pretrained.tokenizer import Tokenizer

VOCAB_SIZE = 256  # one token per byte
IGNORE = -1  # the label of a token that has no successor in its row; the same as in ttt_jax.loss

_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
_FORMATS = ".txt, .md, .py or .jsonl files (each also .gz)"
_NOT_STDLIB = frozenset(
  {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_PACKING_BINS = 64  # rows packed at a time: more of them pad less and take more memory


def encode(text: str) -> Int32[np.ndarray, "T"]:
  """The UTF-8 bytes of `text`, one token each."""
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def decode(tokens: Integer[Any, "T"] | Sequence[int]) -> str:
  """The text of these bytes; U+FFFD stands where they are not UTF-8.

  Raises ValueError if a token is not a byte.
  """
  tokens = np.asarray(tokens, np.int64)
  foreign = tokens[(tokens < 0) | (tokens >= VOCAB_SIZE)]
  if foreign.size:
    raise ValueError(f"token {foreign[0]} is not a byte: decode takes 0 to {VOCAB_SIZE - 1}")
  return tokens.astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True, eq=False)
class Document:
  name: str  # the path below the source's root; for a line of a .jsonl file PATH:LINE
  tokens: Integer[np.ndarray, "T"]


@dataclass(frozen=True, eq=False)
class Corpus:
  """The documents of a source, each either for training or held out, and what was left aside."""

  train: tuple[Document, ...]
  heldout: tuple[Document, ...]
  skipped: dict[str, int]  # reason -> files, directories or .jsonl lines
  source: str
  tokenizer: Tokenizer | None = None  # None: bytes

  def decode(self, tokens: Integer[Any, "T"] | Sequence[int]) -> str:
    """The text of tokens; U+FFFD stands for bytes that are not UTF-8."""
    if self.tokenizer is None:
      return decode(tokens)
    return self.tokenizer.decode(np.asarray(tokens).tolist())

  def report(self) -> str:
    unit = "bytes" if self.tokenizer is None else "tokens"

    def size(documents):
      return f"{len(documents):,} ({sum(d.tokens.size for d in documents):,} {unit})"

    return (
      f"{self.source}: documents for training {size(self.train)}, held out {size(self.heldout)}; "
      f"skipped: {_describe_skipped(self.skipped)}."
    )


def load_corpus(config: DataConfig, *, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
  """Reads every document of `config.path` and splits them into training and held-out ones.

  `hash(name) < heldout_fraction` holds a document out, whatever the seed and the other documents
  are; only where a side would stay empty, the lowest hash is held out and the highest is trained
  on. The seed fixes the order on each side. Links to directories are not followed, so links in a
  loop do no harm; what is not read is counted in `skipped`. The tokenizer, None for bytes, changes
  neither the split nor the order.

  Raises ValueError if `config.path` does not exist or holds fewer than two readable documents.
  """
  skipped = Counter()
  source, root, paths = _find(config.path, skipped)
  documents = []
  for path in paths:
    documents.extend(_read(path, path.relative_to(root).as_posix(), skipped, tokenizer))
  skipped = dict(+skipped)
  if len(documents) < 2:
    found = "one readable document only" if documents else "no readable document"
    raise ValueError(
      f"data.path={config.path!r} holds {found} (skipped: {_describe_skipped(skipped)}): give a "
      f"directory or glob with two documents or more, one to train on and one to hold out, in "
      f"{_FORMATS}; a single long text can be cut into several files"
    )
  documents.sort(key=lambda document: (_hash(f"{seed}:{document.name}"), document.name))
  first = min(documents, key=lambda document: _hash(document.name))
  last = max(documents, key=lambda document: _hash(document.name))
  train, heldout = [], []
  for document in documents:
    below = _hash(document.name) < config.heldout_fraction * 2**64
    held = document is first or (below and document is not last)
    (heldout if held else train).append(document)
  return Corpus(tuple(train), tuple(heldout), skipped, source, tokenizer)


def training_rows(
  documents: Sequence[Document], *, seq_len: int, batch_size: int, seed: int
) -> grain.IterDataset:
  """Endless batches of packed rows: a dict of int32 arrays [batch_size, seq_len].

  `tokens`; `segment_ids`, 1, 2, ... along a row and 0 on padding; `labels`, the next token of the
  same segment, IGNORE where there is none. Every epoch has each token once, in a new order; a row
  at the seam of two epochs may hold pieces of both. `iter(...)` has get_state() and set_state();
  the state is a JSON-able dict and fits the same documents, `seq_len`, `batch_size` and seed only.
  """
  rows = _packed_rows(documents, seq_len=seq_len, seed=seed, epochs=None)
  return rows.batch(batch_size, drop_remainder=True).map(_with_labels)


def heldout_rows(
  documents: Sequence[Document], *, seq_len: int, max_documents: int, seed: int
) -> Int32[np.ndarray, "B T"]:
  """The first `seq_len` tokens of at most `max_documents` documents, in an order from the seed.

  Raises ValueError if no document has `seq_len` tokens.
  """
  if not documents:
    raise ValueError("no held-out documents: data.path must hold at least two documents")
  long = [document for document in documents if document.tokens.size >= seq_len]
  if not long:
    longest = max((document.tokens.size for document in documents), default=0)
    raise ValueError(
      f"eval.seq_len={seq_len} is longer than each of the {len(documents)} held-out documents, "
      f"the longest of which has {longest} tokens: use eval.seq_len={longest} or less, or hold "
      "out more or longer documents (data.heldout_fraction, data.path)"
    )
  long.sort(key=lambda document: (_hash(f"{seed}:{document.name}"), document.name))
  return np.stack([document.tokens[:seq_len] for document in long[:max_documents]]).astype(np.int32)


def _hash(text: str) -> int:
  """64 bits that stay the same over processes, machines and Python versions."""
  # File names that are not UTF-8 reach Python as surrogates.
  data = text.encode(errors="surrogateescape")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _describe_skipped(skipped: dict[str, int]) -> str:
  parts = [f"{count:,} {reason.replace('_', ' ')}" for reason, count in sorted(skipped.items())]
  return ", ".join(parts) or "nothing"


def _find(path: str | None, skipped: Counter) -> tuple[str, Path, list[Path]]:
  """(what the source is, the root that names are relative to, the files) of `data.path`."""
  if path is None:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, skipped, _NOT_STDLIB) if file.suffix == ".py"]
    version = platform.python_version()
    return f"Python {version} standard library without its tests ({root})", root, files
  if not path:
    raise ValueError(
      f"data.path={path!r} is empty: give a directory or glob of {_FORMATS}, or null for the "
      "Python standard library"
    )
  literal = Path(path).expanduser()
  if literal.is_dir():
    root, files = literal, _walk(literal, skipped)
  elif literal.is_file():
    root, files = literal.parent, [literal]
  elif _is_pattern(path):
    root, files = _match(path, skipped)
  else:
    raise ValueError(
      f"data.path={path!r} does not exist: give a directory or glob of {_FORMATS}, or null for "
      "the Python standard library"
    )
  known = []
  for file in files:
    if _suffix(file) in _SUFFIXES:
      known.append(file)
    else:
      skipped["other_format"] += 1
  return path, root, known


def _walk(root: Path, skipped: Counter, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
  """All files below `root`, but none below a directory link or a directory named in `excluded`."""

  def count_error(error):
    skipped["unreadable"] += 1

  for folder, subfolders, names in os.walk(root, onerror=count_error):
    subfolders[:] = [name for name in subfolders if name not in excluded]
    links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
    skipped["linked_directory"] += len(links)
    yield from (Path(folder, name) for name in names)


def _is_pattern(part: str) -> bool:
  return re.search(r"[*?[]", part) is not None


def _match(path: str, skipped: Counter) -> tuple[Path, list[Path]]:
  """The directory before the first wildcard, and the files that match below it."""
  parts = Path(path).expanduser().parts
  depth = next(i for i, part in enumerate(parts) if _is_pattern(part))
  if parts[-1] == "**":
    parts += ("*",)  # before Python 3.13 a last ** matches directories only
  root, pattern = Path(*parts[:depth]), "/".join(parts[depth:])
  try:
    # Unlike those of glob.glob, `**` here does not follow links into a loop.
    matches = list(root.glob(pattern))
  except ValueError as error:
    raise ValueError(
      f"data.path={path!r} is not a valid glob ({error}): write ** as a whole directory, "
      "as in DIR/**/*.py"
    ) from error
  files = []
  for match in matches:
    if not match.is_dir():
      files.append(match)
    elif match.is_symlink() or "**" not in pattern:  # else `**` has looked inside
      skipped["directory"] += 1
  return root, files


def _suffix(path: Path) -> str:
  return Path(path.name.lower().removesuffix(".gz")).suffix


def _read(
  path: Path, name: str, skipped: Counter, tokenizer: Tokenizer | None
) -> Iterator[Document]:
  """The documents of one file."""
  if not path.is_file():  # a broken link; or a pipe, which would block
    skipped["unreadable"] += 1
    return
  try:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
      data = gzip.decompress(data)
  except (OSError, EOFError, zlib.error):
    skipped["unreadable"] += 1
    return
  if _suffix(path) == ".jsonl":
    texts = enumerate(map(_json_text, data.removesuffix(b"\n").split(b"\n")), start=1)
    named = ((f"{name}:{line}", text) for line, text in texts)
  else:
    named = [(name, _plain_text(data))]
  for document_name, text in named:
    if isinstance(text, _Skip):
      skipped[text.reason] += 1
    else:
      yield Document(document_name, _tokens(text, tokenizer))


def _tokens(text: bytes, tokenizer: Tokenizer | None) -> Integer[np.ndarray, "T"]:
  if tokenizer is None:
    return np.frombuffer(text, np.uint8)
  return np.asarray(tokenizer.encode(text.decode()), np.int32)


@dataclass(frozen=True)
class _Skip:
  reason: str


def _plain_text(data: bytes) -> bytes | _Skip:
  """`data` itself, if it is UTF-8 and not empty."""
  try:
    data.decode()
  except UnicodeDecodeError:
    return _Skip("undecodable")
  return data or _Skip("empty")


def _json_text(line: bytes) -> bytes | _Skip:
  """The field `text` of one line of a .jsonl file, as UTF-8."""
  if not line.strip():
    return _Skip("empty")
  try:
    record = json.loads(line.decode())
  except UnicodeDecodeError:
    return _Skip("undecodable")
  except (ValueError, RecursionError):
    return _Skip("malformed_json")
  if not isinstance(record, dict) or not isinstance(record.get("text"), str):
    return _Skip("missing_text_field")
  try:
    return record["text"].encode() or _Skip("empty")
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
    return _Skip("undecodable")


class _Pieces:
  """Random access to the pieces of all epochs: index = epoch * pieces + place in that epoch.

  An epoch's order is one NumPy permutation. Grain's own shuffle computes each index by cycle
  walking, which costs milliseconds per piece when there are only a few (0.2.18).
  """

  def __init__(self, documents: Sequence[Document], seq_len: int, seed: int, epochs: int | None):
    self._documents = documents
    self._seq_len = seq_len
    self._seed = seed
    counts = np.array([-(-document.tokens.size // seq_len) for document in documents], np.int64)
    before = np.cumsum(counts) - counts
    self._count = int(counts.sum())
    if not self._count:
      raise ValueError("no training documents: data.path must hold some that are not empty")
    self._document = np.repeat(np.arange(len(documents)), counts)
    self._start = seq_len * (np.arange(self._count) - np.repeat(before, counts))
    self._epochs = sys.maxsize // self._count if epochs is None else epochs
    self._order = (-1, np.empty(0, np.int64))  # (epoch, its permutation), the one last used

  def __len__(self) -> int:
    return self._epochs * self._count

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    epoch, place = divmod(index, self._count)
    cached, order = self._order
    if cached != epoch:
      order = np.random.default_rng((self._seed, epoch)).permutation(self._count)
      self._order = (epoch, order)
    piece = order[place]
    start = self._start[piece]
    tokens = self._documents[self._document[piece]].tokens
    return {"tokens": tokens[start : start + self._seq_len]}


def _packed_rows(
  documents: Sequence[Document], *, seq_len: int, seed: int, epochs: int | None
) -> grain.IterDataset:
  """Rows as Grain's packer makes them: `tokens`, `tokens_segment_ids`, `tokens_positions`."""
  seed = _hash(f"{seed}") % 2**32  # NumPy takes no negative seed
  pieces = grain.MapDataset.source(_Pieces(documents, seq_len, seed, epochs))
  # The text is in memory: reader threads would only contend for the interpreter.
  return grain.experimental.BestFitPackIterDataset(
    pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
    length_struct={"tokens": seq_len},
    num_packing_bins=_PACKING_BINS,
    seed=seed,
  )


def _with_labels(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  tokens = batch["tokens"].astype(np.int32)
  segment_ids = batch["tokens_segment_ids"]
  continues = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] != 0)
  labels = np.full_like(tokens, IGNORE)
  labels[:, :-1][continues] = tokens[:, 1:][continues]
  return {"tokens": tokens, "segment_ids": segment_ids, "labels": labels}
