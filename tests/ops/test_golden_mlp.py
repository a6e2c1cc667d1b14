"""The numbers of the published implementation (PyTorch), whole MLPs with random weights.

`tests/golden/mlp` holds its inputs and float64 results. Its layouts: convolution `[D, 1, width]`, gate and
up `[F, D]`, down `[D, F]`; its projection is used as stored.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax import inplace_ttt, ntp_targets

CASES = sorted((Path(__file__).parent.parent / "golden" / "mlp").glob("*.npz"))
TOLERANCE = {"float64": 1e-11, "float32": 1e-5}  # golden/README: max|a-b| / max|b|


def _mlp(arrays, *, chunk_size, inner_lr, implementation):
  """out and the final weights, in the published layouts."""
  x = arrays["x"]
  z = jax.nn.silu(x @ arrays["gate"].T) * (x @ arrays["up"].T)
  v = ntp_targets(arrays["t"], arrays["conv"][:, 0].T, arrays.get("proj"), chunk_size=chunk_size)
  out, state = inplace_ttt(
    z,
    v,
    arrays["down"].T,
    chunk_size=chunk_size,
    inner_lr=inner_lr,
    implementation=implementation,
  )
  return out, arrays["down"][None] + jnp.swapaxes(state.S, 1, 2)


@pytest.mark.parametrize("implementation", ["associative", "sequential"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_numbers(path, dtype, implementation):
  golden = np.load(path)
  config = json.loads(path.with_suffix(".json").read_text())["config"]
  with jax.enable_x64(dtype == "float64"):
    names = [n for n in ("x", "t", "gate", "up", "down", "conv", "proj") if n in golden]
    arrays = {name: jnp.asarray(golden[name], dtype) for name in names}
    cotangent = jnp.asarray(golden["cotangent"], dtype)
    mlp = partial(
      _mlp,
      chunk_size=config["chunk"],
      inner_lr=config["ttt_lr"],
      implementation=implementation,
    )

    @jax.jit
    def both(arrays, cotangent):
      (out, final), pull_back = jax.vjp(mlp, arrays)
      return out, final, pull_back((cotangent, jnp.zeros_like(final)))[0]

    out, final, gradients = jax.tree.map(np.asarray, both(arrays, cotangent))

  results = {"out": out, "down_final": final} | {f"grad_{n}": g for n, g in gradients.items()}
  expected = {k.removeprefix("f64."): golden[k] for k in golden if k.startswith("f64.")}
  assert set(results) == set(expected)
  for name, value in expected.items():
    if not value.any():
      assert not results[name].any(), f"{name} must be exactly 0"
    else:
      error = np.max(np.abs(results[name] - value)) / np.max(np.abs(value))
      assert error < TOLERANCE[dtype], f"{name}: {error:.2e}"


def test_all_cases_are_here():
  assert len(CASES) == 9
