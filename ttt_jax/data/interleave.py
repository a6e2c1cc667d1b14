"""Interleaves endless orders so that each has its share of every stretch."""

from collections.abc import Sequence

import numpy as np

_UNIT = 1 << 40  # shares are whole numbers of 2^-40: exact at any place, on any machine


class Interleave:
  """Maps place k of the interleaved order to (order, place in that order), without the places before k.

  Order 0 takes k - floor((k rest + phase) / total) of the first k places, where `rest` is the sum of the
  later shares; the later orders divide the remaining places in the same way. So no order is ever more than
  one place off its share. A seed draws the phases; without a seed they are total / 2.
  """

  def __init__(self, shares: Sequence[float], seed: Sequence[int] | None = None):
    whole = [max(1, round(share / sum(shares) * _UNIT)) for share in shares]
    totals = [sum(whole[i:]) for i in range(len(whole))]
    rests = [*totals[1:], 0]
    phases = [total // 2 for total in totals]
    if seed is not None:
      rng = np.random.default_rng(seed)
      phases = [int(rng.integers(total)) for total in totals]
    self._steps = list(zip(rests, totals, phases))

  def __call__(self, k: int) -> tuple[int, int]:
    low, high = k, k + 1
    for order, (rest, total, phase) in enumerate(self._steps):
      rest_low, rest_high = (low * rest + phase) // total, (high * rest + phase) // total
      if rest_low == rest_high:
        return order, low - rest_low
      low, high = rest_low, rest_high
    raise AssertionError("the last order leaves nothing")
