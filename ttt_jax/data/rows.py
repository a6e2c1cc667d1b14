"""Packs documents into training rows; each process makes the rows that its devices hold.

A document longer than a row is cut into pieces of `seq_len` tokens and a shorter last piece; a document
that fits a row is one piece. The pieces of a source have one endless order, a new permutation every epoch.
Row b of the batches of B rows is an independent stream: it takes pieces b, b + B, b + 2B, ... of each
source's order, and mixes several sources by weight. Grain's best-fit packer packs a stream into rows
without further cuts. So the content of a row depends neither on other rows nor on the number of processes.

Concat-then-split would pad nothing, but cut documents that fit a row; first fit pads more in long rows.
Padding on the standard library, in percent of all tokens: 1.8 in rows of 4096, 1.9 of 32768, 1.8 of 131072;
with documents aligned to chunks of 512, 2.9, 3.1 and 3.2. A stream's state is a few integers; to restore
them Grain packs the stream's last rows again.

With `data.attend`, a stream also draws where attention starts again in a row, from its seed and the number
of the row.
"""

import sys
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import grain
import numpy as np

from ttt_jax.config import AttendBlocks
from ttt_jax.data.corpus import Documents, Source
from ttt_jax.data.interleave import Interleave
from ttt_jax.data.prepared import PreparedDocuments
from ttt_jax.data.skipped import stable_hash
from ttt_jax.errors import UserError
from ttt_jax.names import IGNORE

_PREFETCHED = 8  # batches that a thread makes ahead
_MAX_BINS, _MIN_BINS = 64, 8
_GROUP_TOKENS = (
  1 << 21
)  # in the rows that a stream packs at a time: about 50 MB with Grain's overhead


