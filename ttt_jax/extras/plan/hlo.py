"""What a compiled program does, read from its text: what it sends between devices, and what it moves.

XLA's own analysis counts the body of a loop once; here a program is a graph of computations, and each is
counted as often as it runs.
"""

import dataclasses
import math
import re
from collections import Counter
from functools import cached_property
from typing import NamedTuple

from ttt_jax.errors import UserError

_NAMES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf"^ *(?:ROOT )?%?\S+ = (.*?) ({_NAMES})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\) -> .*\{$")
_ANY = re.compile(r"^ *(ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{(.*?)\}")
# What only names, reorders or waits for values that are there already.
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
  """How often each collective stands in a compiled program; a loop's body counts once.

  One whose groups are of a single device sends nothing and is not counted.
  """
  return dict(Counter(found.kind for found in map(_collective, _found(compiled_text)) if found))


def sent_bytes(compiled_text: str) -> dict[str, int]:
  """Bytes that each collective sends from the device that sends most; a loop's body counts once.

  An all-gather of x sends x to P-1 devices, an all-to-all the parts that do not stay, an all-reduce
  `2 (P-1)/P` of its array (reduce, then gather), a collective-permute its array from every source.
  """
  sent: dict[str, Counter] = {}
  for found in filter(None, map(_collective, _found(compiled_text))):
    sent.setdefault(found.kind, Counter()).update(dict.fromkeys(found.senders or [-1], found.bytes))
  return {name: max(by_device.values(), default=0) for name, by_device in sent.items()}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction that sends.

  Attributes:
    kind: its name in HLO.
    bytes: that a device sends.
    senders: the devices that send, of a collective-permute; empty where all do.
    groups: devices that exchange with each other; of a permute the pairs (source, target).
    scope: where in the source it comes from, the `jax.named_scope`s in order.
    times: how often it runs.
  """

  kind: str
  bytes: int
  senders: tuple[int, ...]
  groups: tuple[tuple[int, ...], ...]
  scope: str
  times: int = 1


class Instruction(NamedTuple):
  name: str
  shape: str
  kind: str
  rest: str  # operands and attributes
  is_root: bool


class Program:
  """A compiled program by its computations, each with how often it runs."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    entry, body = None, []
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header is not None:
        body = self.computations.setdefault(header.group(2), [])
        entry = header.group(2) if header.group(1) else entry
      elif found := _ANY.match(line):
        root, name, shape, kind, rest = found.groups()
        body.append(Instruction(name, shape, kind, rest, root is not None))
    if entry is None:
      raise UserError("the text of a compiled program has no ENTRY computation")
    self.entry = entry
    # Loops whose number of iterations is not in the text; they count once.
    self.unknown_loops: list[str] = []

  @cached_property
  def times(self) -> dict[str, int]:
    """How often each computation runs."""
    times: Counter = Counter()

    def run(name: str, count: int) -> None:
      times[name] += count
      for instruction in self.computations.get(name, ()):
        trips = self._trips(instruction) if instruction.kind == "while" else 1
        called = _CALLED.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
          called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
          run(other, count * trips)

    run(self.entry, 1)
    return dict(times)

  @property
  def collectives(self) -> list[Collective]:
    """Every instruction that sends, with how often it runs."""
    found = []
    for name, count in self.times.items():
      body = self.computations.get(name, ())
      scopes = {x.name: _scope(x.rest) for x in body}
      for x in body:
        line = f"{x.name} = {x.shape} {x.kind}({x.rest}"
        for match in _INSTRUCTION.finditer(line):
          collective = _collective(match)
          if collective is None:
            continue
          if name.startswith(
            "all-reduce-scatter"
          ):  # how programs for TPU spell it: reduce, then cut
            kind, half = "reduce-scatter", collective.bytes // 2
            collective = dataclasses.replace(collective, kind=kind, bytes=half)
          # One that the compiler made of another has no scope of its own, but what it sends has.
          sent = next((scopes[y] for y in _operands(x.rest) if scopes.get(y)), "")
          found.append(dataclasses.replace(collective, times=count, scope=collective.scope or sent))
    return found

  @property
  def moved_bytes(self) -> int:
    """Bytes that the instructions read and write, those inside of a fusion not.

    An upper bound of what goes to and from the memory: arrays that the compiler keeps in the chip's own
    memory (`S(1)` in TPU programs) are left out, and a slice of an array counts as the slice; but a value
    that two instructions read counts twice.
    """
    inside = {
      called
      for body in self.computations.values()
      for x in body
      if x.kind in ("fusion", "reduce", "sort", "scatter", "select-and-scatter", "reduce-window")
      for called in _CALLED.findall(x.rest)
    }
    total = 0
    for name, count in self.times.items():
      if name in inside:
        continue
      shapes = {x.name: x.shape for x in self.computations.get(name, ())}
      for x in self.computations.get(name, ()):
        if x.kind not in _FREE and not x.kind.endswith("-done"):
          total += count * self._moved(x, shapes)
    return total

  def _moved(self, x: Instruction, shapes: dict[str, str]) -> int:
    written = _size(x.shape)
    read = [_size(shapes[name]) for name in _operands(x.rest) if name in shapes]
    if x.kind in ("dynamic-slice", "gather", "slice"):
      return 2 * written
    if x.kind == "dynamic-update-slice":
      return 2 * min(read[:2], default=0)
    if x.kind == "fusion" and (kept := self._sliced(x, shapes)) is not None:
      return kept
    return written + sum(read)

  def _sliced(self, x: Instruction, shapes: dict[str, str]) -> int | None:
    """What a fusion moves where it takes slices of its operands or writes one into its result."""
    body = self.computations.get(next(iter(_CALLED.findall(x.rest)), ""), ())
    operands = [name for name in _operands(x.rest) if name in shapes]
    parameters = {}
    for inner in body:
      if inner.kind == "parameter":
        index = int(inner.rest.split(")")[0])
        if index < len(operands):
          parameters[inner.name] = _size(shapes[operands[index]])
    written = _size(x.shape)
    inner_shapes = {inner.name: inner.shape for inner in body}
    sliced = False
    for inner in body:
      names = _operands(inner.rest)
      if inner.kind == "dynamic-slice" and names and names[0] in parameters:
        parameters[names[0]] = min(parameters[names[0]], _size(inner.shape))
        sliced = True
      if inner.kind == "dynamic-update-slice" and names and names[0] in parameters:
        update = _size(inner_shapes.get(names[1], "")) if len(names) > 1 else 0
        written = min(written, update) if inner.is_root else written
        parameters[names[0]] = 0
        sliced = True
    return written + sum(parameters.values()) if sliced else None

  def _trips(self, loop: Instruction) -> int:
    """Iterations of a loop that counts from a constant to a constant; 1 where the text does not say."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
    if known is not None:
      return int(known.group(1))
    numbers, test = self._condition(loop)
    if None in numbers or not (found := re.search(r"direction=(LT|LE)", test)):
      self.unknown_loops.append(loop.name)
      return 1
    index, limit = numbers
    return max(0, limit - index + (found.group(1) == "LE"))

  def _condition(self, loop: Instruction) -> tuple[list[int | None], str]:
    """The two numbers that a loop's condition compares before the first iteration, and how it does."""
    condition = self._by_name(re.search(r"\bcondition=%?([\w.\-]+)", loop.rest).group(1))
    test = next(x for x in condition.values() if x.is_root)
    names = _operands(test.rest)
    if test.kind == "fusion":
      inside = self._by_name(_CALLED.findall(test.rest)[0])
      given = {
        x.name: names[int(x.rest.split(")")[0])] for x in inside.values() if x.kind == "parameter"
      }
      condition |= inside
      test = next((x for x in inside.values() if x.kind == "compare"), test)
      names = [given.get(name, name) for name in _operands(test.rest)]
    if test.kind != "compare":
      return [None], test.rest
    return [self._number(loop, condition.get(name)) for name in names], test.rest

  def _number(self, loop: Instruction, x: Instruction | None) -> int | None:
    """A constant, or what an entry of a loop's state is at its start if that is one."""
    if x is not None and x.kind == "get-tuple-element":
      caller = next(body for body in self.computations.values() if loop in body)
      around = {y.name: y for y in caller}
      state = around.get(_operands(loop.rest)[0])
      if state is None or state.kind != "tuple":
        return None
      place = int(re.search(r"index=(\d+)", x.rest).group(1))
      x = around.get(_operands(state.rest)[place])
      while x is not None and x.kind in ("copy", "bitcast"):
        x = around.get(_operands(x.rest)[0])
    if x is None or x.kind != "constant":
      return None
    found = re.match(r"(-?\d+)\)", x.rest)
    return None if found is None else int(found.group(1))

  def _by_name(self, computation: str) -> dict[str, Instruction]:
    return {x.name: x for x in self.computations.get(computation, ())}


