"""Opens a corpus that `ttt-jax data prepare` made, with random access to its documents. Its directory has:

    ttt_jax_data.json     the metadata; `complete` is true once all other files are on disk
    index.bin             for each document a hash of its name and its number of tokens
    00000.tokens          an ArrayRecord of the tokens of all documents, one after another

A record has `RECORD_TOKENS` tokens, the last record the rest, regardless of documents: one record per
document would be slow for short documents, since the time of a read in ArrayRecord (0.8.6) grows with the
number of records in the file. The suffix is not taken for text. Records are loaded when they are needed;
the index is mapped into memory.
"""

import bisect
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Integer

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.data.boundaries import boundaries, special_ids
from ttt_jax.data.files import METADATA
from ttt_jax.data.skipped import Skipped
from ttt_jax.data.tokens import fingerprint, token_dtype
from ttt_jax.errors import UserError

FORMAT = "ttt_jax_data/1"
INDEX = "index.bin"
SHARD_SUFFIX = ".tokens"
INDEX_DTYPE = np.dtype([("name_hash", "<u8"), ("tokens", "<u8")])
RECORD_TOKENS = 1 << 13


def load_metadata(directory: Path) -> dict[str, Any]:
  """Loads the metadata; raises UserError if it is damaged or of another format."""
  try:
    metadata = json.loads((directory / METADATA).read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{directory / METADATA} cannot be read: {error}") from error
  if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
    raise UserError(
      f"{directory / METADATA} is not of the format {FORMAT}: it was written by another version of "
      "ttt_jax; prepare the corpus again"
    )
  return metadata


def _check(
  metadata: dict[str, Any], directory: Path, source: str, tokenizer: Tokenizer | None
) -> None:
  """Raises UserError unless the directory is complete and made with this tokenizer.

  The whole index is checked; corrupt records in the shards are found only when they are loaded.
  """
  if not metadata["complete"]:
    raise UserError(
      f"{source} is unfinished, since `ttt-jax data prepare` was interrupted: run it again"
    )
  if metadata["fingerprint"] != fingerprint(tokenizer):
    raise UserError(
      f"{source} was prepared with the tokenizer {metadata['tokenizer']!r}, which is not the one of "
      f"this run: set data.tokenizer={metadata['tokenizer']}, or prepare it again with --tokenizer"
    )
  sizes = {shard["name"]: shard["bytes"] for shard in metadata["shards"]}
  for name, size in {**sizes, INDEX: metadata["documents"] * INDEX_DTYPE.itemsize}.items():
    file = directory / name
    found = file.stat().st_size if file.is_file() else None
    if found != size:
      state = "is missing" if found is None else f"has {found} bytes instead of {size}"
      raise UserError(f"{source} is damaged, {name} {state}: restore the file or prepare it again")
  if zlib.crc32(np.memmap(directory / INDEX, np.uint8, mode="r")) != metadata["index_crc"]:
    raise UserError(f"{source} is damaged, {INDEX} has changed: restore it or prepare it again")


def _check_boundaries(
  metadata: dict[str, Any], source: str, tokenizer: Tokenizer | None, **requested: bool | None
) -> None:
  """Raises UserError unless documents begin and end as requested, with tokens of this tokenizer."""
  first, last = boundaries(tokenizer).start, () if tokenizer is None else tokenizer.eos_ids
  allowed = {"start_of_text": (first, special_ids(tokenizer)[0]), "end_of_text": last}
  for field, value in requested.items():
    flag, token = field.replace("_", "-"), metadata[f"{field}_id"]
    if value is not None and value != metadata[field]:
      had = "" if metadata[field] else "no-"
      raise UserError(
        f"{source} was prepared with --{had}{flag}, but data.{field}={str(value).lower()}: leave "
        f"data.{field} out to take its documents as they are, or prepare it again with "
        f"--{'' if value else 'no-'}{flag}"
      )
    if token is not None and token not in allowed[field]:
      raise UserError(
        f"{source} was prepared with the {flag} token {token}, which is none of this "
        f"run's tokenizer: set data.tokenizer={metadata['tokenizer']}, or prepare it again with --tokenizer"
      )


class PreparedCorpus:
  """Gives access to a prepared directory, after checking that it is complete and fits the tokenizer.

  Attributes:
    lengths: the number of tokens of each document.
    name_hashes: the `stable_hash` of each document's name.
    end_of_text: whether each document ends with an end-of-text token.
    text_field: the field of the records that it was made from, "" if of files without fields, None if an
      older version made it, which did not record the field.
  """

  def __init__(
    self,
    path: str,
    *,
    field: str,
    tokenizer: Tokenizer | None,
    skipped: Skipped,
    start_of_text: bool | None = None,
    end_of_text: bool | None = None,
  ):
    self._directory = Path(path).expanduser()
    self._skipped = skipped
    metadata = load_metadata(self._directory)
    source = f"{field}={path!r}"
    _check(metadata, self._directory, source, tokenizer)
    # Older versions did not record boundaries: they added no tokens to those of the tokenizer.
    start = boundaries(tokenizer).start
    older = {"start_of_text": start is not None, "start_of_text_id": start}
    metadata = older | {"end_of_text": False, "end_of_text_id": None} | metadata
    _check_boundaries(
      metadata, source, tokenizer, start_of_text=start_of_text, end_of_text=end_of_text
    )
    self.end_of_text = metadata["end_of_text"]
    self.text_field = metadata.get("text_field")
    index = np.memmap(self._directory / INDEX, INDEX_DTYPE, mode="r")
    self.lengths, self.name_hashes = index["tokens"], index["name_hash"]
    self._dtype = token_dtype(tokenizer).newbyteorder("<")
    lengths = self.lengths.astype(np.int64)
    self._starts, self._tokens = np.cumsum(lengths) - lengths, metadata["tokens"]
    self._shards = metadata["shards"]
    self._ends = list(itertools.accumulate(shard["records"] for shard in self._shards))
    # With the number of records given, Grain opens a shard only when it first loads from it.
    self._records = grain.sources.ArrayRecordDataSource(
      [f"{self._directory / shard['name']}[0:{shard['records']}]" for shard in self._shards]
    )

  def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, "T"] | None:
    stop = min(stop, int(self.lengths[document]))
    start, stop = (int(self._starts[document]) + place for place in (start, stop))
    first, last = start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)
    parts = [self._load_record(number) for number in range(first, last)]
    if any(part is None for part in parts):
      return None
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    begin = first * RECORD_TOKENS
    return tokens[start - begin : stop - begin]

  def _load_record(self, number: int) -> Integer[np.ndarray, "T"] | None:
    tokens = min(RECORD_TOKENS, self._tokens - number * RECORD_TOKENS)
    try:
      data = self._records[number]
      if len(data) != tokens * self._dtype.itemsize:
        raise RuntimeError(f"{len(data)} bytes instead of {tokens * self._dtype.itemsize}")
    except RuntimeError as error:
      shard = bisect.bisect_right(self._ends, number)
      within = number - (self._ends[shard] - self._shards[shard]["records"])
      file = self._directory / self._shards[shard]["name"]
      self._skipped.add_corrupt(f"{file}, record {within}", error)
      return None
    return np.frombuffer(data, self._dtype)


class PreparedDocuments:
  """Gives access to chosen `Documents` of a prepared corpus."""

  def __init__(self, corpus: PreparedCorpus, chosen: Integer[np.ndarray, "documents"]):
    self._corpus = corpus
    self._chosen = chosen
    self.lengths = corpus.lengths[chosen]

  def __len__(self) -> int:
    return len(self._chosen)

  def read(self, document: int, start: int, stop: int) -> Integer[np.ndarray, "T"] | None:
    return self._corpus.read(int(self._chosen[document]), start, stop)

  def order(self, seed: int) -> Integer[np.ndarray, "documents"]:
    return np.random.default_rng(seed % 2**64).permutation(len(self))
