"""Parses the text of a compiled program: the bytes that it sends between devices and moves in memory.

XLA's cost analysis counts the body of a loop once. A `Program` is a graph of computations, each of which
counts as often as it runs; `count_collectives` and `sent_bytes` count instructions once.
"""

import dataclasses
import math
import re
from collections import Counter
from functools import cached_property
from typing import NamedTuple

from ttt_jax.errors import UserError

_NAMES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_COLLECTIVE = re.compile(rf"^ *(?:ROOT )?%?\S+ = (.*?) ({_NAMES})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_ANY_INSTRUCTION = re.compile(r"^ *(ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}")
# Instructions that move nothing: they name, group or await values that exist already.
_FREE = (
  *(
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
  ),
  *("after-all", "partition-id", "replica-id"),
)


def count_collectives(compiled_text: str) -> dict[str, int]:
  """Counts the collectives in a compiled program by kind; a loop's body counts once.

  A collective among groups of a single device sends nothing and is not counted.
  """
  return dict(Counter(x.kind for x in _collectives_in(compiled_text)))


def sent_bytes(compiled_text: str) -> dict[str, int]:
  """Counts the bytes of the device that sends most, by kind of collective; a loop's body counts once.

  An all-gather of x sends x to P-1 devices, an all-to-all the parts for other devices, an all-reduce
  `2 (P-1)/P` of its array (reduce, then gather), a collective-permute its array from every source.
  """
  sent: dict[str, Counter] = {}
  for x in _collectives_in(compiled_text):
    sent.setdefault(x.kind, Counter()).update(dict.fromkeys(x.senders or [-1], x.bytes))
  return {name: max(by_device.values(), default=0) for name, by_device in sent.items()}


@dataclasses.dataclass(frozen=True)
class Collective:
  """Describes one instruction that sends between devices.

  Attributes:
    kind: its name in HLO.
    bytes: the bytes that a device sends.
    senders: the devices that send in a collective-permute; empty where all devices send.
    groups: the devices that exchange with each other; in a permute the pairs (source, target).
    scope: the `jax.named_scope`s that it was traced in, in order.
    times: how often it runs.
  """

  kind: str
  bytes: int
  senders: tuple[int, ...]
  groups: tuple[tuple[int, ...], ...]
  scope: str
  times: int = 1


class Instruction(NamedTuple):
  """Holds the parts of one line of a program."""

  name: str
  shape: str
  kind: str
  rest: str  # operands and attributes
  is_root: bool


class Program:
  """Holds the computations of a compiled program, and counts how often each runs."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    entry, body = None, []
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header is not None:
        body = self.computations.setdefault(header.group(2), [])
        entry = header.group(2) if header.group(1) else entry
      elif found := _ANY_INSTRUCTION.match(line):
        root, name, shape, kind, rest = found.groups()
        body.append(Instruction(name, shape, kind, rest, root is not None))
    if entry is None:
      raise UserError("the text of a compiled program has no ENTRY computation")
    self.entry = entry
    # Loops whose trip count the text does not say; they count once.
    self.unknown_loops: list[str] = []

  @cached_property
  def times(self) -> dict[str, int]:
    """Counts how often each computation runs."""
    times: Counter = Counter()

    def run(name: str, count: int) -> None:
      times[name] += count
      for instruction in self.computations.get(name, ()):
        trips = self._trips(instruction) if instruction.kind == "while" else 1
        called = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
          called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for callee in called:
          run(callee, count * trips)

    run(self.entry, 1)
    return dict(times)

  @property
  def collectives(self) -> list[Collective]:
    """Lists every instruction that sends, with how often it runs."""
    sending = []
    for name, count in self.times.items():
      body = self.computations.get(name, ())
      scopes = {x.name: _scope(x.rest) for x in body}
      for x in body:
        line = f"{x.name} = {x.shape} {x.kind}({x.rest}"
        for match in _COLLECTIVE.finditer(line):
          collective = _collective(match)
          if collective is None:
            continue
          # Programs for TPU spell a reduce-scatter as a computation that reduces, then cuts.
          if name.startswith("all-reduce-scatter"):
            kind, half = "reduce-scatter", collective.bytes // 2
            collective = dataclasses.replace(collective, kind=kind, bytes=half)
          # A collective that the compiler made has no scope, but its operands have.
          scope = next((scopes[y] for y in _operands(x.rest) if scopes.get(y)), "")
          scope = collective.scope or scope
          sending.append(dataclasses.replace(collective, times=count, scope=scope))
    return sending

  @property
  def moved_bytes(self) -> int:
    """Counts the bytes that instructions load and store; those inside a fusion do not count.

    It is an upper bound of the memory traffic: a value that two instructions load counts twice. Arrays in
    the chip's own memory (`S(1)` in TPU programs) do not count, and a slice counts without its array.
    """
    fused = {
      called
      for body in self.computations.values()
      for x in body
      if x.kind in ("fusion", "reduce", "sort", "scatter", "select-and-scatter", "reduce-window")
      for called in _CALLED.findall(x.rest)
    }
    total = 0
    for name, count in self.times.items():
      if name in fused:
        continue
      shapes = {x.name: x.shape for x in self.computations.get(name, ())}
      for x in self.computations.get(name, ()):
        if x.kind not in _FREE and not x.kind.endswith("-done"):
          total += count * self._moved(x, shapes)
    return total

  def _moved(self, x: Instruction, shapes: dict[str, str]) -> int:
    stored = _size(x.shape)
    loaded = [_size(shapes[name]) for name in _operands(x.rest) if name in shapes]
    if x.kind in ("dynamic-slice", "gather", "slice"):
      return 2 * stored
    if x.kind == "dynamic-update-slice":
      return 2 * min(loaded[:2], default=0)
    if x.kind == "fusion" and (sliced := self._moved_by_slices(x, shapes)) is not None:
      return sliced
    return stored + sum(loaded)

  def _moved_by_slices(self, x: Instruction, shapes: dict[str, str]) -> int | None:
    """Counts a fusion that slices its operands or updates a slice of its result; None for others."""
    body = self.computations.get(next(iter(_CALLED.findall(x.rest)), ""), ())
    operands = [name for name in _operands(x.rest) if name in shapes]
    parameters = {}
    for inner in body:
      if inner.kind == "parameter":
        index = int(inner.rest.split(")")[0])
        if index < len(operands):
          parameters[inner.name] = _size(shapes[operands[index]])
    stored = _size(x.shape)
    inner_shapes = {inner.name: inner.shape for inner in body}
    sliced = False
    for inner in body:
      names = _operands(inner.rest)
      if inner.kind == "dynamic-slice" and names and names[0] in parameters:
        parameters[names[0]] = min(parameters[names[0]], _size(inner.shape))
        sliced = True
      if inner.kind == "dynamic-update-slice" and names and names[0] in parameters:
        update = _size(inner_shapes.get(names[1], "")) if len(names) > 1 else 0
        stored = min(stored, update) if inner.is_root else stored
        parameters[names[0]] = 0
        sliced = True
    return stored + sum(parameters.values()) if sliced else None

  def _trips(self, loop: Instruction) -> int:
    """Returns a loop's trip count if it counts from a constant to a constant; else 1."""
    trip_count = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if trip_count is not None:
      return int(trip_count.group(1))
    numbers, test = self._condition(loop)
    if None in numbers or not (found := re.search(r"direction=(LT|LE)", test)):
      self.unknown_loops.append(loop.name)
      return 1
    index, limit = numbers
    return max(0, limit - index + (found.group(1) == "LE"))

  def _condition(self, loop: Instruction) -> tuple[list[int | None], str]:
    """Returns the two numbers that a loop first compares, and the text of the comparison."""
    condition = self._by_name(re.search(r"\bcondition=%?([\w.\-]+)", loop.rest).group(1))
    test = next(x for x in condition.values() if x.is_root)
    names = _operands(test.rest)
    if test.kind == "fusion":
      fused = self._by_name(_CALLED.findall(test.rest)[0])
      operands = {
        x.name: names[int(x.rest.split(")")[0])] for x in fused.values() if x.kind == "parameter"
      }
      condition |= fused
      test = next((x for x in fused.values() if x.kind == "compare"), test)
      names = [operands.get(name, name) for name in _operands(test.rest)]
    if test.kind != "compare":
      return [None], test.rest
    return [self._number(loop, condition.get(name)) for name in names], test.rest

  def _number(self, loop: Instruction, x: Instruction | None) -> int | None:
    """Returns the value of a constant, or the constant that an entry of a loop's state starts from."""
    if x is not None and x.kind == "get-tuple-element":
      caller = next(body for body in self.computations.values() if loop in body)
      by_name = {y.name: y for y in caller}
      state = by_name.get(_operands(loop.rest)[0])
      if state is None or state.kind != "tuple":
        return None
      place = int(re.search(r"index=(\d+)", x.rest).group(1))
      x = by_name.get(_operands(state.rest)[place])
      while x is not None and x.kind in ("copy", "bitcast"):
        x = by_name.get(_operands(x.rest)[0])
    if x is None or x.kind != "constant":
      return None
    found = re.match(r"(-?\d+)\)", x.rest)
    return None if found is None else int(found.group(1))

  def _by_name(self, computation: str) -> dict[str, Instruction]:
    return {x.name: x for x in self.computations.get(computation, ())}


def _operands(rest: str) -> list[str]:
  """Returns the names of an instruction's operands, which end at their closing bracket."""
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0:
      return re.findall(r"%([\w.\-]+)", rest[:i])
  return re.findall(r"%([\w.\-]+)", rest)


def _size(shape: str) -> int:
  """Counts the bytes of the arrays of a shape that lie in the device's memory."""
  arrays = re.finditer(rf"{_ARRAY.pattern}(\{{[^}}]*\}})?", shape)
  return sum(_bytes(array) for array in arrays if "S(1)" not in (array.group(4) or ""))


def _scope(rest: str) -> str:
  found = re.search(r'op_name="(.*?)"', rest)
  return "" if found is None else found.group(1)


def _collectives_in(text: str) -> list[Collective]:
  """Lists the collectives that send, each once."""
  return [x for match in _COLLECTIVE.finditer(text) if (x := _collective(match)) is not None]


def _collective(match: re.Match) -> Collective | None:
  """Makes the collective of a line; None if its groups have a single device."""
  shapes, kind, start, rest = match.groups()
  sizes = [_bytes(array) for array in _ARRAY.finditer(shapes)]
  scope = _scope(rest)
  if kind == "collective-permute":
    # An asynchronous permute has its input, its output and two tokens as result; others only outputs.
    size = sizes[0] if start else sum(sizes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", _attribute(rest, "source_target_pairs"))
    pairs = tuple((int(source), int(target)) for source, target in pairs)
    return Collective(kind, size, tuple(source for source, _ in pairs), pairs, scope)
  groups = _groups(_attribute(rest, "replica_groups"))
  p = len(groups[0])
  if p == 1:
    return None
  if start and len(sizes) > 1 and kind != "all-to-all":
    sizes = sizes[len(sizes) // 2 :]  # inputs, then outputs
  size = sum(sizes)
  sent = {
    "all-gather": size * (p - 1) // p,
    "all-to-all": size * (p - 1) // p,
    "all-reduce": 2 * size * (p - 1) // p,
    "reduce-scatter": size * (p - 1),
  }[kind]
  return Collective(kind, sent, (), groups, scope)


def _bytes(array: re.Match) -> int:
  kind, bits, dims = array.groups()[:3]
  numbers = math.prod(int(dim) for dim in dims.split(",") if dim)
  return numbers if kind == "pred" else numbers * int(bits) // 8


def _attribute(rest: str, name: str) -> str:
  lists, iota = r"\{\{.*?\}\}|\{\}", r"\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
  groups = rf"{lists}|{iota}|mesh\[.*?\](?:, device_ids=\(.*?\)+)? \{{.*?\}}"
  found = re.search(rf"{name}=({groups})", rest)
  if found is None:
    raise UserError(f"a collective has no {name}: {rest[:200]}")
  return found.group(1)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
  """Parses `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'b'}`.

  A mesh may name its devices: `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.
  """
  if text.startswith("mesh"):
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    grouped = re.findall(r"'(\w+)'", text.rpartition(" ")[2])
    order = [name for name in axes if name not in grouped] + grouped
    places = [list(axes).index(name) for name in order]
    ids = _transposed(list(axes.values()), places)
    devices = re.search(r"device_ids=\((\[.*?)\) \{", text)
    if devices is not None:
      device_ids = _iota(devices.group(1))
      ids = [device_ids[i] for i in ids]
    return _cut(ids, math.prod(axes[name] for name in grouped))
  if text.startswith("["):
    shape, devices = text.split("<=")
    return _cut(_iota(devices), _numbers(shape)[-1])
  if text == "{}":
    return ((0,),)
  return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> list[int]:
  """Parses `[4,2]T(1,0)`: the numbers 0, 1, ... in an array of that shape, transposed."""
  sizes, _, order = text.partition("T")
  sizes = _numbers(sizes)
  return _transposed(sizes, _numbers(order) if order else list(range(len(sizes))))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
  """Returns `arange(prod(sizes)).reshape(sizes).transpose(order).ravel()`."""
  strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  ids = [0]
  for axis in order:
    ids = [i + strides[axis] * k for i in ids for k in range(sizes[axis])]
  return ids


def _cut(ids: list[int], size: int) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))
