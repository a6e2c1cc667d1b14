"""Several endless orders made one, in which each has its share of every stretch."""

from collections.abc import Sequence

import numpy as np

_UNIT = 1 << 40  # shares are whole numbers of 2^-40: exact at any place, on any machine


class Interleave:
  """Place k of the whole order -> (which order, place in that one), computed for any k at once.

  Order 0 takes k -> k - floor((k rest + phase) / total) of the first k places, where `rest` are the
  shares after its own; the orders after it divide what it leaves in the same way. So it never is more
  than one place off its share. A seed draws the phases; without one they are total / 2.
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
      left_low, left_high = (low * rest + phase) // total, (high * rest + phase) // total
      if left_low == left_high:
        return order, low - left_low
      low, high = left_low, left_high
    raise AssertionError("the last order leaves nothing")
