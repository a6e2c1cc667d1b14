"""Where arrays live on the mesh `data x fsdp x context x tensor`.

Model code knows no mesh: it runs under the ambient one (`jax.set_mesh`), and the two ops that
communicate by hand, attention and the fast weight, are mapped over its shards by `over_shards`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.ops.varying import is_checked, varying_axes

MESH_AXES = ("data", "fsdp", "context", "tensor")
DATA, FSDP, CONTEXT, TENSOR = MESH_AXES

# Logical dimensions of arrays and the mesh axes they are split over.
_RULES: dict[str | None, tuple[str, ...]] = {
  "batch": (DATA, FSDP),
  "sequence": (CONTEXT,),
  "embed": (FSDP,),  # the model width of parameters; that of activations is whole
  "heads": (TENSOR,),
  "kv_heads": (TENSOR,),
  "mlp": (TENSOR,),
  "vocab": (TENSOR,),
  None: (),
}


class Axes(NamedTuple):
  """The mesh axes of several devices that a function mapped by `over_shards` runs on; else None."""

  fsdp: str | None = None
  context: str | None = None
  tensor: str | None = None


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh of a config over all devices; a mesh of one device takes the first one.

  Raises:
    UserError: there are more or fewer devices than the mesh has.
  """
  devices = jax.devices() if devices is None else devices
  config = config.filled(len(devices))
  if config.size not in (1, len(devices)):
    sizes = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, config.shape))
    remedy = "give one axis the size -1 to take all there are"
    if devices[0].platform == "cpu":
      remedy += f", or set runtime.cpu_devices={config.size}"
    raise UserError(
      f"mesh {sizes} needs {config.size} devices, but there are {len(devices)} "
      f"({devices[0].device_kind}): {remedy}"
    )
  return Mesh(
    np.asarray(devices[: config.size]).reshape(config.shape),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def spec(*dims: str | None, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """The partition of an array with these logical dimensions, over the axes that split it on `mesh`.

  Manual axes, those of an enclosing `jax.shard_map`, have split it already.

  Raises:
    UserError: two dimensions claim one axis.
  """
  claimed = [axis for dim in dims for axis in _RULES[dim]]
  if len(set(claimed)) < len(claimed):
    raise UserError(f"dimensions {dims} of one array claim mesh axes {claimed}: one twice")
  splits = {axis for axis, size in mesh.shape.items() if size > 1} - set(_manual_axes(mesh))
  parts = [tuple(a for a in _RULES[dim] if a in splits) or None for dim in dims]
  while parts and parts[-1] is None:
    parts.pop()
  return PartitionSpec(*(p[0] if p and len(p) == 1 else p for p in parts))


def sharding(mesh: Mesh, *dims: str | None) -> NamedSharding:
  return NamedSharding(mesh, spec(*dims, mesh=mesh))


def to_mesh(x: np.ndarray, mesh: Mesh, *dims: str | None) -> jax.Array:
  """A host's array on the mesh; of many processes, each has all of it and gives its devices their parts."""
  return jax.make_array_from_callback(x.shape, sharding(mesh, *dims), lambda index: x[index])


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
  """The rows of a batch that devices of this process hold, ascending.

  Processes that differ along `context` or `tensor` only hold the same ones.
  """
  held = sharding(mesh, "batch").addressable_devices_indices_map((batch_size,))
  return tuple(sorted({row for (index,) in held.values() for row in range(batch_size)[index]}))


def rows_to_mesh(x: np.ndarray, mesh: Mesh, *dims: str | None) -> jax.Array:
  """The batch on the mesh of which this process has its `local_rows`, `x`; all processes call it.

  Args:
    x: rows along its first dimension.
    mesh: of all processes.
    dims: the logical dimensions after that of the rows.
  """
  parts = spec("batch", mesh=mesh)
  shards = int(np.prod([mesh.shape[axis] for axis in jax.tree.leaves(tuple(parts))], dtype=int))
  local = local_rows(mesh, shards)
  size = len(x) // len(local)  # rows of a shard

  def part(index: tuple[slice, ...]) -> np.ndarray:
    start = size * local.index((index[0].start or 0) // size)
    return x[(slice(start, start + size), *index[1:])]

  shape = (size * shards, *x.shape[1:])
  return jax.make_array_from_callback(shape, sharding(mesh, "batch", *dims), part)


def ambient_mesh() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh` if it splits anything that is not yet manual, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.are_all_axes_manual or mesh.size == 1 else mesh


def _manual_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  return mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()


def _manual_context_axis() -> str | None:
  """The context axis, if we are inside a `jax.shard_map` over it already."""
  return CONTEXT if CONTEXT in jax.sharding.get_abstract_mesh().manual_axes else None


def _check_manual_axes(arguments: Any) -> None:
  """Raises UnsupportedError inside somebody's `jax.shard_map` over an axis of unknown use.

  Rows split over `data` or `fsdp` need nothing of each other, and a sequence split over `context` is
  exchanged. Over any other axis, `tensor` included, a device would take its part for the whole. Axes of
  one device, and axes over which nothing varies, split nothing.
  """
  mesh = jax.sharding.get_abstract_mesh()
  for axis in mesh.manual_axes:
    if axis in (DATA, FSDP, CONTEXT) or mesh.shape[axis] == 1:
      continue
    if is_checked(axis) and axis not in varying_axes(*jax.tree.leaves(arguments)):
      continue
    raise UnsupportedError(
      f"a model inside jax.shard_map over mesh axis {axis!r} of {mesh.shape[axis]} devices: it is not "
      f"known what that axis splits. Name it {CONTEXT!r} where it splits the sequence into contiguous "
      f"parts, {DATA!r} or {FSDP!r} where it splits rows (also in jax.pmap); for parameters split over "
      f"{TENSOR!r} call the model outside of jax.shard_map, under jax.set_mesh"
    )


def context_size() -> int:
  """How many shards of the sequence `over_shards` makes."""
  mesh = ambient_mesh()
  if mesh is None or CONTEXT in mesh.manual_axes:
    return 1
  return mesh.shape.get(CONTEXT, 1)


def positions(length: int) -> jax.Array:
  """The positions in the sequence of the `length` tokens at hand."""
  axis = _manual_context_axis()
  local = jnp.arange(length)
  return local if axis is None else local + length * jax.lax.axis_index(axis)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """`x`, laid out over the ambient mesh; `x` itself where there is none."""
  mesh = ambient_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*dims, mesh=mesh))


def over_shards(
  function: Callable[..., Any],
  *arguments: Any,
  dims: tuple[Any, ...],
  out_dims: Any,
  check_vma: bool = True,
) -> Any:
  """`function(*arguments, axes=...)`, on every shard of the ambient mesh.

  Without a mesh `function` sees whole arrays and no axes; inside somebody's `jax.shard_map` over all axes
  of the mesh it is called as it is, and knows of `context`; else it is mapped over the axes that are not
  manual yet.

  Args:
    function: takes `axes: Axes` as a keyword.
    arguments: arrays, None, or pytrees of these.
    dims: the logical dimensions of each argument, a pytree of tuples for a pytree; None for one that is
      None or replicated.
    out_dims: a pytree of tuples of logical dimensions, one for each output.
    check_vma: of `jax.shard_map`; False for a function whose kernels cannot say over which axes their
      outputs vary.

  Raises:
    UnsupportedError: somebody's `jax.shard_map` is over an axis that this library gives no meaning.
  """
  _check_manual_axes(arguments)
  mesh = ambient_mesh()
  if mesh is None:
    return function(*arguments, axes=Axes(context=_manual_context_axis()))
  free = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
  axes = Axes(
    *(axis if axis in free and mesh.shape[axis] > 1 else None for axis in (FSDP, CONTEXT, TENSOR))
  )
  if CONTEXT in mesh.manual_axes:
    axes = axes._replace(context=CONTEXT)

  def to_spec(dims):
    return PartitionSpec() if dims is None else spec(*dims, mesh=mesh)

  def to_specs(tree):
    return jax.tree.map(to_spec, tree, is_leaf=lambda x: x is None or _is_dims(x))

  mapped = jax.shard_map(
    lambda *args: function(*args, axes=axes),
    mesh=mesh,
    axis_names=free,
    in_specs=tuple(map(to_specs, dims)),
    out_specs=to_specs(out_dims),
    check_vma=check_vma,
  )
  return mapped(*arguments)


def _is_dims(x: Any) -> bool:
  return type(x) is tuple and all(d is None or isinstance(d, str) for d in x)
