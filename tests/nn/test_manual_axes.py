"""A model inside somebody's `jax.shard_map`: right over the axes it knows, refused over any other."""

import jax
import numpy as np
import pytest
from helpers import random_model, random_rows, relative_error
from jax.sharding import AxisType, PartitionSpec

from ttt_jax.nn.loss import model_losses

ROWS, LENGTH = 4, 16


def _mesh(**axes):
  size = int(np.prod(list(axes.values())))
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(AxisType.Auto,) * len(axes),
    devices=jax.devices()[:size],
  )


def _losses(model, tokens, segment_ids, labels):
  return model_losses(model, tokens, labels, segment_ids)[0]


def _mapped(mesh, spec, **how):
  return jax.jit(
    jax.shard_map(
      _losses, mesh=mesh, in_specs=(PartitionSpec(), spec, spec, spec), out_specs=spec, **how
    )
  )


@pytest.fixture(scope="module")
def case():
  model, rows = random_model(), random_rows(ROWS, LENGTH)
  return model, rows, jax.jit(_losses)(model, *rows)


UNKNOWN = {
  "sequence": ({"seq": 4}, PartitionSpec(None, "seq"), {}),
  "sequence, not tracked": ({"seq": 4}, PartitionSpec(None, "seq"), {"check_vma": False}),
  "beside a known axis": ({"data": 2, "seq": 2}, PartitionSpec("data", "seq"), {}),
  "the others not manual": (
    {"data": 2, "seq": 2},
    PartitionSpec(None, "seq"),
    {"axis_names": {"seq"}},
  ),
  "tensor": ({"seq": 1, "tensor": 2}, PartitionSpec(None, ("seq", "tensor")), {}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_axis_of_unknown_use_is_refused(name, case):
  axes, spec, how = UNKNOWN[name]
  model, rows, _ = case
  axis = "tensor" if name == "tensor" else "seq"
  with pytest.raises(
    NotImplementedError, match=f"over mesh axis '{axis}' of {axes[axis]} devices.*Name it 'context'"
  ):
    _mapped(_mesh(**axes), spec, **how)(model, *rows)


def test_rows_split_by_pmap_are_refused_unless_it_says_so(case):
  model, (tokens, _, _), _ = case
  by_device = tokens.reshape(2, 2, LENGTH)
  with pytest.raises(NotImplementedError, match="'replica' of 2 devices"):
    jax.pmap(lambda t: model(t), axis_name="replica")(by_device)
  logits = jax.pmap(lambda t: model(t), axis_name="data")(by_device)
  expected = jax.jit(lambda m: m(tokens))(model)
  assert relative_error(logits.reshape(expected.shape), expected) < 1e-5


KNOWN = {
  "data": ({"data": 4}, PartitionSpec("data"), {}),
  "data, not tracked": ({"data": 4}, PartitionSpec("data"), {"check_vma": False}),
  "fsdp and context": ({"fsdp": 2, "context": 4}, PartitionSpec("fsdp", "context"), {}),
  "an axis of one device": ({"seq": 1, "data": 2}, PartitionSpec("data", "seq"), {}),
  "an axis over which nothing varies": ({"stage": 2, "data": 2}, PartitionSpec("data"), {}),
  "data, context not manual": (
    {"data": 2, "context": 4},
    PartitionSpec("data"),
    {"axis_names": {"data"}},
  ),
  "context, data not manual": (
    {"data": 2, "context": 4},
    PartitionSpec(None, "context"),
    {"axis_names": {"context"}},
  ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_axes_that_are_known(name, case):
  axes, spec, how = KNOWN[name]
  model, rows, expected = case
  assert relative_error(_mapped(_mesh(**axes), spec, **how)(model, *rows), expected) < 1e-5


def test_an_ambient_axis_without_a_name_of_ours(case):
  """Arrays split over it by the user; nothing here is manual, so the compiler knows what they are."""
  model, rows, expected = case
  mesh = _mesh(data=2, seq=4)
  where = jax.sharding.NamedSharding(mesh, PartitionSpec("data", "seq"))
  with jax.set_mesh(mesh):
    losses = jax.jit(_losses)(model, *(jax.device_put(row, where) for row in rows))
  assert relative_error(losses, expected) < 1e-5
