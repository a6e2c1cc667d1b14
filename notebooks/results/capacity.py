"""Measures how many facts a fast weight holds: the sum and least squares, beside what theory gives.

    python notebooks/results/capacity.py notebooks/results

n facts are n keys `z [F]`, each with a random one of V values. The op reads all of them in one chunk and is
asked for every key in the next; an answer is right if the right value is the largest. Keys are random unit
vectors, or alike: `sqrt(c) u + sqrt(1 - c) e` with one u for all, so that any two have a cosine of about c.
It writes `capacity.json` and `capacity.png`; a minute on two cores.

Theory, with one-hot values and g standard normal. The sum returns the right value with strength 1, and
noise of variance `(n - 1) (c^2 + (1 - c)^2 / F) / V` on every value, from the other keys' overlap. Least
squares returns it with the leverage `h = min(1, F / n)`, whatever c, and noise of variance
`h (1 - h) / V`: exactly right up to n = F. Right is the share of draws in which `strength + noise` is above
V - 1 other noises.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax
from ttt_jax.evaluation.plots import subplots

F, V, SEEDS = 128, 32, 4
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
COSINE = 0.8  # of keys that are alike
# Name, options of the op, dimensions of keys, and the cosine of keys.
SUM = {"rule": "sum", "inner_lr": 1.0}
LEAST_SQUARES = {"rule": "least_squares", "ridge": 1e-4}
WAYS = {
  "sum, random keys": (SUM, F, 0.0),
  "sum, keys alike": (SUM, F, COSINE),
  "least squares, random keys": (LEAST_SQUARES, F, 0.0),
  "least squares, keys alike": (LEAST_SQUARES, F, COSINE),
  "least squares, key rank 32": (LEAST_SQUARES, 32, 0.0),
}
COLORS = dict(zip(WAYS, ("#e0a06a", "#d1620b", "#7fa8dd", "#0b4f9e", "#3f8f4f"), strict=True))


def measured(options, rank, cosine, n, seed):
  """The share of right answers of one draw of n facts."""
  rng = np.random.default_rng([seed, n])
  own, common = rng.normal(size=(n, F)), rng.normal(size=F)
  own /= np.linalg.norm(own, axis=1, keepdims=True)
  z = np.sqrt(cosine) * common / np.linalg.norm(common) + np.sqrt(1 - cosine) * own
  values = rng.integers(0, V, n)
  v = np.eye(V)[values]
  if rank < F:
    options = options | {"key_projection": jnp.asarray(rng.normal(size=(F, rank)), jnp.float32)}
  rows = lambda x: jnp.asarray(np.concatenate([x, x])[None], jnp.float32)  # noqa: E731
  y, _ = ttt_jax.inplace_ttt(rows(z), rows(v), jnp.zeros((F, V)), chunk_size=n, **options)
  return float(np.mean(np.argmax(np.asarray(y)[0, n:], axis=-1) == values))


def theory(options, rank, cosine, n, draws=20_000):
  """The share of right answers by the formula above."""
  if options is SUM:
    strength, variance = 1.0, (n - 1) * (cosine**2 + (1 - cosine) ** 2 / rank) / V
  else:
    strength = min(1.0, rank / n)
    variance = strength * (1 - strength) / V
  noise = np.sqrt(variance) * np.random.default_rng(0).normal(size=(draws, V))
  return float(np.mean(strength + noise[:, 0] > noise[:, 1:].max(axis=1)))


def main(directory):
  table = [
    {
      "way": name,
      "facts": n,
      "right": float(np.mean([measured(*way, n, seed) for seed in range(SEEDS)])),
      "theory": theory(*way, n),
    }
    for name, way in WAYS.items()
    for n in COUNTS
  ]
  report = {
    "d_ff": F,
    "values": V,
    "seeds": SEEDS,
    "device": jax.devices()[0].device_kind,
    "table": table,
  }
  (directory / "capacity.json").write_text(json.dumps(report, indent=1) + "\n")
  figure, ((axes,),) = subplots(1, 1, 7.2, 4.4)
  for name in WAYS:
    rows = [row for row in table if row["way"] == name]
    counts = [row["facts"] for row in rows]
    axes.plot(counts, [row["theory"] for row in rows], color=COLORS[name], linestyle="--")
    axes.plot(counts, [row["right"] for row in rows], "o", color=COLORS[name], label=name)
  axes.plot([], [], color="black", linestyle="--", label="theory")
  axes.axhline(1 / V, color="#9a9a9a", linestyle=":", label="chance")
  axes.axvline(F, color="#9a9a9a", linewidth=0.8)
  axes.set_xscale("log", base=2)
  axes.set_xticks(COUNTS, [str(n) for n in COUNTS])
  axes.set_ylim(0, 1.03)
  axes.set_title(f"Facts that a state of F = {F} keys holds", loc="left", fontsize=11)
  axes.set_xlabel("facts")
  axes.set_ylabel("right answers")
  axes.grid(alpha=0.25)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(directory / "capacity.png")


if __name__ == "__main__":
  main(Path(sys.argv[1]))
