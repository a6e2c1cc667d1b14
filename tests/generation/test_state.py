"""States in files: as if there had been no break, and never half a file."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import MODEL, TTT, mesh_of, random_model, randomized
from jax.sharding import NamedSharding, PartitionSpec

from ttt_jax.generation import decoder as reader_module
from ttt_jax.generation import state as module
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import generate
from ttt_jax.generation.state import load_state

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1, 8, 2, 8, 1]]


@pytest.fixture(scope="module")
def model():
  return random_model(ttt=dataclasses.replace(TTT, inner_lr=3.0), seed=1)


@pytest.fixture
def saved(model, tmp_path):
  path = tmp_path / "state.safetensors"
  generate(model, PROMPTS, max_new_tokens=5).state.save(path)
  return path


def as_lists(result):
  return [row.tolist() for row in result.new_tokens]


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (2, 4)])
def test_a_saved_state_goes_on_elsewhere(model, saved, size):
  whole = generate(model, PROMPTS, max_new_tokens=12)
  moved = jax.device_put(model, NamedSharding(mesh_of(*size), PartitionSpec()))
  rest = generate(moved, [[]] * 3, max_new_tokens=7, state=load_state(saved, moved))
  assert as_lists(rest) == [new[5:] for new in as_lists(whole)]


def test_every_bit_is_kept(model, tmp_path):
  half = random_model(dataclasses.replace(MODEL, dtype="bfloat16"), seed=1)
  for m in (model, half):
    state = generate(m, PROMPTS, max_new_tokens=5).state
    state.save(tmp_path / "state")
    loaded = load_state(tmp_path / "state", m)
    slots = int(jnp.max(state.cache.lengths))
    for a, b in zip(jax.tree.leaves(state.cache), jax.tree.leaves(loaded.cache)):
      assert a.dtype == b.dtype
      a = a[:, :slots] if a.ndim == 4 else a
      np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_fast_weights_alone(model, tmp_path):
  learned = generate(model, PROMPTS, max_new_tokens=5).state.fast_weights_only()
  learned.save(tmp_path / "learned")
  loaded = load_state(tmp_path / "learned", model)
  expected = generate(model, PROMPTS, max_new_tokens=6, state=learned)
  assert as_lists(generate(model, PROMPTS, max_new_tokens=6, state=loaded)) == as_lists(expected)
  assert as_lists(generate(model, PROMPTS, max_new_tokens=6)) != as_lists(expected)


def test_without_fast_weights(model, tmp_path):
  generate(model, PROMPTS, max_new_tokens=2, update=False).state.save(tmp_path / "state")
  loaded = load_state(tmp_path / "state", model)
  assert all(layer.fast is None for layer in loaded.cache.layers)


def test_a_state_of_another_model_is_refused(model, saved):
  other = randomized(model, seed=7, scale=1e-6)
  with pytest.raises(ValueError, match="the state is of a model with fingerprint"):
    load_state(saved, other)
  with pytest.raises(ValueError, match="the state is of a model with fingerprint"):
    generate(other, PROMPTS, max_new_tokens=1, state=load_state(saved, model))
  slower = dataclasses.replace(Reader.of(model), ttt=dataclasses.replace(model.ttt, inner_lr=1.0))
  with pytest.raises(ValueError, match="the state is of a model with fingerprint"):
    load_state(saved, slower)
  computed = dataclasses.replace(
    Reader.of(model), ttt=dataclasses.replace(model.ttt, implementation="dual")
  )
  load_state(saved, computed)  # the same numbers, computed otherwise


def test_files_that_are_no_states(model, saved, tmp_path):
  with pytest.raises(ValueError, match="is not there"):
    load_state(tmp_path / "nowhere", model)
  (tmp_path / "text").write_text("no state at all")
  with pytest.raises(ValueError, match="cut off or no state"):
    load_state(tmp_path / "text", model)
  (tmp_path / "cut").write_bytes(saved.read_bytes()[:-100])
  with pytest.raises(ValueError, match="cut off or no state"):
    load_state(tmp_path / "cut", model)
  module.save_file({"x": jnp.ones(2)}, tmp_path / "other")
  with pytest.raises(ValueError, match="no saved state of ttt_jax"):
    load_state(tmp_path / "other", model)


def test_a_failing_save_leaves_the_old_state(model, saved, monkeypatch):
  before = saved.read_bytes()
  state = generate(model, PROMPTS, max_new_tokens=8).state

  def full_disk(arrays, path, metadata):
    path.write_bytes(b"half")
    raise OSError("no space left on device")

  monkeypatch.setattr(module, "save_file", full_disk)
  with pytest.raises(OSError, match="no space left"):
    state.save(saved)
  assert saved.read_bytes() == before
  assert list(saved.parent.iterdir()) == [saved]


def test_a_fingerprint_is_taken_once_and_only_where_a_state_leaves_its_model(
  model, tmp_path, monkeypatch
):
  taken, cut = [], []
  bit_sums, layer = reader_module._bit_sums, reader_module._layer
  monkeypatch.setattr(reader_module, "_bit_sums", lambda r: taken.append(r) or bit_sums(r))
  monkeypatch.setattr(reader_module, "_layer", lambda *args: cut.append(args[1]) or layer(*args))
  mine = jax.tree.map(jnp.copy, model)
  state = generate(mine, PROMPTS, max_new_tokens=2).state
  for _ in range(3):
    state = generate(mine, [[]] * 3, max_new_tokens=1, state=state).state
  learned = state.fast_weights_only()
  generate(mine, PROMPTS, max_new_tokens=1, state=learned)
  assert (len(taken), len(cut)) == (0, MODEL.num_layers)
  state.save(tmp_path / "state")
  learned.save(tmp_path / "learned")
  for path in ("state", "learned"):
    generate(mine, PROMPTS, max_new_tokens=1, state=load_state(tmp_path / path, mine))
  assert (len(taken), len(cut)) == (1, MODEL.num_layers)
  same = jax.tree.map(jnp.copy, model)
  generate(same, PROMPTS, max_new_tokens=1, state=learned)
  assert (len(taken), len(cut)) == (2, 2 * MODEL.num_layers)


def test_a_model_that_is_trained_in_place_is_read_anew(model, tmp_path):
  """Its states stay those of the parameters that they were made with, also of those that nobody cut."""
  mine = jax.tree.map(jnp.copy, model)
  reader, state = Reader.of(mine), generate(mine, PROMPTS, max_new_tokens=2).state
  assert Reader.of(mine) is reader
  moved = randomized(model, seed=3)
  for name in ("embed", "groups"):
    old = Reader.of(mine)
    nnx.update(mine, nnx.state({name: getattr(moved, name)}))
    assert Reader.of(mine) is not old
  fresh = jax.tree.map(lambda x: x, mine)
  assert as_lists(generate(mine, PROMPTS, max_new_tokens=9)) == as_lists(
    generate(fresh, PROMPTS, max_new_tokens=9)
  )
  with pytest.raises(ValueError, match="the state is of a model with fingerprint"):
    generate(mine, PROMPTS, max_new_tokens=1, state=state)
  state.save(tmp_path / "state")
  load_state(tmp_path / "state", jax.tree.map(jnp.copy, model))


def test_what_is_kept_goes_with_the_model(model):
  mine = jax.tree.map(jnp.copy, model)
  copied = weakref.ref(Reader.of(mine).blocks[0].mlp.down[...])
  assert copied() is not None
  del mine
  assert copied() is None


def test_a_donated_model_is_there_once(model):
  mine = jax.tree.map(jnp.copy, model)
  stacks = jax.tree.leaves(mine.groups)
  reader = Reader.of(mine, donate=True)
  assert all(x.is_deleted() for x in stacks)
  assert reader.fingerprint() == Reader.of(model).fingerprint()
  state = generate(reader, PROMPTS, max_new_tokens=2).state
  for x in jax.tree.leaves(reader):
    x.delete()
  with pytest.raises(ValueError, match="was deleted or donated before its fingerprint"):
    state.model  # noqa: B018
