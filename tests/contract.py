"""Random cases of the fast-weight op, the float64 law they are held to, and the op on P shards."""

from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import ttt_jax
from ttt_jax.names import COLLECTIVES as COLLECTIVES
from ttt_jax.ops.fast_weight.reference import inplace_ttt_reference

# All variants of the computation, as arguments of the op.
OP_VARIANTS = {
  "associative": {"implementation": "associative"},
  "dual": {"implementation": "dual"},
  "sequential, one product": {"implementation": "sequential", "merge": True},
  "sequential, two products": {"implementation": "sequential", "merge": False},
}

# max|a - b| / max|b|. bfloat16 rounds every input of a product and the output to 8 bits: a few times 2^-8.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.5e-2}


class Case(NamedTuple):
  """A case has sizes unequal to each other, arguments of the op, and random non-zero float64 arrays."""

  arrays: dict[str, np.ndarray]  # z, v, w_down, inner_lr and, where they take part, decay, state
  cotangents: tuple[np.ndarray, np.ndarray]
  chunk_size: int
  segment_ids: np.ndarray | None
  options: dict[str, Any]  # clip_norm, a constant decay


def make_case(
  *,
  seed=0,
  batch=2,
  tokens=24,
  chunk_size=3,
  f=5,
  d=6,
  segment_ids=None,
  decay=None,  # a float: constant; "learned": an array
  clip_norm=None,
  state=False,
  dtype="float32",
) -> Case:
  rng = np.random.default_rng(seed)

  def draw(*shape):
    # Rounded to the dtype of the test, so that all sides see the same inputs.
    return np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64)

  arrays = {
    "z": draw(batch, tokens, f),
    "v": draw(batch, tokens, d),
    "w_down": draw(f, d),
    "inner_lr": np.asarray(0.25),
  }
  options = {"clip_norm": clip_norm}
  if decay == "learned":
    arrays["decay"] = np.asarray(0.875)
  elif decay is not None:
    options["decay"] = decay
  if state:
    arrays["state"] = rng.normal(size=(batch, f, d)).astype(np.float32).astype(np.float64)
  cotangents = (draw(batch, tokens, d), draw(batch, f, d))
  if segment_ids is not None:
    segment_ids = np.asarray(segment_ids, np.int32)
  return Case(arrays, cotangents, chunk_size, segment_ids, options)


def packed(batch: int, tokens: int, documents: int = 4, seed: int = 0) -> np.ndarray:
  """Draws sorted random document numbers; 0, where drawn, is padding at the start."""
  rng = np.random.default_rng(seed)
  return np.sort(rng.integers(0, documents, (batch, tokens)), axis=1).astype(np.int32)


def expected(case: Case):
  """Returns (y, S) and the gradients in every array of the case, in float64, from the reference."""
  with jax.enable_x64(True):
    function = partial(
      inplace_ttt_reference,
      chunk_size=case.chunk_size,
      segment_ids=None if case.segment_ids is None else jnp.asarray(case.segment_ids),
      **case.options,
    )
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items()}
    return _values_and_gradients(
      lambda arrays: function(**arrays), arrays, tuple(map(jnp.asarray, case.cotangents))
    )


def several_slices():
  """Makes the ring a pipeline: the cost model would send states as small as these in one slice."""
  return mock.patch(
    "ttt_jax.ops.exchange.cost.ring_slices", lambda shards, size, device, *, rows: min(3, rows)
  )


@cache
def mesh_of(shards: int, explicit: bool = False) -> jax.sharding.Mesh:
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return jax.make_mesh((shards,), ("context",), axis_types=(kind,), devices=jax.devices()[:shards])


def op(case: Case, *, shards: int | None, check_vma=True, **settings):
  """Returns `inplace_ttt` as a function of the case's arrays, on `shards` devices or without a mesh."""

  def local(arrays, segment_ids, context_axis=None):
    with several_slices():
      return read(arrays, segment_ids, context_axis)

  def read(arrays, segment_ids, context_axis):
    arrays = dict(arrays)
    if "state" in arrays:
      arrays["state"] = ttt_jax.FastWeightState(arrays["state"])
    y, state = ttt_jax.inplace_ttt(
      **arrays,
      chunk_size=case.chunk_size,
      segment_ids=segment_ids,
      context_axis=context_axis,
      **case.options,
      **settings,
    )
    return y, state.S

  if shards is None:
    return lambda arrays: local(arrays, _ids(case))
  tokens, whole = PartitionSpec(None, "context"), PartitionSpec()
  specs = {name: tokens if name in ("z", "v") else whole for name in case.arrays}
  mapped = jax.shard_map(
    partial(local, context_axis="context"),
    mesh=mesh_of(shards),
    in_specs=(specs, whole if case.segment_ids is None else tokens),
    out_specs=(tokens, whole),
    check_vma=check_vma,
  )
  return lambda arrays: mapped(arrays, _ids(case))


def _ids(case: Case):
  return None if case.segment_ids is None else jnp.asarray(case.segment_ids)


def run(case: Case, *, dtype="float32", **settings):
  """Returns (y, S) and the gradients in every array, computed in `dtype` by the op."""
  wide = "float64" if dtype == "float64" else "float32"

  def cast(name, x):
    return jnp.asarray(x, dtype if name in ("z", "v", "w_down") else wide)

  arrays = {name: cast(name, x) for name, x in case.arrays.items()}
  cotangents = (jnp.asarray(case.cotangents[0], dtype), jnp.asarray(case.cotangents[1], wide))
  return _values_and_gradients(op(case, **settings), arrays, cotangents)


def _values_and_gradients(function, arrays, cotangents):
  @jax.jit
  def both(arrays, cotangents):
    values, pull_back = jax.vjp(function, arrays)
    return values, pull_back(cotangents)[0]

  return jax.tree.map(np.asarray, both(arrays, cotangents))


def assert_close(actual, law, dtype="float32"):
  """Asserts that values and gradients are within tolerance, and exactly 0 where the law's are."""
  (values, gradients), (law_values, law_gradients) = actual, law
  names = {"y": (values[0], law_values[0]), "S": (values[1], law_values[1])}
  names |= {f"d{name}": (gradients[name], law_gradients[name]) for name in law_gradients}
  for name, (a, b) in names.items():
    a, scale = np.asarray(a, np.float64), np.max(np.abs(b))
    assert np.isfinite(a).all(), name
    if scale == 0 and np.ndim(b) > 0:  # a scalar's terms may cancel to 0 there, to rounding here
      assert not a.any(), f"{name} must be exactly 0"
      continue
    # A sum of many terms that nearly cancel (a scalar's gradient) is held to its terms' size.
    size = max(scale, 0.1) if np.ndim(b) == 0 else scale
    error = np.max(np.abs(a - b)) / size
    assert error < TOLERANCE[dtype] * (10 if np.ndim(b) == 0 else 1), f"{name}: {error:.2e}"