def _operands(rest: str) -> list[str]:
  """The names of an instruction's operands: of what stands before the bracket that closes them."""
  depth = 1
  for i, letter in enumerate(rest):
    depth += (letter in "([{") - (letter in ")]}")
    if depth == 0:
      return re.findall(r"%([\w.\-]+)", rest[:i])
  return re.findall(r"%([\w.\-]+)", rest)


def _size(shape: str) -> int:
  """Bytes of the arrays of a shape that lie in the device's memory."""
  arrays = re.finditer(rf"{_ARRAY.pattern}(\{{[^}}]*\}})?", shape)
  return sum(_bytes(array) for array in arrays if "S(1)" not in (array.group(4) or ""))


def _scope(rest: str) -> str:
  found = re.search(r'op_name="(.*?)"', rest)
  return "" if found is None else found.group(1)


def _found(text: str):
  return _INSTRUCTION.finditer(text)


def _collective(found: re.Match) -> Collective | None:
  """What a collective sends; None if its groups are of a single device."""
  shapes, kind, start, rest = found.groups()
  sizes = [_bytes(array) for array in _ARRAY.finditer(shapes)]
  scope = _scope(rest)
  if kind == "collective-permute":
    # An asynchronous one names its input, its output and two tokens; else there are only outputs.
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
    raise UserError(f"a collective without {name}: {rest[:200]}")
  return found.group(1)


