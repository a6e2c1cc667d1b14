"""The rooms of the package: imports go downwards only, and there is no circle."""

import ast
import graphlib
from pathlib import Path

import pytest

import ttt_jax

ROOT = Path(ttt_jax.__file__).parent
# From the bottom up: a package imports those before it.
ORDER = (
  "errors",
  "names",
  "files",
  "config",
  "ops",
  "parallel",
  "progress",
  "nn",
  "checkpoints",
  "data",
  "generation",
  "evaluation",
  "training",
  "extras",
  "cli",
)
MODULES = {
  ".".join(("ttt_jax", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
    ".__init__"
  ): path
  for path in ROOT.rglob("*.py")
}


def _imports(path: Path) -> set[str]:
  """The modules of the package that a file imports, inside of functions too."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ttt_jax":
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name in MODULES else node.module for name in names}
  return found


def _package(module: str) -> str:
  return module.split(".")[1] if "." in module else ""


def test_every_room_has_its_floor():
  assert {_package(module) for module in MODULES} - {""} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_downwards(package):
  below = ORDER[: ORDER.index(package) + 1]
  upwards = {
    (module, imported)
    for module, path in MODULES.items()
    if _package(module) == package
    for imported in _imports(path)
    if _package(imported) not in ("", *below)
  }
  assert upwards == set()


def test_no_two_modules_need_each_other():
  """TopologicalSorter raises CycleError, with the modules of the circle."""
  graph = {module: _imports(path) - {module} for module, path in MODULES.items()}
  list(graphlib.TopologicalSorter(graph).static_order())


def test_files_are_of_a_size_to_be_read():
  """Twice what one wants to scroll through; most are half of it."""
  long = {m: len(path.read_text().splitlines()) for m, path in MODULES.items()}
  assert {m: n for m, n in long.items() if n > 440} == {}
