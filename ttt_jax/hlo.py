"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections import Counter

_NAMES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
_INSTRUCTION = re.compile(rf"^ *(?:ROOT )?%?\S+ = (.*?) ({_NAMES})(-start)?\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def count_collectives(compiled_text: str) -> dict[str, int]:
  """How often each collective stands in a compiled program; a loop's body counts once.

  One whose groups are of a single device sends nothing and is not counted.
  """
  counts = Counter()
  for found in _INSTRUCTION.finditer(compiled_text):
    _, name, _, rest = found.groups()
    if name == "collective-permute" or _group_size(_attribute(rest, "replica_groups")) > 1:
      counts[name] += 1
  return dict(counts)


def sent_bytes(compiled_text: str) -> dict[str, int]:
  """Bytes that each collective sends from the device that sends most; a loop's body counts once.

  An all-gather of x sends x to P-1 devices, an all-to-all the parts that do not stay, an all-reduce
  `2 (P-1)/P` of its array (reduce, then gather), a collective-permute its array from every source.
  """
  sent: dict[str, Counter] = {}
  for found in _INSTRUCTION.finditer(compiled_text):
    shapes, name, start, rest = found.groups()
    sizes = [_bytes(array) for array in _ARRAY.finditer(shapes)]
    by_device = sent.setdefault(name, Counter())
    if name == "collective-permute":
      # An asynchronous one names its input, its output and two tokens; else there are only outputs.
      size = sizes[0] if start else sum(sizes)
      for source in re.findall(r"\{(\d+),\d+\}", _attribute(rest, "source_target_pairs")):
        by_device[int(source)] += size
      continue
    p = _group_size(_attribute(rest, "replica_groups"))
    if start and len(sizes) > 1 and name != "all-to-all":
      sizes = sizes[len(sizes) // 2 :]  # inputs, then outputs
    size = sum(sizes)
    by_device[-1] += {
      "all-gather": size * (p - 1) // p,
      "all-to-all": size * (p - 1) // p,
      "all-reduce": 2 * size * (p - 1) // p,
      "reduce-scatter": size * (p - 1),
    }[name]
  return {name: max(by_device.values(), default=0) for name, by_device in sent.items()}


def _bytes(array: re.Match) -> int:
  kind, bits, dims = array.groups()
  numbers = math.prod(int(dim) for dim in dims.split(",") if dim)
  return numbers if kind == "pred" else numbers * int(bits) // 8


def _attribute(rest: str, name: str) -> str:
  groups = r"\{\{.*?\}\}|\{\}|\[\d+,\d+\]|mesh\[.*?\] \{.*?\}"
  found = re.search(rf"{name}=({groups})", rest)
  if found is None:
    raise ValueError(f"a collective without {name}: {rest[:200]}")
  return found.group(1)


def _group_size(groups: str) -> int:
  """Of `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['data'=2,'context'=2] {'context'}`: 2."""
  if groups.startswith("mesh"):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
    return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", groups.split("] ")[1]))
  if groups.startswith("["):
    return int(groups.strip("[]").split(",")[1])
  return len(groups[2:].split("}")[0].split(","))
