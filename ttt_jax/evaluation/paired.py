"""Measures how well means over samples are known, and the difference of two models on the same samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

_RESAMPLES = 10000


def bootstrap(
  *groups: Float[np.ndarray, "_"], seed: int, level: float = 0.95
) -> tuple[float, float] | tuple[None, None]:
  """Returns the bootstrap percentile interval of mean(groups), or of the mean of the groups' means.

  A resample draws as many samples from each group as the group has. If all samples of a group are equal,
  they say nothing of what another sample may be, and the interval is too narrow.

  Args:
    groups: values of independent samples. Values that share a text depend on each other: give their mean.
    seed: of the resamples.
    level: the share of resamples in the interval.

  Returns:
    The lower and the upper end; None for both if a group has a single sample.
  """
  if min(map(len, groups)) < 2:
    return None, None
  rng = np.random.default_rng(seed)
  return interval(
    sum(resampled_means(values, rng=rng)[0] for values in groups) / len(groups), level
  )


def resampled_means(
  *columns: Float[np.ndarray, "samples"], rng: np.random.Generator, resamples: int = _RESAMPLES
) -> list[Float[np.ndarray, "resamples"]]:
  """Returns the means of each column over resamples, which draw the same samples for all columns."""
  count = len(columns[0])
  draws = rng.integers(count, size=(resamples, count))
  return [values[draws].mean(axis=1) for values in columns]


def interval(values: Float[np.ndarray, "resamples"], level: float) -> tuple[float, float]:
  """Returns the lower and the upper end of the middle share `level` of values."""
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def paired(
  a: Sequence[Float[np.ndarray, "_"]], b: Sequence[Float[np.ndarray, "_"]], *, seed: int = 0
) -> dict[str, Any]:
  """Compares the values that two models have on the same samples, as b - a.

  Args:
    a: values of the first model by group, as in `bootstrap`; mostly there is one group.
    b: values of the second model; entry i of a group belongs to the same sample as entry i in `a`.
    seed: of the resamples.

  Returns:
    `a`, `b`, `difference`: the means of the groups' means; `low`, `high`: the 95 % interval of the
    difference; `samples`: how many; `higher`, `lower`, `equal`: samples by the sign of b - a; `p`: the
    two-sided p-value of the exact sign test, which leaves out equal samples.
  """
  differences = [of_b - of_a for of_a, of_b in zip(a, b, strict=True)]
  low, high = bootstrap(*differences, seed=seed)
  every = np.concatenate(differences)
  higher, lower = int((every > 0).sum()), int((every < 0).sum())
  return {
    "samples": len(every),
    "a": float(np.mean([values.mean() for values in a])),
    "b": float(np.mean([values.mean() for values in b])),
    "difference": float(np.mean([values.mean() for values in differences])),
    "low": low,
    "high": high,
    "higher": higher,
    "lower": lower,
    "equal": len(every) - higher - lower,
    "p": float(binomtest(higher, higher + lower).pvalue) if higher + lower else 1.0,
  }
