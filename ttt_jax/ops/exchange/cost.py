"""Holds the cost model behind `collective=None`: the bytes that each collective sends, and their time.

A message takes latency + bytes / link bandwidth, at published peak rates: trust the order of the results,
not the seconds.
"""

import math

from ttt_jax.names import COLLECTIVES
from ttt_jax.ops.hardware import Device

_MOST_SLICES = 64  # of the ring, whose program has P + K - 2 messages one after another


def collective_seconds(
  shards: int, state_bytes: int, device: Device, *, rows: int
) -> dict[str, float]:
  """Estimates the seconds of one exchange over contiguous devices with one kind of link, by collective.

  On a torus the axis is taken as a ring of two-way links; a message over several hops occupies each link.

  Args:
    shards: P, devices along the sequence.
    state_bytes: S, bytes that one device contributes.
    rows: F, the most slices that a state can be cut into.
  """
  p, s = shards, state_bytes
  k = ring_slices(shards, state_bytes, device, rows=rows)
  steps = math.ceil(math.log2(p)) if p > 1 else 0
  if device.torus:
    states_on_link = {"all_gather": (p - 1) / 2, "doubling": p - 1, "all_to_all": 2 * p / 8}
  else:
    states_on_link = {"all_gather": p - 1, "doubling": steps, "all_to_all": 2 * (p - 1) / p}
  states_on_link["ring"] = (p + k - 2) / k
  messages = {"all_gather": 1, "doubling": steps, "all_to_all": 2, "ring": p + k - 2}
  return {
    name: messages[name] * device.latency + states_on_link[name] * s / device.link
    for name in COLLECTIVES
  }


def ring_slices(shards: int, state_bytes: int, device: Device, *, rows: int) -> int:
  """Returns the K that minimises `(P + K - 2) (latency + S / (K link))`, at most F and 64."""
  best = math.sqrt(max(0, shards - 2) * state_bytes / (device.link * device.latency))
  return max(1, min(round(best), rows, _MOST_SLICES))


def choose_collective(shards: int, state_bytes: int, device: Device, *, rows: int) -> str:
  """Returns the fastest collective, by the model."""
  seconds = collective_seconds(shards, state_bytes, device, rows=rows)
  return min(seconds, key=seconds.__getitem__)


def bytes_sent(shards: int, state_bytes: int) -> dict[str, int]:
  """Returns the most bytes that a device sends, by collective.

  "all_to_all" and "ring" cut a state into slices of rows. Where these are not equal they are padded, and
  the padding is not counted.
  """
  p, s = shards, state_bytes
  return {
    "all_gather": (p - 1) * s,
    "doubling": (math.ceil(math.log2(p)) if p > 1 else 0) * s,
    "all_to_all": 2 * s * (p - 1) // p,
    "ring": s if p > 1 else 0,
  }
