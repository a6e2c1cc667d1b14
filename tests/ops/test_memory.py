"""The compiler reports the memory of the gradient at a real size; nothing is run."""

import jax
import jax.numpy as jnp
import pytest

from ttt_jax import inplace_ttt

T, D, F = 16384, 512, 1536


def _temp_bytes(chunks, **options):
  def loss(z, v, w, segment_ids, lr, decay):
    y, state = inplace_ttt(
      z,
      v,
      w,
      chunk_size=T // chunks,
      inner_lr=lr,
      segment_ids=segment_ids,
      decay=decay,
      **{"implementation": "sequential"} | options,
    )
    return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state.S)

  dtype = options.pop("dtype", jnp.float32)
  shapes = [((1, T, F), dtype), ((1, T, D), dtype), ((F, D), dtype), ((1, T), jnp.int32)]
  shapes += [((), jnp.float32)] * 2
  arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  compiled = jax.jit(jax.grad(loss, (0, 1, 2, 4, 5))).lower(*arguments).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("merge", [True, False])
def test_memory_does_not_grow_with_the_number_of_chunks(merge):
  """With documents, a learned decay and a clip, 64 chunks take at most 15 % more memory than 8."""
  few, many = (_temp_bytes(chunks, clip_norm=1.0, merge=merge) for chunks in (8, 64))
  assert many < 1.15 * few


def test_a_million_tokens_take_the_memory_of_a_few_states():
  """Temporary memory is small: values and gradients are written straight to the outputs."""
  d, f = 256, 768

  def values_and_gradients(z, v, w, cotangent):
    def read(z, v, w):
      return inplace_ttt(z, v, w, chunk_size=1024, inner_lr=1e-3, implementation="sequential")[0]

    y, transpose = jax.vjp(read, z, v, w)
    return y, transpose(cotangent)

  def temp_bytes(t):
    shapes = [(t, f), (t, d), (f, d), (t, d)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(values_and_gradients).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temp_bytes(1 << 20) == temp_bytes(1 << 16) < 24 * (f * d * 4)


def test_the_measure_does_measure():
  few, many = (_temp_bytes(chunks, implementation="associative") for chunks in (8, 64))
  assert many > 1.5 * few
