"""Every notebook runs from top to bottom, in a process of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
  assert "01_fast_weights.ipynb" in [path.name for path in NOTEBOOKS]


def test_their_pictures_are_small():
  assert sum(path.stat().st_size for path in NOTEBOOKS) < 1.5e6


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, tmp_path, optimized_commands):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  (tmp_path / "results").symlink_to(path.parent / "results")  # what they read; they write beside it
  notebook = nbformat.read(path, as_version=4)
  client = NotebookClient(
    notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
  )
  try:
    client.execute()
  except CellExecutionError as error:
    if "cannot be fetched" not in error.evalue:
      raise
    pytest.skip(error.evalue)  # a pretrained model, from a machine without a network
  shown = [
    output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output
  ]
  pictures = [output["data"]["image/png"] for output in shown if "image/png" in output["data"]]
  assert len(pictures) >= 2
  assert sum(map(len, pictures)) < 1e6  # all notebooks together stay below 1.5 MB
