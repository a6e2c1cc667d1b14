"""Targets equal their definition, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import packed

from ttt_jax import ntp_targets
from ttt_jax.ops.fast_weight.reference import ntp_targets_reference


def _draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


CASES = {
  "whole chunks": (24, 4, 5, None),
  "a ragged last chunk": (23, 5, 5, None),
  "packed": (23, 5, 5, packed(2, 23)),
  "an id used again within reach": (12, 6, 5, [[1, 2, 1, 2, 1, 1] * 2, [1, 1, 0, 1, 1, 2] * 2]),
  "chunks shorter than the kernel": (12, 2, 5, packed(2, 12)),
  "chunks of one token": (6, 1, 5, None),
  "a row shorter than the kernel's reach": (1, 4, 5, None),
  "kernel of three": (12, 4, 3, None),
}


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name, projected):
  tokens, chunk_size, width, segment_ids = CASES[name]
  x, conv = _draw(2, tokens, 3), _draw(width, 3, seed=1)
  projection = _draw(3, 3, seed=2) if projected else None
  ids = None if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
  cotangent = _draw(2, tokens, 3, seed=3)

  def both(function):
    value, pull_back = jax.vjp(
      lambda *a: function(*a, chunk_size=chunk_size, segment_ids=ids), x, conv, projection
    )
    return jax.tree.leaves((value, pull_back(cotangent)))

  for actual, law in zip(both(ntp_targets), both(ntp_targets_reference)):
    np.testing.assert_allclose(actual, law, rtol=1e-5, atol=1e-5)


def test_looks_ahead_but_not_beyond_its_chunk():
  x = jnp.arange(1.0, 7.0)[None, :, None]
  next_token = jnp.zeros((5, 1)).at[3].set(1.0)
  v = ntp_targets(x, next_token, None, chunk_size=3)
  assert v[0, :, 0].tolist() == [2, 3, 0, 5, 6, 0]


def test_padding_has_no_target():
  ids = jnp.asarray([[0, 0, 1, 1, 0, 2]], jnp.int32)
  v = ntp_targets(_draw(1, 6, 3), jnp.ones((5, 3)), None, chunk_size=6, segment_ids=ids)
  assert not v[:, ids[0] == 0].any()
  assert v[:, ids[0] != 0].all()


def test_bfloat16_sums_in_float32():
  x = jnp.full((1, 5, 1), 1.0, jnp.bfloat16)
  conv = jnp.asarray([[1.0], [1.0], [256.0], [1.0], [1.0]], jnp.bfloat16)
  assert ntp_targets(x, conv, None, chunk_size=5)[0, 2, 0] == 260.0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"conv": (4, 3)},
      r"conv has shape \(4, 3\), expected \[width, D\] with an odd width and D = 3",
    ),
    ({"conv": (5, 2)}, r"conv has shape \(5, 2\)"),
    ({"projection": (3, 2)}, r"projection has shape \(3, 2\)"),
    ({"chunk_size": 0}, "chunk_size=0"),
    ({"segment_ids": jnp.ones((2, 7), jnp.int32)}, r"segment_ids has shape \(2, 7\)"),
    ({"segment_ids": jnp.ones((2, 8))}, "segment_ids has dtype float32"),
  ],
)
def test_bad_input(arguments, message, unchecked_types):
  shapes = {"conv": (5, 3), "projection": (3, 3)}
  arguments = {"chunk_size": 4, "segment_ids": None} | shapes | arguments
  arrays = {k: jnp.ones(arguments.pop(k)) for k in shapes}
  with pytest.raises(ValueError, match=message):
    ntp_targets(jnp.ones((2, 8, 3)), **arrays, **arguments)
