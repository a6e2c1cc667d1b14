"""Eight CPU devices, strict dtype and rank promotion, and shape-checked calls in every test."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update(
  "jax_disable_most_optimizations", True
)  # of XLA: tests compile more than they run
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

jaxtyping.install_import_hook("ttt_jax", "beartype.beartype")


@pytest.fixture
def unchecked_types():
  """Turns the shape checks off, so that a test of bad input meets the library's own error."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
