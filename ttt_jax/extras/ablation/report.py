"""Reports an ablation: a row per variant, with the spread over its seeds."""

import math
from typing import Any

import numpy as np
from scipy import stats

from ttt_jax.config import Config
from ttt_jax.errors import UserError
from ttt_jax.extras.ablation.grid import Ablation, Variant
from ttt_jax.extras.ablation.runs import finished, load_probe, load_recall, load_summary


def report(ablation: Ablation, failed: dict[tuple[str, int], str]) -> dict[str, Any]:
  """Returns the results of the finished runs, by variant.

  `loss` and the losses by position are means over the seeds. `low` and `high` are the 95 % interval of the
  mean, by Student's t over the seeds, and None for a single seed. `by_context` has the losses of the
  probe's last block by the tokens before it, `by_distance` the recall accuracy. A variant without a
  finished run has no numbers. `failed` has the last lines of the runs that failed.

  With a reference, `difference` is a loss less the reference's, the mean over the seeds that both have,
  and `difference_low` and `difference_high` are the 95 % interval of that mean. Runs of one seed train on
  the same batches in the same order, so that the difference cancels the seed's effect on both.

  Raises:
    UserError: no run is finished.
  """
  rows = [_row(ablation, variant) for variant in ablation.variants]
  if not any(row["seeds"] for row in rows):
    raise UserError(
      f"{ablation.directory} has no finished run: run ttt-jax ablate with this config first"
    )
  if ablation.reference is not None:
    _compare(rows, ablation.reference)
  return {
    "name": ablation.name,
    "title": ablation.title,
    "reference": ablation.reference,
    "seeds": list(ablation.seeds),
    "variants": rows,
    "failed": [
      {"variant": name, "seed": seed, "said": lines} for (name, seed), lines in failed.items()
    ],
  }


def _row(ablation: Ablation, variant: Variant) -> dict[str, Any]:
  done = [config for config in variant.configs if finished(ablation, config)]
  row = {"variant": variant.name, "seeds": [config.seed for config in done]}
  if not done:
    return row
  summaries = [load_summary(config) for config in done]
  tables = [summary["heldout_by_position"] for summary in summaries]
  positions = [
    {"from": part["from"], "to": part["to"]}
    | _over_seeds([table[i]["loss"] for table in tables])
    | {"loss_updates_off": _mean([table[i]["loss_updates_off"] for table in tables])}
    for i, part in enumerate(tables[0])
  ]
  losses = [summary["heldout_loss"] for summary in summaries]
  return row | {
    **_over_seeds(losses),
    "loss_updates_off": _mean([summary["heldout_loss_updates_off"] for summary in summaries]),
    "by_position": positions,
    "by_context": None if ablation.probe is None else _by_context([*map(load_probe, done)]),
    "by_distance": None if ablation.recall is None else _by_distance([*map(load_recall, done)]),
    "params": summaries[0]["params"],
    "state_numbers": _state_numbers(done[0]),
    "tokens_per_second": _mean([summary["tokens_per_second"] for summary in summaries]),
  }


def _compare(rows: list[dict[str, Any]], reference: str) -> None:
  """Adds the differences to every row but the reference's own, and to its tables."""
  (base,) = (row for row in rows if row["variant"] == reference)
  for row in rows:
    pairs = [
      (i, base["seeds"].index(seed)) for i, seed in enumerate(row["seeds"]) if seed in base["seeds"]
    ]
    if row is base or not pairs:
      continue
    row |= _difference(row, base, pairs)
    for table, fields in (("by_position", ("from", "to")), ("by_context", ("context",))):
      base_parts = {tuple(part[f] for f in fields): part for part in base[table] or ()}
      for part in row[table] or ():
        if (same := base_parts.get(tuple(part[f] for f in fields))) is not None:
          part |= _difference(part, same, pairs)


def _difference(
  row: dict[str, Any], base: dict[str, Any], pairs: list[tuple[int, int]]
) -> dict[str, Any]:
  """Returns the mean of the losses of `row` less those of `base`, seed by seed, with its interval."""
  losses = [(row["losses"][i], base["losses"][j]) for i, j in pairs]
  differences = [None if None in both else both[0] - both[1] for both in losses]
  low, high = interval(differences)
  return {"difference": _mean(differences), "difference_low": low, "difference_high": high}


def _by_context(probes: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the loss of the probe's block by the tokens before it, with any fast weights updating."""
  tables = [
    [row for row in probe["by_context"] if row["mode"] in ("updating", "plain")] for probe in probes
  ]
  return [
    {"context": rows[0]["context"], **_over_seeds([row["loss"] for row in rows])}
    for rows in zip(*tables)
  ]


def _by_distance(recalls: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the recall accuracy by distance, with any fast weights updating."""
  tables = [next(iter(recall["by_distance"].values())) for recall in recalls]
  return [
    {"from": rows[0]["from"], "to": rows[0]["to"]}
    | {"queries": sum(row["queries"] for row in rows)}
    | {"right": _mean([row["right"] for row in rows]), "rights": [row["right"] for row in rows]}
    for rows in zip(*tables)
  ]


def _over_seeds(losses: list[float | None]) -> dict[str, Any]:
  low, high = interval(losses)
  return {"loss": _mean(losses), "low": low, "high": high, "losses": losses}


def _state_numbers(config: Config) -> int:
  """Counts the numbers in the states of all TTT layers: S `[F, D]`, or A `[R, R]` and D `[R, D]`."""
  d, f, ttt = config.model.d_model, config.model.d_ff, config.ttt
  if ttt.rule == "least_squares":
    rank = f if ttt.key_rank is None else ttt.key_rank
    return len(ttt.layers) * rank * (rank + d)
  return len(ttt.layers) * f * d


def _mean(values: list[float | None]) -> float | None:
  """Returns the mean, or None if a value is None (a loss that is not finite, or a missing one)."""
  return None if None in values else float(np.mean(values))


def interval(values: list[float | None]) -> tuple[float, float] | tuple[None, None]:
  """Returns the 95 % interval of the mean of normal values, `mean +- t s / sqrt(n)`; None of one."""
  n = len(values)
  if n < 2 or None in values:
    return None, None
  half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1)) / math.sqrt(n)
  mean = float(np.mean(values))
  return mean - half, mean + half
