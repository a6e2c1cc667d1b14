"""Counts the FLOPs of a traced program's products on one device, remat included.

XLA's cost analysis counts a loop's body once and nothing inside a kernel; a jaxpr says how often a scan
runs and what a kernel computes.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ttt_jax.training.flops import visible_keys


class _Row(NamedTuple):
  """Describes a row, for the pairs of tokens that attention kernels compute."""

  tokens: int
  window: int | None


def device_flops(
  jaxpr: ClosedJaxpr, *, devices: int, tokens: int, window: int | None = None
) -> float:
  """Counts the FLOPs of one device, two for a multiplication and an addition.

      dot_general      2 x (numbers of the result) x (numbers summed for each)
      cholesky         n^3 / 3 for a matrix [n, n];    triangular_solve   n x (numbers of the result)
      attention kernel (products per block of scores) x 2 K x (pairs of query and key that see each other)

  Outside `jax.shard_map` arrays are global, and the devices share a product evenly. A `cond` counts its
  most expensive branch; a `while`, whose length is unknown, counts once.

  Args:
    jaxpr: the program.
    devices: the number of devices of its mesh.
    tokens: the tokens of a row.
    window: the window of the attention layers that have one.
  """
  return _flops(jaxpr.jaxpr, 1 / devices, _Row(tokens, window))


def _flops(jaxpr: Jaxpr, share: float, row: _Row) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += share * _product(equation)
    elif name == "cholesky":
      shape = equation.outvars[0].aval.shape
      total += share * math.prod(shape) * shape[-1] / 3
    elif name == "triangular_solve":
      total += share * math.prod(equation.outvars[0].aval.shape) * equation.invars[0].aval.shape[-1]
    elif name == "pallas_call":
      total += share * _kernel(equation, row)
    elif name == "cond":
      total += max(_flops(branch.jaxpr, share, row) for branch in params["branches"])
    else:
      times = params["length"] if name == "scan" else 1
      within = 1.0 if name == "shard_map" else share
      total += times * sum(_flops(inner, within, row) for inner in _inner(params))
  return total


class TracedArray(NamedTuple):
  """Describes one device's part of an array that a program makes."""

  bytes: float
  shape: str
  scope: str  # the `jax.named_scope`s that it is made in


# Primitives whose results are stored; results of others are mostly fused into their consumers.
_STORED = ("dot_general", "scan", "all_gather", "all_to_all", "pallas_call", "gather")


def largest_arrays(jaxpr: ClosedJaxpr, *, devices: int, count: int) -> list[TracedArray]:
  """Returns the largest arrays by shape and scope; a loop's stacked results count as the loop's."""
  largest: dict[tuple[str, str], TracedArray] = {}

  def visit(jaxpr: Jaxpr, share: float) -> None:
    for equation in jaxpr.eqns:
      if equation.primitive.name in _STORED:
        scope = str(equation.source_info.name_stack)
        for variable in equation.outvars:
          shape = variable.aval.str_short()
          size = share * math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
          array = TracedArray(size, shape, scope)
          largest[shape, scope] = max(array, largest.get((shape, scope), array))
      if equation.primitive.name != "pallas_call":
        within = 1.0 if equation.primitive.name == "shard_map" else share
        for inner in _inner(equation.params):
          visit(inner, within)

  visit(jaxpr.jaxpr, 1 / devices)
  return sorted(largest.values(), reverse=True)[:count]


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
  """Returns the jaxprs among an equation's parameters; derivative rules, which are functions, are not."""
  found = []
  for leaf in jax.tree.leaves(
    list(params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
  ):
    if isinstance(leaf, ClosedJaxpr):
      found.append(leaf.jaxpr)
    elif isinstance(leaf, Jaxpr):
      found.append(leaf)
  return found


def _product(equation: Any) -> float:
  (summed, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in summed)


def _kernel(equation: Any, row: _Row) -> float:
  """Counts a splash attention kernel, which computes the blocks where a query sees a key.

  Blocks on a diagonal count half. A kernel that visits all blocks belongs to full attention.
  """
  q, k = [v.aval for v in equation.invars if v.aval.dtype.kind not in "iu"][:2]
  heads, tokens, width = q.shape[-3:]
  products = _products(equation.params["jaxpr"])
  scores = math.prod(products[0].outvars[0].aval.shape)
  visited = math.prod(equation.params["grid_mapping"].grid) * scores
  is_full = visited >= math.prod(q.shape[:-1]) * k.shape[-2]
  seen = visible_keys(row.tokens, None if is_full else row.window)
  return len(products) * 2.0 * width * math.prod(q.shape[:-3]) * heads * tokens * seen


def _products(jaxpr: Jaxpr) -> list[Any]:
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      found.append(equation)
    for inner in _inner(equation.params):
      found += _products(inner)
  return found
