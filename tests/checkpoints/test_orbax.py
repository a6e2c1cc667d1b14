"""Tests that checkpoints are restored exactly, on any mesh, and that damaged ones are named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ttt_jax.checkpoints import orbax as checkpoint
from ttt_jax.checkpoints.orbax import Checkpoints
from ttt_jax.config import CheckpointConfig
from ttt_jax.errors import UserError


class Layer(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.w = nnx.Param(jax.random.normal(rngs.params(), (8, 16)))
    self.scale = nnx.Param(jnp.ones((16,), jnp.bfloat16))


class Model(nnx.Module):
  def __init__(self, rngs: nnx.Rngs, layers: int = 2):
    self.blocks = nnx.List([Layer(rngs) for _ in range(layers)])


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_state(seed: int, layers: int = 2):
  """Makes a model and an optimiser state with non-zero moments."""
  model = Model(nnx.Rngs(seed), layers)
  grads = jax.tree.map(jnp.cos, model)
  with jax.numpy_dtype_promotion("standard"):  # optax computes float ** int
    _, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(model), model)
  return {"model": model, "opt_state": opt_state, "step": jnp.int32(seed)}


def mesh_of(shape, names):
  devices = jax.devices()[: int(np.prod(shape))]
  return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def abstract_on(mesh, spec, tree):
  """Returns `tree` with matrices sharded by `spec` and everything else replicated."""

  def leaf(x):
    where = NamedSharding(mesh, spec if x.ndim == 2 else P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

  return jax.tree.map(leaf, tree)


def place(abstract, tree):
  return jax.tree.map(lambda a, x: jax.device_put(x, a.sharding), abstract, tree)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(x, y, err_msg=str(path))


def save_steps(directory, steps, keep=2, verify="sizes"):
  with Checkpoints(directory, keep=keep, verify=verify) as checkpoints:
    for step in steps:
      checkpoints.save(step, arrays=make_state(step), data_state={"next": step})


def contents(path: Path):
  return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
  """Steps 1 and 2; not to be changed."""
  directory = tmp_path_factory.mktemp("saved") / "checkpoints"
  save_steps(directory, [1, 2])
  return directory


@pytest.fixture(scope="module")
def saved_with_checksums(tmp_path_factory) -> Path:
  directory = tmp_path_factory.mktemp("checksums") / "checkpoints"
  save_steps(directory, [1, 2], verify="checksums")
  return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
  return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture
def copy_with_checksums(saved_with_checksums, tmp_path) -> Path:
  return shutil.copytree(saved_with_checksums, tmp_path / "checkpoints")


def test_module_and_optimizer_come_back_exactly(saved):
  with Checkpoints(saved, keep=2) as checkpoints:
    assert checkpoints.latest_step == 2
    step, arrays, data_state = checkpoints.restore(jax.eval_shape(lambda: make_state(0)))
    assert (step, data_state) == (2, {"next": 2})
    assert isinstance(arrays["model"], Model)
    assert_same(arrays, make_state(2))

    step, arrays, data_state = checkpoints.restore(make_state(0), step=1)
    assert (step, data_state) == (1, {"next": 1})
    assert_same(arrays, make_state(1))


def test_restored_state_trains_on_identically(saved):
  @jax.jit
  def train(state):
    grads = jax.tree.map(jnp.sin, state["model"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"], state["model"])
    return optax.apply_updates(state["model"], updates), opt_state

  with Checkpoints(saved, keep=2) as checkpoints:
    _, arrays, _ = checkpoints.restore(make_state(0))
  with jax.numpy_dtype_promotion("standard"):
    assert_same(train(arrays), train(make_state(2)))


@pytest.mark.parametrize(
  ("shape", "names", "spec"),
  [
    ((1,), ("data",), P()),
    ((8,), ("data",), P()),
    ((8,), ("data",), P("data")),
    ((2, 4), ("data", "context"), P("context", "data")),
    ((2, 2), ("fsdp", "tensor"), P(None, ("fsdp", "tensor"))),
  ],
)
def test_any_mesh_restores_onto_any_other(tmp_path, shape, names, spec):
  state = make_state(3)
  source = abstract_on(mesh_of((4, 2), ("data", "context")), P("data", "context"), state)
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(3, arrays=place(source, state), data_state={})
    target = abstract_on(mesh_of(shape, names), spec, state)
    for like in (target, place(target, state)):
      _, arrays, _ = checkpoints.restore(like)
      assert_same(arrays, state)
      for x, want in zip(jax.tree.leaves(arrays), jax.tree.leaves(target)):
        assert x.sharding == want.sharding


def test_model_alone_needs_no_optimizer(saved):
  model = {"model": jax.eval_shape(lambda: Model(nnx.Rngs(0)))}
  with Checkpoints(saved, keep=2) as checkpoints:
    _, arrays, _ = checkpoints.restore(model, partial=True)
    assert_same(arrays["model"], make_state(2)["model"])
    with pytest.raises(ValueError, match="do not fit"):
      checkpoints.restore(model)
    wider = {"model": jax.eval_shape(lambda: Model(nnx.Rngs(0), layers=3))}
    with pytest.raises(ValueError, match=r"2 arrays do not fit\n  model/blocks/2/"):
      checkpoints.restore(wider, partial=True)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
  overwrite = jax.jit(lambda x: jax.tree.map(jnp.zeros_like, x), donate_argnums=0)
  mesh = mesh_of((8,), ("data",))
  make = jax.jit(
    lambda: {f"x{i}": jnp.full((256, 256), i + 1.0) for i in range(8)},
    out_shardings=NamedSharding(mesh, P()),
  )
  state = make()
  with Checkpoints(tmp_path, keep=1) as checkpoints:
    checkpoints.save(1, arrays=state, data_state={})
    jax.block_until_ready(overwrite(state))
    _, arrays, _ = checkpoints.restore(jax.eval_shape(make))
  assert_same(arrays, make())


def test_newest_are_kept_and_resuming_goes_on(tmp_path):
  save_steps(tmp_path, [10, 20, 30], keep=2)
  assert sorted(os.listdir(tmp_path)) == ["20", "30"]
  save_steps(tmp_path, [40], keep=2)
  assert sorted(os.listdir(tmp_path)) == ["30", "40"]
  save_steps(tmp_path, [100], keep=3)
  with Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.steps == [30, 40, 100]
    assert checkpoints.restore(make_state(0))[0] == 100


def test_some_are_kept_for_ever(tmp_path):
  with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
    for step in range(2, 12, 2):
      checkpoints.save(step, arrays={"x": jnp.ones(3)}, data_state={}, config={"seed": 5})
    assert checkpoints.steps == [4, 8, 10]
  record = json.loads((tmp_path / "4" / "ttt_jax.json").read_text())
  assert record["config"] == {"seed": 5}


def test_saving_a_step_twice_keeps_the_first(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, arrays=make_state(1), data_state={"next": 1})
    checkpoints.save(1, arrays=make_state(2), data_state={"next": 2})
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, arrays=make_state(3), data_state={"next": 3})
    _, arrays, data_state = checkpoints.restore(make_state(0))
  assert data_state == {"next": 1}
  assert_same(arrays, make_state(1))


def test_data_state_of_grain_and_bytes(tmp_path):
  rows = iter(grain.MapDataset.range(100).shuffle(seed=3).repeat().to_iter_dataset().batch(4))
  next(rows)
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, arrays={"x": jnp.ones(2)}, data_state=rows.get_state())
    want = next(rows)
    rows.set_state(checkpoints.restore({"x": jnp.ones(2)})[2])
    np.testing.assert_array_equal(next(rows), want)

    checkpoints.save(2, arrays={"x": jnp.ones(2)}, data_state=b"\x00\xff")
    assert checkpoints.restore({"x": jnp.ones(2)})[2] == b"\x00\xff"
    with pytest.raises(TypeError):
      checkpoints.save(3, arrays={"x": jnp.ones(2)}, data_state={"x": object()})
    assert checkpoints.latest_step == 2


def test_reading_creates_and_deletes_nothing(saved, tmp_path):
  directory = tmp_path / "none"
  with Checkpoints(directory, keep=1) as checkpoints:
    assert checkpoints.latest_step is None
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*none"):
      checkpoints.restore(make_state(0))
  assert not directory.exists()

  before = contents(saved)
  with Checkpoints(saved, keep=1) as checkpoints:
    checkpoints.restore(make_state(0))
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 in .*, only of 1, 2"):
      checkpoints.restore(make_state(0), step=7)
  assert contents(saved) == before


def test_relative_directory(saved, monkeypatch):
  monkeypatch.chdir(saved.parent)
  with Checkpoints("checkpoints", keep=2) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 2


def test_misfits_are_listed_together(saved):
  before = contents(saved)
  with Checkpoints(saved, keep=2) as checkpoints:
    state = make_state(0)
    state["model"].blocks[0].w = nnx.Param(jnp.ones((8, 17)))
    state["model"].blocks[1].scale = nnx.Param(jnp.ones((16,), jnp.float32))
    state["extra"] = jnp.ones(3)
    del state["step"]
    with pytest.raises(ValueError, match="4 arrays do not fit") as error:
      checkpoints.restore(state)
    message = str(error.value)
    assert "model/blocks/0/w/value: float32[8,17] expected, float32[8,16] in the check" in message
    assert "model/blocks/1/scale/value: float32[16] expected, bfloat16[16] in the check" in message
    assert "extra: float32[3] expected, missing in the checkpoint" in message
    assert "step: int32[] in the checkpoint, not expected" in message
    assert f"checkpoint 2 in {saved}" in message

    with pytest.raises(ValueError, match=r"18 arrays do not fit(\n  .*){10}\n  and 8 more\nuse"):
      checkpoints.restore(make_state(0, layers=5))
  assert contents(saved) == before


def test_half_written_directory_is_never_picked_up(copy):
  shutil.copytree(copy / "2", copy / "3.orbax-checkpoint-tmp")
  with Checkpoints(copy, keep=2) as checkpoints:
    assert checkpoints.latest_step == 2
    assert checkpoints.restore(make_state(0))[0] == 2
    assert (copy / "3.orbax-checkpoint-tmp").exists()
    checkpoints.save(3, arrays=make_state(3), data_state={})
    checkpoints.wait()
    assert sorted(os.listdir(copy)) == ["2", "3"]
    assert_same(checkpoints.restore(make_state(0))[1], make_state(3))


def damaged(directory: Path, file: Path, how: str) -> None:
  data = (directory / file).read_bytes()
  half = len(data) // 2
  if how == "removed":
    (directory / file).unlink()
  elif how == "cut":
    (directory / file).write_bytes(data[:half])
  elif how == "flipped":
    (directory / file).write_bytes(data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :])


@pytest.mark.parametrize(
  ("how", "verify"),
  [
    ("removed", "sizes"),
    ("cut", "sizes"),
    ("removed", "checksums"),
    ("cut", "checksums"),
    ("flipped", "checksums"),
    ("flipped", "sizes"),  # all files are small here
  ],
)
def test_damage_to_any_file_is_found(copy_with_checksums, how, verify):
  """Files of Orbax's own beside the arrays may go: the arrays come back without them."""
  want, copy = make_state(2), copy_with_checksums
  found = set()
  for file in contents(copy / "2"):
    intact = (copy / "2" / file).read_bytes()
    damaged(copy / "2", file, how)
    before = contents(copy)
    with Checkpoints(copy, keep=2, verify=verify) as checkpoints:
      assert checkpoints.latest_step == 2
      try:
        assert_same(checkpoints.restore(make_state(0))[1], want)
      except ValueError as error:
        message = str(error)
        assert message.startswith(f"checkpoint 2 in {copy} is damaged")
        assert f"delete {copy / '2'} to go on from step 1, or choose another run_dir" in message
        assert "\n" not in message
        found.add(str(file))
    assert contents(copy) == before
    (copy / "2" / file).write_bytes(intact)
  everything = {str(file) for file in contents(copy / "2")}
  assert everything - found <= {"_CHECKPOINT_METADATA", "commit_success.txt"}


