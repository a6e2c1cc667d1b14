"""Loads the YAML file of an ablation and makes the configs of its runs."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ttt_jax.config import Config
from ttt_jax.config.yaml import load_fields, load_yaml, make_config, merged_fields, nested_fields
from ttt_jax.errors import UserError
from ttt_jax.evaluation.perplexity import PerplexityConfig

_KEYS = {
  "name": str,
  "base": str,  # a config file, relative to this one
  "title": str,  # of the picture
  "set": dict,  # field: value, for all runs
  "grid": dict,  # field: list of values; every combination is a variant
  "variants": dict,  # name: {field: value}; in addition to the grid
  "reference": str,  # the variant that the others are compared with, seed by seed
  "seeds": list,
  "probe": dict,  # fields of `PerplexityConfig`: evaluates each model on one block after more context
  "recall": int,  # tokens of a window: evaluates recall by the distance in windows
}
_NEEDED = ("name", "base", "seeds")


@dataclass(frozen=True)
class Variant:
  """Holds one setting of the grid, which is trained once per seed."""

  name: str
  configs: tuple[Config, ...]  # by seed, in `Ablation.seeds`


@dataclass(frozen=True)
class Ablation:
  """Holds variants that differ in the fields of the grid and in nothing else."""

  name: str
  title: str
  directory: Path
  seeds: tuple[int, ...]
  variants: tuple[Variant, ...]
  reference: str | None = None
  probe: PerplexityConfig | None = None
  recall: int | None = None

  def runs(self) -> Iterator[tuple[Variant, Config]]:
    """Yields all runs seed by seed, so that an unfinished ablation has every variant equally often."""
    for index in range(len(self.seeds)):
      for variant in self.variants:
        yield variant, variant.configs[index]


def load_ablation(
  path: str | PathLike,
  overrides: Mapping[str, Any] | None = None,
  directory: str | PathLike | None = None,
) -> Ablation:
  """Loads the ablation of a YAML file, and checks each of its configs.

      name: ablation_chunk_size
      base: quickstart.yaml
      set: {train.steps: 200}
      grid: {ttt.chunk_size: [64, 256, 1024]}
      variants: {no fast weights: {ttt.layers: []}}
      reference: no fast weights
      seeds: [0, 1, 2]
      probe: {lengths: [1024, 4096, 16384], block: 512}

  Args:
    path: the file.
    overrides: fields for all runs by section, such as `{"train": {"steps": 100}}`; they win over `set`.
    directory: where runs and report go; None is runs/NAME.

  Raises:
    UserError: the file does not exist, has unknown keys or lacks some, names two variants alike, or has
      a variant, which is named, whose config `load_config` refuses.
  """
  path = Path(path)
  tree = load_yaml(path)
  unknown = [key for key in tree if key not in _KEYS]
  missing = [key for key in _NEEDED if key not in tree]
  if unknown or missing:
    raise UserError(
      f"{path} {'has' if unknown else 'lacks'} {', '.join(map(str, unknown or missing))}; an ablation "
      f"has {', '.join(_KEYS)}"
    )
  for key, kind in _KEYS.items():
    if key in tree and type(tree[key]) is not kind:
      raise UserError(f"{path}: {key}={tree[key]!r} must be of type {kind.__name__}")
  if tree.get("recall", 1) < 1:
    raise UserError(f"{path}: recall={tree['recall']} must be positive, the tokens of a window")
  seeds = tuple(tree["seeds"])
  if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(s, int) for s in seeds):
    raise UserError(f"{path}: seeds={list(seeds)} must be different integers, at least one")
  directory = Path("runs", tree["name"]) if directory is None else Path(directory)
  for_all = (nested_fields(tree.get("set", {})), {} if overrides is None else overrides)
  variants = []
  for name, fields in _settings(path, tree):
    configs = []
    for seed in seeds:
      run_dir = directory / _file_name(name) / f"seed{seed}"
      of_run = {"seed": seed, "name": name, "run_dir": str(run_dir)}
      try:
        base = load_fields(path.parent / tree["base"])
        configs.append(make_config(merged_fields(base, *for_all, nested_fields(fields), of_run)))
      except UserError as error:
        raise UserError(f"{path}, variant {name!r}: {error}") from error
    variants.append(Variant(name, tuple(configs)))
  if not variants:
    raise UserError(f"{path} has no variants: give grid, variants, or both")
  names = [_file_name(variant.name) for variant in variants]
  if repeated := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"{path} has several variants named {', '.join(repeated)}")
  reference = tree.get("reference")
  if reference is not None and reference not in (names := [variant.name for variant in variants]):
    raise UserError(
      f"{path}: reference={reference!r} is no variant; the variants are {', '.join(map(repr, names))}"
    )
  return Ablation(
    name=tree["name"],
    title=tree.get("title", tree["name"]),
    directory=directory,
    seeds=seeds,
    variants=tuple(variants),
    reference=reference,
    probe=_probe(path, tree.get("probe")),
    recall=tree.get("recall"),
  )


def _probe(path: Path, fields: dict[str, Any] | None) -> PerplexityConfig | None:
  if fields is None:
    return None
  names = [field.name for field in dataclasses.fields(PerplexityConfig)]
  if unknown := fields.keys() - set(names):
    raise UserError(
      f"{path}: probe has {', '.join(map(str, sorted(unknown)))}; it has {', '.join(names)}"
    )
  lists = ("lengths", "reset_every")
  for name, value in fields.items():
    numbers = value if name in lists and isinstance(value, list) else [value]
    if (name in lists) != isinstance(value, list) or not all(type(n) is int for n in numbers):
      kind = "a list of integers" if name in lists else "an integer"
      raise UserError(f"{path}: probe.{name}={value!r} must be {kind}")
  try:
    return PerplexityConfig(**{k: tuple(v) if k in lists else v for k, v in fields.items()})
  except UserError as error:
    raise UserError(f"{path}: probe.{error}") from error


def _settings(path: Path, tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields name and fields of every variant: the grid's combinations, then `variants`."""
  grid = tree.get("grid", {})
  for field, values in grid.items():
    if not isinstance(values, list) or not values:
      raise UserError(f"{path}: grid.{field}={values!r} must be a list of values")
  if grid:
    for values in itertools.product(*grid.values()):
      fields = dict(zip(grid, values))
      name = ", ".join(f"{field.rpartition('.')[2]}={_text(x)}" for field, x in fields.items())
      yield name, fields
  for name, fields in tree.get("variants", {}).items():
    if not isinstance(fields, dict):
      raise UserError(f"{path}: variants.{name}={fields!r} must be fields with values")
    yield str(name), fields


def _text(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _file_name(name: str) -> str:
  return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", name)
