"""Counts what loading skips, by reason, and limits the number of corrupt records."""

import hashlib
import threading
import warnings
from collections import Counter

from ttt_jax.errors import UserError


class Skipped:
  """Counts skipped items by reason; the count of `corrupt` is limited. Threads may share an instance."""

  def __init__(self, max_bad_records: int = 0):
    self._limit = max_bad_records
    self._counts = Counter()
    self._notes: dict[str, str] = {}
    self._places: set[str] = set()
    self._lock = threading.Lock()

  def add(self, reason: str, count: int = 1, *, note: str | None = None) -> None:
    """Adds to the count of a reason; reports show the first note of each reason as its example."""
    with self._lock:
      self._counts[reason] += count
      if note is not None:
        self._notes.setdefault(reason, note)

  def add_corrupt(self, place: str, problem: Exception | str, records: int = 1) -> None:
    """Counts the corrupt records of a place once, with a warning.

    Raises:
      UserError: there are more corrupt records than `data.max_bad_records`.
    """
    with self._lock:
      if place in self._places:
        return
      self._places.add(place)
      self._counts["corrupt"] += records
      bad = self._counts["corrupt"]
    reason = (str(problem) or type(problem).__name__).splitlines()[0][:200]
    if bad > self._limit:
      raise UserError(
        f"{place} is corrupt ({reason}): {bad} corrupt records are more than data.max_bad_records="
        f"{self._limit}; restore the file, or raise data.max_bad_records to go on without them"
      )
    warnings.warn(f"{place} is corrupt and skipped ({reason})", stacklevel=2)

  def counts(self) -> dict[str, int]:
    with self._lock:
      return dict(+self._counts)

  def __str__(self) -> str:
    counts = sorted(self.counts().items())
    notes = {reason: f" ({note})" for reason, note in self._notes.items()}
    parts = [f"{n:,} {reason.replace('_', ' ')}{notes.get(reason, '')}" for reason, n in counts]
    return ", ".join(parts) or "nothing"


def stable_hash(text: str) -> int:
  """Returns a hash of 64 bits that is the same on all processes, machines and Python versions."""
  # File names that are not UTF-8 reach Python as surrogates.
  data = text.encode(errors="surrogateescape")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
