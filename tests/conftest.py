"""Eight CPU devices, strict dtype and rank promotion, and shape-checked calls in every test."""

import os
import shutil
import tempfile

# Two workers share the cores: a factorisation whose threads wait for one another took 50 times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("ttt_jax", "beartype.beartype")

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_NO_EMITTERS = "--xla_cpu_use_fusion_emitters=false"


def pytest_addoption(parser):
  parser.addoption(
    "--xla-defaults",
    action="store_true",
    help="compile as a user's program does; without it most of XLA's optimizations are off",
  )


def pytest_configure(config):
  if not config.getoption("--xla-defaults"):
    _compile_fast()
  _share_programs(config)


def _compile_fast():
  """Tests, and the commands that they start, compile more than they run.

  `test_xla_defaults.py` has a core of the suite run again without this.
  """
  jax.config.update("jax_disable_most_optimizations", True)
  os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  # A third of the suite's time was jax 0.10's emitter of fusions; newer ones do not know the flag.
  if jax.__version_info__ < (0, 11):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_NO_EMITTERS}"


def _share_programs(config):
  """Programs compiled once are shared by the workers and by the commands that tests run."""
  if _CACHE in os.environ:  # the user's, or in a worker the first process's
    return
  os.environ[_CACHE] = tempfile.mkdtemp(prefix="ttt_jax-tests-")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(_CACHE)))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
  """Kept from test to test, programs use up the 65,530 memory maps of a process, and XLA crashes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def standard_promotion():
  """For modules that use Optax: it raises a float to an integer power, which strict promotion forbids."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture
def optimized_commands(monkeypatch):
  """The commands that a test starts compile as a user's do: what it measures, or trains, is theirs."""
  monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
  # With optimizations, programs of many layers compile in half the time with the emitter.
  flags = os.environ.get("XLA_FLAGS", "").replace(_NO_EMITTERS, "")
  monkeypatch.setenv("XLA_FLAGS", flags.strip())  # XLA takes " " for the name of a file


@pytest.fixture
def unchecked_types():
  """Turns the shape checks off, so that a test of bad input meets the library's own error."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
