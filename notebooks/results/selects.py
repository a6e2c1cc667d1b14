"""Measures what masks cost as selects, which keep NaN out, against factors of 0 and 1.

    export XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
    python notebooks/results/selects.py > notebooks/results/selects.json

The op runs forward and backward over a row of three documents, a third of whose tokens has no loss. In
"factors" masks are products; "nothing" also leaves out what else keeps NaN to the tokens that see it. The
ways take turns, on one thread: `ms` is the median processor time, and a ratio the median over rounds of
the library's time to the way's, with the 95 % interval of that median (resampled rounds).
"""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax
from ttt_jax.ops import linear, numerics, update

T, F, D, C, ROUNDS = 4096, 1024, 512, 512, 40
FACTORS = {
  numerics.where: lambda mask, x: x if mask is None else update.times(mask.astype(x.dtype), x),
  update.scale: update.times,
}
NOTHING = FACTORS | {
  numerics.finite: lambda x: x,
  numerics.poison: lambda mask, dtype: jnp.zeros(mask.shape, dtype),
  linear.finite_cotangent: lambda x, same_rows: x,
  linear.product: lambda z, w: numerics.matmul("btf,fd->btd", z, w),
}
WAYS = {"selects": {}, "factors": FACTORS, "nothing": NOTHING}


def compiled(implementation, patches, arrays):
  """Compiles loss and gradients of the op with `patches` in the place of functions of the library."""
  options = {"chunk_size": C, "inner_lr": 0.1 / F, "implementation": implementation}

  def loss(z, v, w, cotangent, ids):
    return jnp.sum(ttt_jax.inplace_ttt(z, v, w, segment_ids=ids, **options)[0] * cotangent)

  modules = [sys.modules[name] for name in sys.modules if name.startswith("ttt_jax.ops")]
  places = [(m, name, f) for m in modules for name, f in vars(m).items() if callable(f)]
  places = [place for place in places if place[2] in patches]
  for module, name, function in places:
    setattr(module, name, patches[function])
  jax.clear_caches()
  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arrays).compile()
  for module, name, function in places:
    setattr(module, name, function)
  return lambda: jax.block_until_ready(run(*arrays))


def main():
  rng, results = np.random.default_rng(0), {}
  z, v, w, y = (rng.normal(size=n).astype("f") for n in ((1, T, F), (1, T, D), (F, D), (1, T, D)))
  ids = np.repeat([1, 2, 3], [1500, 1000, T - 2500])[None].astype(np.int32)
  arrays = jax.tree.map(jnp.asarray, (z, v, w, y * (rng.random((1, T, 1)) > 1 / 3), ids))
  for implementation in ("sequential", "dual", "associative"):
    runs = [compiled(implementation, patches, arrays) for patches in WAYS.values()]
    jax.tree.map(lambda *x: np.testing.assert_allclose(*x, 1e-3, 1e-3), *(r() for r in runs[:2]))
    times = np.zeros((ROUNDS, 3))
    for i, j in ((i, (i + k) % 3) for i in range(ROUNDS) for k in range(3)):
      start = time.process_time()
      runs[j]()
      times[i, j] = time.process_time() - start
    results[implementation] = {"ms": dict(zip(WAYS, np.median(1e3 * times, axis=0).round(1)))}
    for j, way in ((1, "factors"), (2, "nothing")):
      ratios = times[:, 0] / times[:, j]
      medians = np.median(rng.choice(ratios, (2000, ROUNDS)), axis=1)
      row = [np.median(ratios), *np.quantile(medians, (0.025, 0.975))]
      results[implementation][f"ratio to {way}"] = [round(float(x), 4) for x in row]
  sizes = {"T": T, "F": F, "D": D, "C": C, "rounds": ROUNDS, "jax": jax.__version__}
  json.dump(sizes | {"results": results}, sys.stdout, indent=1)


if __name__ == "__main__":
  main()
