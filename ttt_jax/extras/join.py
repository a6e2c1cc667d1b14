"""Joins the files of a directory into one document: a repository, a package, a manual of many pages.

A file rarely repeats what is far behind in it; the other files of its directory do.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ttt_jax.data.files import find_files
from ttt_jax.data.formats import checked_text_field, load_texts
from ttt_jax.data.skipped import Skipped
from ttt_jax.errors import UserError
from ttt_jax.files import atomic_file


class Joined(NamedTuple):
  """Counts what was written."""

  documents: int
  files: int
  bytes: int  # of text


def join(
  source: str,
  destination: str | Path,
  *,
  text_field: str | None = None,
  skipped: Skipped | None = None,
) -> Joined:
  """Writes JSON lines, one document per entry of the top directory of `source`, for `data.path`.

  A line is {"text": ..., "path": ENTRY}. The text is that of the entry's files in the order of their paths,
  each below a line `# PATH`. The top directory of a glob is the one before its first wildcard, so
  `site-packages/**/*.py` makes a document of each package.

  Args:
    source: as `data.path`.
    destination: a new file that ends in `.jsonl`.
    text_field: as `data.text_field`.
    skipped: counts what is left out.

  Raises:
    UserError: the destination exists or has another ending; `source` holds no text; as `find_files`.
  """
  destination = Path(destination).expanduser()
  if destination.suffix != ".jsonl":
    raise UserError(f"destination={str(destination)!r} must end in .jsonl: it holds JSON lines")
  if destination.exists():
    raise UserError(f"destination={str(destination)!r} exists: delete it, or give another one")
  skipped = Skipped() if skipped is None else skipped
  files = find_files(source, skipped, field="source")
  text_field = checked_text_field(text_field, files)
  documents = count = size = 0
  destination.parent.mkdir(parents=True, exist_ok=True)
  with atomic_file(destination) as unfinished, unfinished.open("w", encoding="utf-8") as out:
    entries = groupby(files.paths, key=lambda path: path.relative_to(files.root).parts[0])
    for entry, paths in entries:
      texts = [
        f"# {name}\n{data.decode().rstrip()}\n\n"
        for path in paths
        for name, data in load_texts(
          path, files.name_of(path), text_field=text_field, skipped=skipped
        )
      ]
      if texts:
        text = "".join(texts)
        out.write(json.dumps({"text": text, "path": entry}, ensure_ascii=False) + "\n")
        documents, count, size = documents + 1, count + len(texts), size + len(text.encode())
    if not documents:
      raise UserError(
        f"source={source!r} holds no text (skipped: {skipped}): give a directory or glob"
      )
  return Joined(documents, count, size)
