"""Finds the files that a path names: a directory, a glob, a file, or the Python standard library."""

import functools
import os
import platform
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
FORMATS = (
  ".txt, .md, .py, .jsonl or .json files (each also .gz, .zst, .bz2 or .xz), .parquet or "
  ".array_record files"
)
METADATA = "ttt_jax_data.json"  # in every directory that `ttt-jax data prepare` made

_TEXT = (".txt", ".md", ".py", ".jsonl", ".json")
_NOT_STDLIB = frozenset(
  {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)
_SHARD = re.compile(r"-\d+-of-\d+$")  # as in x.array_record-00000-of-00016


class Files(NamedTuple):
  """Lists the files of a source."""

  source: str  # description for messages
  root: Path  # directory to which names are relative
  paths: list[Path]  # sorted

  def name_of(self, path: Path) -> str:
    return path.relative_to(self.root).as_posix()


def find_files(path: str | None, skipped: Skipped, *, field: str) -> Files:
  """Finds the files of known formats that `path` names, None for the standard library; counts others.

  Hidden files, and all files below a hidden directory (`.git`, `.ipynb_checkpoints`), are left out unless
  `path` spells out their dot, as in Hugging Face's `datasets`: they are often copies of other files, and a
  copy of a held-out text under another name would be trained on. For the same reason a file with several
  links is loaded under one name. Links to directories are not followed, so loops of links are harmless.

  Args:
    path: a directory, a glob or a file; None: the Python standard library.
    skipped: counts the files that are left out.
    field: the name of `path` in messages.

  Raises:
    UserError: the path does not exist, or a prepared corpus is among the files.
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
    root, found = _glob(path, skipped, field)
  else:
    raise UserError(
      f"{field}={path!r} does not exist: give a directory or glob of {FORMATS}, or null for the "
      "Python standard library"
    )
  paths = []
  for file in _unique_files(root, sorted(found), skipped):
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
  """Returns `.txt`, `.md`, `.py`, `.jsonl`, `.json`, `.parquet` or `.array_record`; None for others."""
  name = path.name.lower()
  compression = compression_of(path)
  text = Path(name.removesuffix(compression or "")).suffix
  if text in _TEXT:
    return text
  suffix = Path(_SHARD.sub("", name)).suffix
  if suffix in (".array_record", ".arrayrecord"):
    return ".array_record"
  return suffix if suffix == ".parquet" else None


def compression_of(path: Path) -> str | None:
  """Returns `.gz`, `.zst`, `.bz2` or `.xz`; None for a file that is not compressed as a whole."""
  suffix = path.suffix.lower()
  return suffix if suffix in COMPRESSED else None


def _is_hidden(name: str) -> bool:
  return name.startswith(".") and name.strip(".") != ""  # `.` and `..` are not hidden


def real_paths(files: Iterable[Path]) -> list[str]:
  """Returns the path of each file after following all links, also links of directories."""
  folder = functools.cache(os.path.realpath)
  return [
    os.path.realpath(file) if file.is_symlink() else os.path.join(folder(file.parent), file.name)
    for file in files
  ]


def _unique_files(root: Path, files: list[Path], skipped: Skipped) -> list[Path]:
  """Returns each file once, by its path without links, else by its first path."""
  real = dict(zip(files, real_paths(files)))
  base = os.path.realpath(root)
  direct = {file for file in files if real[file] == os.path.join(base, file.relative_to(root))}
  first: dict[str, Path] = {}
  for file in sorted(files, key=lambda file: file not in direct):
    first.setdefault(real[file], file)
  kept = set(first.values())
  skipped.add("linked_file", len(files) - len(kept))
  return [file for file in files if file in kept]


def _walk(root: Path, skipped: Skipped, excluded: frozenset[str] = frozenset()) -> Iterator[Path]:
  """Yields files below `root`, except hidden ones and those below linked or `excluded` directories."""
  for folder, subfolders, names in os.walk(root, onerror=lambda error: skipped.add("unreadable")):
    hidden = {name for name in (*subfolders, *names) if _is_hidden(name)}
    skipped.add("hidden", len(hidden))
    subfolders[:] = [name for name in subfolders if name not in excluded | hidden]
    links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
    skipped.add("linked_directory", len(links))
    yield from (Path(folder, name) for name in names if name not in hidden)


def _is_pattern(part: str) -> bool:
  return re.search(r"[*?[]", part) is not None


def _glob(path: str, skipped: Skipped, field: str) -> tuple[Path, list[Path]]:
  """Returns the directory before the first wildcard, and the files that match below it."""
  parts = Path(path).expanduser().parts
  depth = next(i for i, part in enumerate(parts) if _is_pattern(part))
  if parts[-1] == "**":
    parts += ("*",)  # before Python 3.13 a final ** matches directories only
  root, pattern = Path(*parts[:depth]), "/".join(parts[depth:])
  try:
    # Unlike in glob.glob, `**` does not follow links into a loop here.
    matches = list(root.glob(pattern))
  except ValueError as error:
    raise UserError(
      f"{field}={path!r} is not a valid glob ({error}): use ** as a whole path component, "
      "as in DIR/**/*.py"
    ) from error
  explicit_dots = sum(map(_is_hidden, parts[depth:]))
  files, hidden = [], set()
  for match in matches:
    below = match.relative_to(root).parts
    dots = [i for i, part in enumerate(below) if _is_hidden(part)]
    if len(dots) != explicit_dots:
      hidden.add(below[: dots[0] + 1])
    elif not match.is_dir():
      files.append(match)
    elif match.is_symlink() or "**" not in pattern:  # else `**` has searched it
      skipped.add("directory")
  skipped.add("hidden", len(hidden))
  return root, files