@pytest.mark.parametrize(
  "file", ["manifest.ocdbt", "_METADATA", "array_metadatas/process_0", "d/*"]
)
def test_changed_bits_without_checksums_are_damage(copy, file, monkeypatch):
  """Orbax and TensorStore find them, and raise a class and a text of their own for each kind of file."""
  monkeypatch.setattr(checkpoint, "_SMALL", 0)
  (file,) = (copy / "2" / "arrays").glob(file)
  intact = file.read_bytes()
  for changed in (bytes(len(intact)), bytes([intact[0] ^ 255]) + intact[1:]):
    file.write_bytes(changed)
    named = pytest.raises(UserError, match=f"2 .* is damaged .*: delete {copy / '2'} to go on")
    with Checkpoints(copy, keep=2) as checkpoints, named:
      checkpoints.restore(make_state(0))


# Orbax leaves the other arrays' reads unfinished.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    MemoryError(),
    ValueError("RESOURCE_EXHAUSTED: Error opening a file: Too many open files"),
    PermissionError(13, "Permission denied"),
    TypeError("a bug"),
    KeyError("a bug"),
  ],
  ids=lambda error: type(error).__name__,
)
def test_what_is_no_damage_tells_nobody_to_delete_a_checkpoint(saved, error, monkeypatch):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", fail)
  with Checkpoints(saved, keep=2) as checkpoints, pytest.raises(type(error)) as raised:
    checkpoints.restore(make_state(0))
  assert raised.value is error
  assert error.__notes__ == [f"while checkpoint 2 in {saved} was restored"]


