"""Splits parameters, and optimiser state, over the mesh.

One table lists the logical dimensions of every parameter; the rules of `ttt_jax.parallel.mesh` map
dimensions to mesh axes. The path of optimiser state ends with its parameter's name, so both have the same
partition.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from ttt_jax.errors import UserError
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import FSDP, ambient_mesh, spec

# The name of parameters gathered over fsdp in `jax.checkpoint` policies. If remat saved them, every device
# would hold all parameters at the end of the forward pass.
GATHERED = "gathered_parameter"

# The logical dimensions of a layer's parameters; stacked layers have one more in front, which is not split.
# Small parameters are whole on every device.
_DIMENSIONS: dict[str, tuple[str | None, ...]] = {
  "table": ("vocab", "embed"),
  "head": ("embed", "vocab"),
  "query": ("embed", "heads", None),
  "key": ("embed", "kv_heads", None),
  "value": ("embed", "kv_heads", None),
  "out": ("heads", None, "embed"),
  "query_bias": ("heads", None),
  "key_bias": ("kv_heads", None),
  "value_bias": ("kv_heads", None),
  "out_bias": (None,),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
  "conv": (None, None),
  "projection": ("embed", None),
  "log_rate": (),
  "log_half_life": (),
  "log_read_scale": (),
  "log_gate": (None,),
  "gate_key": (None,),
  "key_projection": ("mlp", None),
  "scale": (None,),
  # Linear attention has as many heads as keys and values have.
  "decay_down": ("embed", None),
  "decay_up": (None, "kv_heads", None),
  "decay_bias": ("kv_heads", None),
  "output_gate": ("embed", "kv_heads", None),
  "beta": ("embed", "kv_heads"),
  "short_conv": (None, "kv_heads", None),
}


def dimensions(name: str, rank: int) -> tuple[str | None, ...]:
  """Returns the logical dimensions of the array at a path such as `groups/0/1/mlp/conv/value`.

  Raises:
    UserError: the table has no such parameter, or one of another rank.
  """
  dims = _DIMENSIONS.get(name.removesuffix("/value").rpartition("/")[2])
  if dims is None and rank == 0:
    return ()  # a counter
  if dims is None or rank - len(dims) not in (0, 1):
    raise UserError(
      f"{name} of rank {rank} is no parameter that can be split: its name in the table has {dims}"
    )
  return (None,) * (rank - len(dims)) + dims


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns the sharding of each array of a model, a layer or a training state.

  Raises:
    UserError: a mesh axis does not divide the dimension it splits.
  """
  return jax.tree.map_with_path(partial(_sharding, mesh), tree)


def constrain_parameters(tree: Any) -> Any:
  """Constrains arrays to the shardings of the parameters of the same names on the ambient mesh."""
  mesh = ambient_mesh()
  if mesh is None:
    return tree

  def constrain(path, x):
    return jax.lax.with_sharding_constraint(x, spec(*dimensions(_name(path), x.ndim), mesh=mesh))

  return jax.tree.map_with_path(constrain, tree)


def gathered(tree: Any, dtype: DTypeLike) -> Any:
  """Gathers a layer's parameters over `fsdp`, rounded to the dtype in which the layer computes.

  See `gather_in_dtype`; a reduce-scatter sums and splits their gradients. Call this inside the scan over
  layers and inside remat, so that a device holds only one whole layer.
  """
  mesh = ambient_mesh()
  if mesh is None or mesh.shape.get(FSDP, 1) == 1:
    return tree

  def gather(path, x):
    dims = dimensions(_name(path), x.ndim)
    if "embed" not in dims:
      return x
    split = spec(*dims, mesh=mesh)
    whole = spec(*(None if dim == "embed" else dim for dim in dims), mesh=mesh)
    constrain = jax.lax.with_sharding_constraint
    x = gather_in_dtype(
      x,
      jnp.dtype(dtype),
      lambda a: constrain(constrain(a, split), whole),
      lambda a: constrain(a, split),
    )
    return checkpoint_name(x, GATHERED)

  return jax.tree.map_with_path(gather, tree)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_in_dtype(
  x: Array, dtype: jnp.dtype, gather: Callable[[Array], Array], scatter: Callable[[Array], Array]
) -> Array:
  """Returns `gather(x)`, sent in `dtype` and float32 or wider when it arrives.

  The gradient is therefore float32 or wider too when `scatter` sums and splits it.

  Args:
    x: a part of a parameter.
    dtype: the dtype that the devices exchange.
    gather: makes the whole of the parts.
    scatter: the transpose of `gather`.
  """
  return gather(x.astype(dtype)).astype(accumulation_dtype(dtype))


def _gather_fwd(x, dtype, gather, scatter):
  return gather_in_dtype(x, dtype, gather, scatter), jnp.zeros((), x.dtype)


def _gather_bwd(dtype, gather, scatter, like, cotangent):
  return (scatter(cotangent).astype(like.dtype),)


gather_in_dtype.defvjp(_gather_fwd, _gather_bwd)


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _sharding(mesh: Mesh, path: tuple, x: Any) -> NamedSharding:
  dims = dimensions(_name(path), len(x.shape))
  partition = spec(*dims, mesh=mesh)
  for dim, size, axis in zip(dims, x.shape, partition):
    if axis is not None and size % mesh.shape[axis]:
      raise UserError(
        f"mesh.{axis}={mesh.shape[axis]} does not divide the {size} of dimension {dim!r} of "
        f"{_name(path)} {list(x.shape)}: choose a divisor"
      )
  return NamedSharding(mesh, partition)