def _groups(text: str) -> tuple[tuple[int, ...], ...]:
  """The groups of `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` or `mesh['a'=2,'b'=2] {'b'}`.

  A mesh may say which devices it has: `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`.
  """
  if text.startswith("mesh"):
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
    grouped = re.findall(r"'(\w+)'", text.rpartition(" ")[2])
    order = [name for name in axes if name not in grouped] + grouped
    places = [list(axes).index(name) for name in order]
    ids = _transposed(list(axes.values()), places)
    devices = re.search(r"device_ids=\((\[.*?)\) \{", text)
    if devices is not None:
      those = _iota(devices.group(1))
      ids = [those[i] for i in ids]
    return _cut(ids, math.prod(axes[name] for name in grouped))
  if text.startswith("["):
    shape, devices = text.split("<=")
    return _cut(_iota(devices), _numbers(shape)[-1])
  if text == "{}":
    return ((0,),)
  return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> list[int]:
  """The numbers of `[4,2]T(1,0)`: those of an array of that shape, transposed."""
  sizes, _, order = text.partition("T")
  sizes = _numbers(sizes)
  return _transposed(sizes, _numbers(order) if order else list(range(len(sizes))))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
  """`arange(prod(sizes)).reshape(sizes).transpose(order).ravel()`."""
  strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
  ids = [0]
  for axis in order:
    ids = [i + strides[axis] * k for i in ids for k in range(sizes[axis])]
  return ids


def _cut(ids: list[int], size: int) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))
