"""Measures ways to solve least squares in SmolLM2: right answers against the time of the op.

    python notebooks/results/solvers.py models/smollm2.gguf > notebooks/results/solvers_smollm2.json

Every way reads in layer 24 with the same scale and ridge. `answers` are right tokens of facts behind a cut
of attention (the set "calibration"), alone in 512 tokens and in 1,024 tokens of prose; `ms` is the forward
pass of `inplace_ttt` over 2,048 tokens of one row, the median of interleaved runs.
"""

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import ttt_jax
import ttt_jax.ops.fast_weight.least_squares.sequential as sequential
from ttt_jax.config import TTTConfig
from ttt_jax.extras.facts.evaluate import score_facts
from ttt_jax.extras.facts.make import help_topics, make_rows
from ttt_jax.ops.fast_weight.least_squares.sums import Read, ridge_share

LAYER, CHUNK, SCALE, RIDGE, TOKENS, RUNS = 24, 256, 10.0, 0.01, 2048, 5
TTT = TTTConfig(
  layers=(LAYER,),
  chunk_size=CHUNK,
  init="next_token",
  rule="least_squares",
  ridge=RIDGE,
  read_scale=SCALE,
)


def conjugate_gradients(iterations):
  """Returns stand-ins for `factor` and `read` that solve `M u = k` by so many steps, from zero."""

  def factor(a, ridge):
    rho = ridge_share(ridge, a.shape[-1]) * jnp.trace(a, axis1=-2, axis2=-1)
    return sequential.Factored(a, rho, rho != 0)

  def read(keys, d, factored):
    a, rho, is_learned = factored
    times = lambda x: jnp.einsum("bcf,bfg->bcg", x, a) + rho[:, None, None] * x  # noqa: E731
    dot = lambda x, y: jnp.sum(x * y, axis=-1, keepdims=True)  # noqa: E731

    def step(_, carry):
      u, rest, direction, square = carry
      along = times(direction)
      alpha = square / jnp.maximum(dot(direction, along), 1e-30)
      u, rest = u + alpha * direction, rest - alpha * along
      new = dot(rest, rest)
      return u, rest, rest + new / jnp.maximum(square, 1e-30) * direction, new

    start = jnp.zeros_like(keys), keys, keys, dot(keys, keys)
    u = jax.lax.fori_loop(0, iterations, step, start)[0]
    u = jnp.where(is_learned[:, None, None], u, 0)
    leverage = dot(keys, keys)[..., 0] - rho[:, None] * dot(keys, u)[..., 0]
    return Read(jnp.einsum("bcf,bfd->bcd", u, d), jnp.where(is_learned[:, None], leverage, 0), u)

  return {"factor": factor, "read": read}


def main(path):
  tokenizer = ttt_jax.load_tokenizer(path)
  encode = functools.partial(tokenizer.encode, add_special_tokens=False)
  prose = encode(help_topics())
  load = functools.partial(ttt_jax.load_pretrained, path, dtype="float32")
  make = functools.partial(make_rows, "calibration", encode, rows=8, seed=7)
  rows = {"alone": make(facts=14, half=256), "in prose": make(facts=10, half=512, prose=prose)}

  # A of 8,192 tokens of prose, whose eigenvectors are the principal directions of keys.
  model = load(ttt=TTT)
  fast = ttt_jax.generate(model, [prose[:8192]], max_new_tokens=0).state.cache.layers[LAYER].fast
  _, vectors = np.linalg.eigh(np.asarray(fast.s.a[0], np.float64))
  f, d = vectors.shape[0], model.model.d_model

  def ranked(rank, kind):
    model = load(ttt=TTTConfig(**(vars(TTT) | {"key_rank": rank})))
    (mlp,) = [
      block.mlp for group in model.groups for block in group if hasattr(block.mlp, "key_rank")
    ]
    if kind == "principal":
      mlp.key_projection[...] = jnp.asarray(vectors[:, ::-1][None, :, :rank], jnp.float32)
    return model, mlp.key_projection[...][0]

  ways = {"cholesky": ("sequential", {}, None), "kernel": ("dual", {}, None)}
  ways |= {f"cg {n}": ("sequential", conjugate_gradients(n), None) for n in (4, 8, 16, 32)}
  ways |= {
    f"{kind} {rank}": ("sequential", {}, (rank, kind))
    for kind in ("random", "principal")
    for rank in (64, 128, 256, 512)
  }
  keys = jax.random.split(jax.random.key(0), 3)
  z, v = jax.random.normal(keys[0], (1, TOKENS, f)), jax.random.normal(keys[1], (1, TOKENS, d))
  w = jax.random.normal(keys[2], (f, d))
  table, timed = [], []
  for name, (implementation, patches, projected) in ways.items():
    old = {key: getattr(sequential, key) for key in patches}
    for key, value in patches.items():
      setattr(sequential, key, value)
    jax.clear_caches()
    projection = None
    if projected is None:
      model = load(ttt=TTTConfig(**(vars(TTT) | {"implementation": implementation})))
    else:
      model, projection = ranked(*projected)
    scores = {kind: score_facts(model, made)["answers"] for kind, made in rows.items()}
    op = jax.jit(
      functools.partial(
        ttt_jax.inplace_ttt,
        chunk_size=CHUNK,
        rule="least_squares",
        ridge=RIDGE,
        implementation=implementation,
        key_projection=projection,
      )
    )
    jax.block_until_ready(op(z, v, w))  # compiled while the patches are in place
    timed.append(functools.partial(op, z, v, w))
    table.append({"way": name, "answers": scores})
    print(table[-1], file=sys.stderr, flush=True)
    for key, value in old.items():
      setattr(sequential, key, value)
  times = [[] for _ in timed]
  for _ in range(RUNS):
    for run, list_ in zip(timed, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(run())
      list_.append(time.perf_counter() - start)
  for row, list_ in zip(table, times, strict=True):
    row["ms"] = 1e3 * statistics.median(list_)
  plain = load(ttt={"layers": ()})
  table.append(
    {"way": "no memory", "answers": {k: score_facts(plain, m)["answers"] for k, m in rows.items()}}
  )
  sizes = {
    "tokens": TOKENS,
    "d_ff": f,
    "d_model": d,
    "chunk_size": CHUNK,
    "ridge": RIDGE,
    "read_scale": SCALE,
  }
  json.dump(
    {"layer": LAYER, **sizes, "device": jax.devices()[0].device_kind, "ways": table},
    sys.stdout,
    indent=1,
  )


if __name__ == "__main__":
  main(sys.argv[1])