def packing_bins(seq_len: int) -> int:
  """Returns the rows that a stream packs at a time; more rows need less padding, but more memory."""
  return max(_MIN_BINS, min(_MAX_BINS, _GROUP_TOKENS // seq_len))


class Rows:
  """Iterates over endless batches of rows: dicts of int32 arrays [len(slots), seq_len], made in a thread.

  The arrays are `tokens`; `segment_ids`, 1, 2, ... along a row and 0 on padding; `labels`, the next token
  of the same segment, IGNORE if there is none. If attention is cut into blocks, `attention_segment_ids`
  are 1, 2, ... along a row, a new number at each document and at each cut, and 0 on padding. Every epoch
  has each token once, in a new order; where two epochs meet, some rows are ahead of others.
  """

  def __init__(self, streams: dict[int, grain.IterDataset], pieces: Sequence[int]):
    self.slots = tuple(streams)
    self._pieces = list(pieces)
    rows = grain.experimental.ZipIterDataset(list(streams.values())).map(_batch)
    rows = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=_PREFETCHED)
    self._iterator = iter(rows)

  def __iter__(self) -> "Rows":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns the JSON-able state of these rows; `merge_states` combines the states of all processes."""
    states = self._iterator.get_state()["parents"]
    return {"pieces": self._pieces, "slots": {str(s): x for s, x in zip(self.slots, states)}}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues from a state that has these slots, whichever processes made it.

    Raises:
      UserError: the state belongs to other data.
    """
    if state["pieces"] != self._pieces:
      raise UserError(
        f"the data has changed since the checkpoint: there were {state['pieces']} pieces of documents "
        f"in its sources, now {self._pieces}; restore the files, or give another --run_dir"
      )
    self._iterator.set_state({"parents": [state["slots"][str(slot)] for slot in self.slots]})

  def close(self) -> None:
    """Ends the thread."""
    self._iterator.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Combines the states of all processes into one state of all row slots; slots may occur repeatedly."""
  slots = {slot: x for state in states for slot, x in state["slots"].items()}
  return {**states[0], "slots": dict(sorted(slots.items(), key=lambda item: int(item[0])))}


def training_rows(
  sources: Sequence[Source],
  *,
  seq_len: int,
  batch_size: int,
  seed: int,
  slots: Sequence[int] | None = None,
  align: int = 1,
  attend: AttendBlocks | None = None,
  attend_fraction: float = 1.0,
  chunk_size: int = 1,
) -> Rows:
  """Makes endless training rows in batches of `batch_size`.

  Args:
    sources: the sources; a source's weight is its share of the tokens.
    seq_len: T, tokens per row.
    batch_size: B, rows per batch over all processes.
    seed: the seed of every order.
    slots: the indices of the B rows to make; None: all.
    align: every piece begins at a multiple of `align` in its row, after padding if necessary.
    attend: attention starts again after so many tokens; None: only at documents.
    attend_fraction: the share of rows that `attend` cuts.
    chunk_size: blocks of `attend` are multiples of it.

  Raises:
    UserError: a source has no training documents.
  """
  seed = stable_hash(f"{seed}") % 2**32  # NumPy takes no negative seed
  pieces = [_Pieces(source.train, seq_len, seed, source.name) for source in sources]
  # A source with short pieces contributes more pieces for its share of the tokens.
  shares = [source.weight * len(p) / p.tokens for source, p in zip(sources, pieces)]
  # Documents in memory need no reader threads, which would only contend for the interpreter.
  on_disk = any(isinstance(source.train, PreparedDocuments) for source in sources)
  options = grain.ReadOptions(num_threads=2 * on_disk, prefetch_buffer_size=16 * on_disk)

  def stream(slot):
    interleave = Interleave(shares, (seed, slot))
    order = grain.MapDataset.source(_Stream(pieces, interleave, slot, batch_size))
    rows = packed(order, options, seq_len=seq_len, seed=seed + slot, align=align)
    if attend is None:
      return rows
    cut = partial(_cut_attention, block=attend.block, fraction=attend_fraction, chunk=chunk_size)
    return rows.random_map(cut, seed=(seed + slot) % 2**32)

  slots = range(batch_size) if slots is None else slots
  return Rows({slot: stream(slot) for slot in slots}, [len(p) for p in pieces])


def packed(
  pieces: grain.MapDataset, options: grain.ReadOptions, *, seq_len: int, seed: int, align: int = 1
) -> grain.IterDataset:
  """Packs pieces with Grain into rows of `tokens`, `tokens_segment_ids` and `tokens_positions`."""
  return grain.experimental.BestFitPackIterDataset(
    pieces.to_iter_dataset(options),
    length_struct={"tokens": seq_len},
    num_packing_bins=packing_bins(seq_len),
    seed=seed,
    pack_alignment_struct={"tokens": align},
  )


class _Pieces:
  """Orders the pieces of a source endlessly: index = epoch * pieces + place in that epoch.

  An epoch's order is one NumPy permutation. Grain's own shuffle computes each index by cycle
  walking, which costs milliseconds per piece when there are only a few (0.2.18).
  """

  def __init__(self, documents: Documents, seq_len: int, seed: int, name: str):
    self._documents = documents
    self._seq_len = seq_len
    self._seed = seed
    lengths = documents.lengths.astype(np.int64)
    self._ends = np.cumsum(-(-lengths // seq_len))  # one past each document's last piece
    self._count = int(self._ends[-1]) if len(lengths) else 0
    if not self._count:
      raise UserError(f"{name}: no training documents: data.path must hold some that are not empty")
    self.tokens = int(lengths.sum())
    self._orders: dict[int, np.ndarray] = {}
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._count

  def read(self, index: int) -> np.ndarray | None:
    epoch, place = divmod(index, self._count)
    piece = int(self._order(epoch)[place])
    document = int(np.searchsorted(self._ends, piece, side="right"))
    before = int(self._ends[document - 1]) if document else 0
    start = (piece - before) * self._seq_len
    return self._documents.read(document, start, start + self._seq_len)

  def _order(self, epoch: int) -> np.ndarray:
    with self._lock:
      if epoch not in self._orders:
        # Streams reach a new epoch at different times, so the last two orders are kept.
        self._orders = dict(list(self._orders.items())[-1:])
        order = np.arange(self._count, dtype=np.min_scalar_type(self._count))
        np.random.default_rng((self._seed, epoch)).shuffle(order)
        self._orders[epoch] = order
      return self._orders[epoch]


class _Stream:
  """Returns the pieces of one row slot by number."""

  def __init__(self, sources: list[_Pieces], interleave: Interleave, slot: int, slots: int):
    self._sources = sources
    self._interleave = interleave
    self._slot, self._slots = slot, slots

  def __len__(self) -> int:
    return sys.maxsize // self._slots

  def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
    source, place = self._interleave(index)
    tokens = self._sources[source].read(self._slot + self._slots * place)
    return None if tokens is None else {"tokens": tokens}  # Grain leaves None out


def _cut_attention(
  row: dict[str, np.ndarray],
  rng: np.random.Generator,
  *,
  block: tuple[int, int],
  fraction: float,
  chunk: int,
) -> dict[str, np.ndarray]:
  """Adds `attention_segment_ids` to a row: a new number at each document and at each cut."""
  documents = row["tokens_segment_ids"]
  starts = np.diff(documents, prepend=0) != 0
  if rng.random() < fraction:
    low, high = (n // chunk for n in block)
    lengths = rng.integers(low, high + 1, size=-(-len(documents) // (low * chunk))) * chunk
    cuts = np.cumsum(lengths)
    starts[cuts[cuts < len(documents)]] = True
  numbers = np.cumsum(starts & (documents != 0), dtype=documents.dtype)
  return row | {"attention_segment_ids": np.where(documents != 0, numbers, 0)}


def _batch(rows: tuple[dict[str, np.ndarray], ...]) -> dict[str, np.ndarray]:
  tokens = np.stack([row["tokens"] for row in rows]).astype(np.int32)
  segment_ids = np.stack([row["tokens_segment_ids"] for row in rows])
  continues = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, 1:] != 0)
  labels = np.full_like(tokens, IGNORE)
  labels[:, :-1][continues] = tokens[:, 1:][continues]
  batch = {"tokens": tokens, "segment_ids": segment_ids, "labels": labels}
  if "attention_segment_ids" in rows[0]:
    batch["attention_segment_ids"] = np.stack([row["attention_segment_ids"] for row in rows])
  return batch
