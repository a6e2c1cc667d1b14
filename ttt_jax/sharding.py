"""Where arrays live on the mesh `data x fsdp x context x tensor`.

Model code knows no mesh: it runs under the ambient one (`jax.set_mesh`), and the two ops that
communicate by hand, attention and the fast weight, are mapped over its shards by `over_shards`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ttt_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp", "context", "tensor")
CONTEXT = "context"

# Logical dimensions of an activation and the mesh axes they are split over.
_RULES: dict[str | None, tuple[str, ...]] = {
  "batch": ("data", "fsdp"),
  "sequence": (CONTEXT,),
  None: (),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """The mesh of a config over the first devices there are.

  Raises:
    ValueError: fewer devices exist than the mesh has.
  """
  devices = jax.devices() if devices is None else devices
  if config.size > len(devices):
    sizes = " x ".join(f"{name} {size}" for name, size in zip(MESH_AXES, config.shape))
    remedy = "use a smaller mesh"
    if devices[0].platform == "cpu":
      remedy += f", or set runtime.cpu_devices={config.size}"
    raise ValueError(
      f"mesh {sizes} needs {config.size} devices, but there are {len(devices)} "
      f"({devices[0].device_kind}): {remedy}"
    )
  return Mesh(
    np.asarray(devices[: config.size]).reshape(config.shape),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def spec(*dims: str | None, mesh: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
  """The partition of an array with these logical dimensions, over the axes that `mesh` has."""
  return PartitionSpec(
    *(tuple(axis for axis in _RULES[dim] if axis in mesh.axis_names) or None for dim in dims)
  )


def sharding(mesh: Mesh, *dims: str | None) -> NamedSharding:
  return NamedSharding(mesh, spec(*dims, mesh=mesh))


def _ambient_mesh() -> jax.sharding.AbstractMesh | None:
  """The mesh of `jax.set_mesh` if it splits anything that is not yet manual, else None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.are_all_axes_manual or mesh.size == 1 else mesh


def _manual_context_axis() -> str | None:
  """The context axis, if we are inside a `jax.shard_map` over it already."""
  return CONTEXT if CONTEXT in jax.sharding.get_abstract_mesh().manual_axes else None


def context_size() -> int:
  """How many shards of the sequence `over_shards` makes."""
  mesh = _ambient_mesh()
  return 1 if mesh is None else mesh.shape.get(CONTEXT, 1)


def token_shards() -> int:
  """How many devices `over_shards` splits the tokens of a batch of rows over."""
  mesh = _ambient_mesh()
  if mesh is None:
    return 1
  axes = (*_RULES["batch"], *_RULES["sequence"])
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.axis_names)


def positions(length: int) -> jax.Array:
  """The positions in the sequence of the `length` tokens at hand."""
  axis = _manual_context_axis()
  local = jnp.arange(length)
  return local if axis is None else local + length * jax.lax.axis_index(axis)


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
  """`x`, laid out over the ambient mesh; `x` itself where there is none."""
  mesh = _ambient_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, spec(*dims, mesh=mesh))


def over_shards(
  function: Callable[..., Any],
  *arguments: Any,
  dims: tuple[tuple[str | None, ...] | None, ...],
  out_dims: Any,
  check_vma: bool = True,
) -> Any:
  """`function(*arguments, context_axis=...)`, on every shard of the ambient mesh.

  Without a mesh `function` sees whole arrays and `context_axis=None`; inside somebody's
  `jax.shard_map` over `context` it is called as it is; else it is mapped, fully manual.

  Args:
    function: takes `context_axis` as a keyword.
    arguments: arrays, or None.
    dims: the logical dimensions of each argument; None for one that is None or replicated.
    out_dims: a pytree of tuples of logical dimensions, one for each output.
    check_vma: of `jax.shard_map`; False for a function whose kernels cannot say over which axes their
      outputs vary.
  """
  mesh = _ambient_mesh()
  if mesh is None:
    return function(*arguments, context_axis=_manual_context_axis())
  context_axis = CONTEXT if mesh.shape.get(CONTEXT, 1) > 1 else None

  def to_spec(dims):
    return PartitionSpec() if dims is None else spec(*dims, mesh=mesh)

  mapped = jax.shard_map(
    lambda *args: function(*args, context_axis=context_axis),
    mesh=mesh,
    in_specs=tuple(to_spec(d) for d in dims),
    out_specs=jax.tree.map(to_spec, out_dims, is_leaf=lambda x: x is None or _is_dims(x)),
    check_vma=check_vma,
  )
  return mapped(*arguments)


def _is_dims(x: Any) -> bool:
  return type(x) is tuple and all(d is None or isinstance(d, str) for d in x)