def test_a_mesh_that_does_not_divide_an_array_is_no_damage(saved):
  like = abstract_on(mesh_of((3,), ("data",)), P("data"), make_state(0))
  refused = pytest.raises(ValueError, match="partitioned 3 times")
  with Checkpoints(saved, keep=2) as checkpoints, refused as raised:
    checkpoints.restore(like)
  assert not isinstance(raised.value, UserError)


def test_sizes_read_no_file_and_checksums_every_file(tmp_path, monkeypatch):
  """Records which files a save and a restore load; a checkpoint without checksums never gets any."""
  monkeypatch.setattr(checkpoint, "_SMALL", 0)
  read = []
  crc = checkpoint._crc
  monkeypatch.setattr(checkpoint, "_crc", lambda file: read.append(file) or crc(file))
  for verify in ("sizes", "checksums"):
    directory = tmp_path / verify
    save_steps(directory, [1], verify=verify)
    arrays = [file for file in (directory / "1" / "arrays").rglob("*") if file.is_file()]
    assert len(read) == (0 if verify == "sizes" else len(arrays))
    with Checkpoints(directory, keep=2, verify="sizes") as checkpoints:
      checkpoints.restore(make_state(0))
    assert len(read) == (0 if verify == "sizes" else len(arrays))
  read.clear()
  with Checkpoints(tmp_path / "checksums", keep=2, verify="checksums") as checkpoints:
    checkpoints.restore(make_state(0))
  assert sorted(read) == sorted(arrays)
  without = pytest.warns(UserWarning, match=r"have no checksum \(checkpoint\.verify was 'sizes'")
  with Checkpoints(tmp_path / "sizes", keep=2, verify="checksums") as checkpoints, without:
    assert_same(checkpoints.restore(make_state(0))[1], make_state(1))
  assert len(read) == len(arrays)


