"""The files that a path names: a directory, a glob, a file, or the Python standard library."""

import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError

FORMATS = ".txt, .md, .py or .jsonl files (each also .gz), .parquet or .array_record files"
METADATA = "ttt_jax_data.json"  # what `ttt-jax data prepare` made has it, and says so in it

_TEXT = (".txt", ".md", ".py", ".jsonl")
_NOT_STDLIB = frozenset(
  {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_SHARD = re.compile(r"-\d+-of-\d+$")  # as in x.array_record-00000-of-00016


class Files(NamedTuple):
  source: str  # what they are, for people
  root: Path  # that names are relative to
  paths: list[Path]  # in the order of their names

  def name_of(self, path: Path) -> str:
    return path.relative_to(self.root).as_posix()


def find_files(path: str | None, skipped: Skipped, *, field: str) -> Files:
  """The files of known formats that `path` names, None for the standard library; others are counted.

  Links to directories are not followed, so links in a loop do no harm.

  Raises:
    ValueError: there is no such path, or a prepared corpus lies among the files. `field` is what
      messages call the path.
  """
  if path is None:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(file for file in _walk(root, skipped, _NOT_STDLIB) if file.suffix == ".py")
    version = platform.python_version()
    return Files(f"Python {version} standard library without its tests ({root})", root, paths)
  if not path:
    raise UserError(
      f"{field}={path!r} is empty: give a directory or glob of {FORMATS}, or null for the Python "
      "standard library"
    )
  literal = Path(path).expanduser()
  if literal.is_dir():
    root, found = literal, _walk(literal, skipped)
  elif literal.is_file():
    root, found = literal.parent, [literal]
  elif _is_pattern(path):
    root, found = _match(path, skipped, field)
  else:
    raise UserError(
      f"{field}={path!r} does not exist: give a directory or glob of {FORMATS}, or null for the "
      "Python standard library"
    )
  paths = []
  for file in sorted(found):
    if file.name == METADATA:
      raise UserError(
        f"{field}={path!r} holds a prepared corpus among its files: give its directory, "
        f"{str(file.parent)!r}, as data.path or as one of data.mixture"
      )
    if format_of(file) is None:
      skipped.add("other_format")
    else:
      paths.append(file)
  return Files(path, root, paths)


def format_of(path: Path) -> str | None:
  """`.txt`, `.md`, `.py`, `.jsonl`, `.parquet` or `.array_record`; None for any other."""
  name = path.name.lower()
  text = Path(name.removesuffix(".gz")).suffix
  if text in _TEXT:
    return text
  suffix = Path(_SHARD.sub("", name)).suffix
  if suffix in (".array_record", ".arrayrecord"):
    return ".array_record"
  return suffix if suffix == ".parquet" else None


def _walk(root: Path, skipped: Skipped, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
  """All files below `root`, but none below a directory link or a directory named in `excluded`."""
  for folder, subfolders, names in os.walk(root, onerror=lambda error: skipped.add("unreadable")):
    subfolders[:] = [name for name in subfolders if name not in excluded]
    links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
    skipped.add("linked_directory", len(links))
    yield from (Path(folder, name) for name in names)


def _is_pattern(part: str) -> bool:
  return re.search(r"[*?[]", part) is not None


def _match(path: str, skipped: Skipped, field: str) -> tuple[Path, list[Path]]:
  """The directory before the first wildcard, and the files that match below it."""
  parts = Path(path).expanduser().parts
  depth = next(i for i, part in enumerate(parts) if _is_pattern(part))
  if parts[-1] == "**":
    parts += ("*",)  # before Python 3.13 a last ** matches directories only
  root, pattern = Path(*parts[:depth]), "/".join(parts[depth:])
  try:
    # Unlike those of glob.glob, `**` here does not follow links into a loop.
    matches = list(root.glob(pattern))
  except ValueError as error:
    raise UserError(
      f"{field}={path!r} is not a valid glob ({error}): write ** as a whole directory, "
      "as in DIR/**/*.py"
    ) from error
  files = []
  for match in matches:
    if not match.is_dir():
      files.append(match)
    elif match.is_symlink() or "**" not in pattern:  # else `**` has looked inside
      skipped.add("directory")
  return root, files
