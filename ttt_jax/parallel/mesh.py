"""Lays out arrays on the mesh `data x fsdp x context x tensor`.

Model code runs under the ambient mesh (`jax.set_mesh`). `over_shards` maps code with explicit collectives,
such as attention and the fast weight, over the shards of that mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.config import MeshConfig
from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.ops.manual import is_checked, varying_axes

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
  """Names the mesh axes that split a function's arrays in `over_shards`; the others are None."""

  fsdp: str | None = None
  context: str | None = None
  tensor: str | None = None


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """Makes the mesh of a config over all devices; a mesh of size 1 takes the first device.

  Raises:
    UserError: the mesh needs more or fewer devices than there are.
  """
  devices = jax.devices() if devices is None else devices
  config = config.filled(len(devices))
  if config.size not in (1, len(devices)):
    sizes = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, config.shape))
    remedy = "give one axis the size -1 to use all devices"
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
  """Returns the partition of an array with these logical dimensions on `mesh`.

  Manual axes, those of an enclosing `jax.shard_map`, do not occur in it: they have split the array already.

  Raises:
    UserError: two dimensions are split over the same axis.
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
  """Returns the sharding of an array with these logical dimensions."""
  return NamedSharding(mesh, spec(*dims, mesh=mesh))


def to_mesh(x: np.ndarray, mesh: Mesh, *dims: str | None) -> jax.Array:
  """Copies a host array to the mesh; every process passes the whole array and fills its own devices."""
  return jax.make_array_from_callback(x.shape, sharding(mesh, *dims), lambda index: x[index])


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
  """Returns the rows of a batch that devices of this process hold, ascending.

  Processes that differ only along `context` or `tensor` hold the same rows.
  """
  held = sharding(mesh, "batch").addressable_devices_indices_map((batch_size,))
  return tuple(sorted({row for (index,) in held.values() for row in range(batch_size)[index]}))


def rows_to_mesh(x: np.ndarray, mesh: Mesh, *dims: str | None) -> jax.Array:
  """Assembles a batch on the mesh from the `local_rows` of every process; all processes call it.

  Args:
    x: the rows of this process, along the first dimension.
    mesh: the mesh of all processes.
    dims: the logical dimensions after the first.
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
  """Returns the mesh of `jax.set_mesh`, or None if its axes are all manual or it has one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.are_all_axes_manual or mesh.size == 1 else mesh


def _manual_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
  return mesh.manual_axes if isinstance(mesh, AbstractMesh) else ()


def _manual_context_axis() -> str | None:
  """Returns the context axis inside a `jax.shard_map` over it, else None."""
  return CONTEXT if CONTEXT in jax.sharding.get_abstract_mesh().manual_axes else None


def _check_manual_axes(arguments: Any) -> None:
  """Raises UnsupportedError inside a caller's `jax.shard_map` over an axis of unknown use.

  Rows split over `data` or `fsdp` are independent, and shards of a sequence over `context` exchange states.
  Over any other axis, `tensor` included, a device would take its part for the whole. Axes of one device,
  and axes over which no argument varies, split nothing.
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
  """Returns the number of shards into which `over_shards` splits the sequence."""
  mesh = ambient_mesh()
  if mesh is None or CONTEXT in mesh.manual_axes:
    return 1
  return mesh.shape.get(CONTEXT, 1)


def positions(length: int) -> jax.Array:
  """Returns the positions of this shard's `length` tokens in the whole sequence."""
  axis = _manual_context_axis()
  local = jnp.arange(length)
  return local if axis is None else local + length * jax.lax.axis_index(axis)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """Constrains the sharding of `x` to the ambient mesh; returns `x` itself without a mesh."""
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
  """Calls `function(*arguments, axes=...)` on every shard of the ambient mesh.

  Without a mesh `function` gets whole arrays and no axes. Inside a caller's `jax.shard_map` over all axes
  of the mesh it is called directly, with `context` if that is an axis. Otherwise it is mapped over the axes
  that are not manual yet.

  Args:
    function: takes `axes: Axes` as a keyword.
    arguments: arrays, None, or pytrees of these.
    dims: the logical dimensions of each argument, a pytree of tuples for a pytree; None for an argument
      that is None or replicated.
    out_dims: a pytree of tuples of logical dimensions, one for each output.
    check_vma: the option of `jax.shard_map`; False for a function whose kernels do not declare over which
      axes their outputs vary.

  Raises:
    UnsupportedError: a caller's `jax.shard_map` is over an axis that this library gives no meaning.
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


def row_shards(mesh: Mesh | None) -> int:
  """Returns the number of shards that the rows of a batch are split into."""
  return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