def test_processes_share_the_reading(copy_with_checksums, monkeypatch):
  """Checks that three processes together load every file once, the largest files in different processes."""
  path, read, parts = copy_with_checksums / "2", [], []
  sizes = {name: size for name, (size, _) in checkpoint._load_record(path)["files"].items()}
  monkeypatch.setattr(checkpoint, "_crc", lambda file: read.append(file) or 0)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  checkpoints = Checkpoints(copy_with_checksums, keep=1, verify="checksums")
  for process in range(3):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    read.clear()
    checkpoints._verify(path, {name: (size, 0) for name, size in sizes.items()})
    parts.append({file.relative_to(path).as_posix() for file in read})
  assert sum(map(len, parts)) == len(sizes)
  assert set.union(*parts) == set(sizes)
  largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:3]
  assert all(len(part & set(largest)) == 1 for part in parts)


def test_a_checkpoint_of_the_first_format_is_read(copy_with_checksums):
  """Its record has the checksums of all files."""
  file = copy_with_checksums / "2" / "ttt_jax.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"format": "ttt_jax/1"}))
  with Checkpoints(copy_with_checksums, keep=2, verify="checksums") as checkpoints:
    assert_same(checkpoints.restore(make_state(0))[1], make_state(2))


def test_an_unknown_way_to_verify():
  with pytest.raises(ValueError, match=r"verify='none' is not one of 'sizes', 'checksums'"):
    Checkpoints("x", keep=1, verify="none")
  with pytest.raises(ValueError, match=r"checkpoint\.verify='md5'"):
    CheckpointConfig(verify="md5")


