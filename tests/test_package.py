"""The package from outside: its public names, and what importing it costs."""

import importlib.metadata
import pathlib
import subprocess
import sys

import ttt_jax


def test_public_names():
  for name in ttt_jax.__all__:
    assert getattr(ttt_jax, name).__doc__
  contract = {"ntp_targets", "inplace_ttt", "Update", "combine", "exclusive_prefix"}
  assert contract <= set(ttt_jax.__all__)
  assert ttt_jax.__version__ == importlib.metadata.version("ttt_jax")
  assert issubclass(ttt_jax.UserError, ValueError)


def test_user_errors_have_a_class_of_their_own():
  """A bare ValueError would be taken for a bug by the command line."""
  for path in pathlib.Path(ttt_jax.__file__).parent.rglob("*.py"):
    assert "raise ValueError" not in path.read_text(), path


def test_import_is_light():
  """The ops need jax and jaxtyping; nothing for training, drawing or reading configs is imported."""
  heavy = ("flax", "optax", "orbax", "grain", "matplotlib", "rich", "jsonargparse", "ruamel")
  code = (
    "import sys, ttt_jax; "
    f"print([m for m in {heavy!r} if m in sys.modules]); "
    "import jax; print(jax._src.xla_bridge._backends)"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  imported, backends = result.stdout.splitlines()
  assert imported == "[]"
  assert backends == "{}"  # no device was touched: JAX can still be configured


def test_ops_know_no_flax_config_or_mesh():
  for path in (pathlib.Path(ttt_jax.__file__).parent / "ops").rglob("*.py"):
    text = path.read_text()
    for module in ("flax", "ttt_jax.config", "ttt_jax.parallel.mesh", "ttt_jax.nn"):
      assert f"import {module}" not in text, path
      assert f"from {module}" not in text, path
