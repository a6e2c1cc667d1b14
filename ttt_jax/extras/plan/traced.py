"""FLOPs of a program that was traced, on one device: of the products it runs, those of remat too.

What XLA reports of a compiled program counts a loop's body once, and nothing of a kernel; a jaxpr says
how often a scan runs and what is in a kernel.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from ttt_jax.training.flops import visible_keys


class _Row(NamedTuple):
  tokens: int
  window: int | None


def device_flops(
  jaxpr: ClosedJaxpr, *, devices: int, tokens: int, window: int | None = None
) -> float:
  """FLOPs that one of `devices` devices does, two for a multiplication and an addition.

      dot_general      2 x (numbers of the result) x (numbers summed for each)
      attention kernel (products per block of scores) x 2 K x (pairs of query and key that see each other)

  Outside of `jax.shard_map` arrays are whole, and every device does its part of a product. Of a `cond` the
  dearest branch counts; a `while` of unknown length counts once.

  Args:
    jaxpr: of the program.
    devices: of its mesh.
    tokens: of a row.
    window: of the attention layers that have one.
  """
  return _flops(jaxpr.jaxpr, 1 / devices, _Row(tokens, window))


def _flops(jaxpr: Jaxpr, share: float, row: _Row) -> float:
  total = 0.0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += share * _product(equation)
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
  """A device's part of an array that a program makes."""

  bytes: float
  shape: str
  scope: str  # the `jax.named_scope`s it is made in


# What makes an array that has to be stored; results of other primitives are mostly parts of a fusion.
_STORED = ("dot_general", "scan", "all_gather", "all_to_all", "pallas_call", "gather")


def largest_arrays(jaxpr: ClosedJaxpr, *, devices: int, count: int) -> list[TracedArray]:
  """The largest arrays of a program, by shape and scope; those of a loop's steps stacked, with the loop."""
  found: dict[tuple[str, str], TracedArray] = {}

  def visit(jaxpr: Jaxpr, share: float) -> None:
    for equation in jaxpr.eqns:
      if equation.primitive.name in _STORED:
        scope = str(equation.source_info.name_stack)
        for variable in equation.outvars:
          shape = variable.aval.str_short()
          size = share * math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
          array = TracedArray(size, shape, scope)
          found[shape, scope] = max(array, found.get((shape, scope), array))
      if equation.primitive.name != "pallas_call":
        within = 1.0 if equation.primitive.name == "shard_map" else share
        for inner in _inner(equation.params):
          visit(inner, within)

  visit(jaxpr.jaxpr, 1 / devices)
  return sorted(found.values(), reverse=True)[:count]


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
  """The jaxprs among an equation's parameters; derivative rules are functions, and not among them."""
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
  """Of splash attention, whose blocks are computed where a query sees a key, half of them on diagonals.

  A kernel that visits all blocks is that of full attention.
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