def test_deleting_the_damaged_step_goes_on_from_the_earlier(copy):
  damaged(copy / "2", Path("ttt_jax.json"), "cut")
  with pytest.raises(ValueError, match="damaged"), Checkpoints(copy, keep=2) as checkpoints:
    checkpoints.restore(make_state(0))
  shutil.rmtree(copy / "2")
  with Checkpoints(copy, keep=2) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 1
    checkpoints.save(2, arrays=make_state(2), data_state={})
  with Checkpoints(copy, keep=2) as checkpoints:
    assert_same(checkpoints.restore(make_state(0))[1], make_state(2))


def test_damaged_older_checkpoint_does_not_stop_a_run(copy):
  shutil.rmtree(copy / "1" / "arrays")
  (copy / "1" / "_CHECKPOINT_METADATA").write_text("{")
  with Checkpoints(copy, keep=2) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 2
    checkpoints.save(3, arrays=make_state(3), data_state={})
  assert sorted(os.listdir(copy)) == ["2", "3"]


@pytest.mark.parametrize("foreign", ["empty", "file", "orbax", "other format"])
def test_foreign_checkpoint(copy, foreign):
  import orbax.checkpoint.experimental.v1 as ocp

  path = copy / "5"
  if foreign == "empty":
    path.mkdir()
  elif foreign == "file":
    path.write_text("5")
  elif foreign == "orbax":
    ocp.save(path, {"w": jnp.ones(3)})
  else:
    shutil.copytree(copy / "2", path)
    (path / "ttt_jax.json").write_text(json.dumps({"format": "ttt_jax/9"}))
  before = contents(copy)
  with Checkpoints(copy, keep=1) as checkpoints:
    with pytest.raises(ValueError, match=r"checkpoint 5 .* not written by this version of ttt_jax"):
      checkpoints.restore(make_state(0))
    with pytest.raises(ValueError, match="to go on from step 2"):
      checkpoints.restore(make_state(0))
  assert contents(copy) == before


def test_full_disk_leaves_the_earlier_checkpoint(copy, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  before = contents(copy)
  with monkeypatch.context() as patch:
    patch.setattr(
      "ttt_jax.checkpoints.orbax._crc", full
    )  # called while the checkpoint is being written
    checkpoints = Checkpoints(copy, keep=1, verify="checksums")
    with pytest.raises(ValueError, match=r"checkpoint 3 could not be written .*No space left"):  # noqa: PT012
      checkpoints.save(3, arrays=make_state(3), data_state={})
      checkpoints.close()
  with Checkpoints(copy, keep=1) as checkpoints:
    assert checkpoints.restore(make_state(0))[0] == 2
    assert {k: v for k, v in contents(copy).items() if "tmp" not in str(k)} == before
    checkpoints.save(3, arrays=make_state(3), data_state={})
  assert os.listdir(copy) == ["3"]


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
  """Kills just before the rename: the step is missing, and the next start saves it again."""
  program = textwrap.dedent(f"""
    import os, signal, jax.numpy as jnp
    from ttt_jax.checkpoints import orbax as checkpoint
    with checkpoint.Checkpoints({str(tmp_path)!r}, keep=2, verify="checksums") as checkpoints:
      checkpoints.save(1, arrays={{"x": jnp.ones(3)}}, data_state={{}})
      checkpoints.wait()
      checkpoint._crc = lambda file: os.kill(os.getpid(), signal.SIGKILL)
      checkpoints.save(2, arrays={{"x": jnp.zeros(3)}}, data_state={{}})
  """)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
  killed = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
  assert killed.returncode == -signal.SIGKILL
  assert sorted(os.listdir(tmp_path)) == ["1", "2.orbax-checkpoint-tmp"]
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    step, arrays, _ = checkpoints.restore({"x": jnp.zeros(3)})
    assert step == 1
    assert_same(arrays, {"x": jnp.ones(3)})
    checkpoints.save(2, arrays={"x": jnp.zeros(3)}, data_state={})
  assert sorted(os.listdir(tmp_path)) == ["1", "2"]
