"""Applies the fast weight to global arrays on a mesh, for callers who do not write `jax.shard_map`.

`context_parallel` maps `ttt_jax.inplace_ttt` and `ttt_jax.ntp_targets` over the shards, fully manually. It
takes and returns arrays, and needs no module or config.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ttt_jax.errors import UserError
from ttt_jax.ops.fast_weight.api import FastWeightState, inplace_ttt
from ttt_jax.ops.fast_weight.targets import ntp_targets

_OPTIONAL_AXES = ("data", "fsdp", "tensor")  # axes of the defaults, ignored on meshes without them


@dataclasses.dataclass(frozen=True)
class ContextParallel:
  """Applies `ttt_jax.inplace_ttt` to global arrays: the op that `context_parallel` returns."""

  mesh: Mesh | jax.sharding.AbstractMesh
  axis: str
  batch_axes: tuple[str, ...]
  tensor_axis: str | None

  def __call__(
    self,
    z: Float[Array, "*B T F"],
    v: Float[Array, "*B T D"],
    w_down: Float[Array, "F D"],
    *,
    inner_lr: float | int | Float[Array, ""] | None = None,
    state: FastWeightState | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    decay: float | int | Float[Array, ""] | None = None,
    rule: str = "sum",
    read_gate: tuple | None = None,
    key_projection: Float[Array, "F R"] | None = None,
    return_stats: bool = False,
    **options: Any,
  ):
    """Computes `ttt_jax.inplace_ttt`, with the same numbers as on one device.

    T is split over `axis`, the first dimension of B over `batch_axes`, and F over `tensor_axis`. Args and
    Returns are those of `inplace_ttt` without `context_axis` and `tensor_axis`. The state and the
    statistics are split like B, the state also along F; the last dimension of the statistics counts shards.

    Raises:
      UserError: sizes that the mesh does not divide, and the errors of `inplace_ttt`.
    """
    lead, (t, f) = z.shape[:-2], z.shape[-2:]
    self._check_sizes(lead, t, f)
    rows = self._rows(lead)
    tokens, ids = PartitionSpec(*rows, self.axis, None), PartitionSpec(*rows, self.axis)
    kept = PartitionSpec(*rows, self.tensor_axis, None)
    arrays = {
      "z": (z, PartitionSpec(*rows, self.axis, self.tensor_axis)),
      "v": (v, tokens),
      "w_down": (w_down, PartitionSpec(self.tensor_axis, None)),
    }
    if state is not None:
      arrays["state"] = (state, jax.tree.map(lambda _: kept, state))
    if segment_ids is not None:
      arrays["segment_ids"] = (segment_ids, ids)
    options |= {"inner_lr": inner_lr, "decay": decay}
    for name in ("inner_lr", "decay", "ridge", "read_scale"):
      if isinstance(options.get(name), jax.Array):
        arrays[name] = (options.pop(name), PartitionSpec())
    if read_gate is not None:
      read_gate = tuple(map(jnp.asarray, read_gate))
      arrays["read_gate"] = (read_gate, (PartitionSpec(),) * len(read_gate))
    if key_projection is not None:
      arrays["key_projection"] = (key_projection, PartitionSpec(self.tensor_axis, None))

    def local(arrays):
      y, state, *stats = inplace_ttt(
        **arrays,
        **options,
        rule=rule,
        context_axis=self.axis,
        tensor_axis=self.tensor_axis,
        return_stats=return_stats,
      )
      return y, state, jax.tree.map(lambda x: x[..., None], stats)

    stats_specs = [PartitionSpec(*rows, self.axis)] if return_stats else []
    state_specs = FastWeightState(S=kept) if rule == "sum" else FastWeightState(A=kept, D=kept)
    y, state, stats = self._map(local, arrays, (tokens, state_specs, stats_specs))
    return y, state, *stats

  def ntp_targets(
    self,
    x: Float[Array, "*B T D"],
    conv: Float[Array, "width D"],
    projection: Float[Array, "D D"] | None,
    *,
    chunk_size: int,
    segment_ids: Int[Array, "*B T"] | None = None,
  ) -> Float[Array, "*B T D"]:
    """Computes `ttt_jax.ntp_targets`, T and B split as for the op; shards exchange nothing."""
    lead, t = x.shape[:-2], x.shape[-2]
    self._check_sizes(lead, t, None)
    if t // self.mesh.shape[self.axis] % chunk_size:
      raise UserError(
        f"chunk_size={chunk_size} does not divide the {t // self.mesh.shape[self.axis]} tokens of a "
        f"shard ({self.mesh.shape[self.axis]} shards over {self.axis!r}): shards hold whole chunks"
      )
    rows = self._rows(lead)
    tokens = PartitionSpec(*rows, self.axis, None)
    arrays = {"x": (x, tokens), "conv": (conv, PartitionSpec())}
    if projection is not None:
      arrays["projection"] = (projection, PartitionSpec())
    if segment_ids is not None:
      arrays["segment_ids"] = (segment_ids, PartitionSpec(*rows, self.axis))

    def local(arrays):
      return ntp_targets(**{"projection": None} | arrays, chunk_size=chunk_size)

    return self._map(local, arrays, tokens)

  def _map(self, local, arrays, out_specs):
    """Calls `local` on every shard, with its part of a dict of (array, spec)."""
    specs = {name: spec for name, (_, spec) in arrays.items()}
    arrays = {name: x for name, (x, _) in arrays.items()}
    if AxisType.Explicit in self.mesh.axis_types:
      # Explicit axes make the sharding part of an array's type: it must be the one of `in_specs`.
      arrays = {
        name: jax.tree.map(
          lambda x, spec: jax.sharding.reshard(x, NamedSharding(self.mesh, spec)), x, specs[name]
        )
        for name, x in arrays.items()
      }
    return jax.shard_map(local, mesh=self.mesh, in_specs=(specs,), out_specs=out_specs)(arrays)

  def _rows(self, lead: tuple[int, ...]) -> tuple[tuple[str, ...] | None, ...]:
    """Returns the entries of a PartitionSpec for the leading dimensions B."""
    return ((self.batch_axes or None), *(None,) * (len(lead) - 1)) if lead else ()

  def _check_sizes(self, lead, t, f) -> None:
    """Raises UserError unless the mesh divides B, T and F."""
    batch_parts = 1
    for name in self.batch_axes:
      batch_parts *= self.mesh.shape[name]
    if batch_parts > 1 and not lead:
      raise UserError(
        f"z has no batch dimension to split over batch_axes={self.batch_axes}: add one, or pass "
        "batch_axes=()"
      )
    sizes = [("T", t, self.axis, self.mesh.shape[self.axis])]
    if lead:
      sizes.append(("B", lead[0], self.batch_axes, batch_parts))
    if f is not None and self.tensor_axis is not None:
      sizes.append(("F", f, self.tensor_axis, self.mesh.shape[self.tensor_axis]))
    for dim, size, axis, parts in sizes:
      if size % parts:
        raise UserError(f"{parts} devices over {axis!r} do not divide {dim}={size}")


def context_parallel(
  mesh: Mesh | jax.sharding.AbstractMesh,
  axis: str = "context",
  batch_axes: tuple[str, ...] = ("data", "fsdp"),
  tensor_axis: str | None = "tensor",
) -> ContextParallel:
  """Returns `ttt_jax.inplace_ttt` over global arrays whose sequence is split over a mesh axis.

      op = ttt_jax.context_parallel(mesh)
      y, state = op(z, v, w_down, chunk_size=512, inner_lr=0.1)      # under your jit, grad, scan, remat

  `op.ntp_targets` is `ttt_jax.ntp_targets` over global arrays. Both are fully manual inside, and take
  meshes with Auto and with Explicit axes.

  Args:
    mesh: the devices.
    axis: the mesh axis along which T is split into contiguous shards of whole chunks.
    batch_axes: mesh axes over which the first batch dimension is split.
    tensor_axis: the mesh axis over which F is split (y is summed over it), or None. The names data, fsdp
      and tensor are ignored on meshes without such an axis.

  Raises:
    UserError: a name that is not an axis of the mesh, or an axis of several devices that is not named.
  """
  names = mesh.axis_names
  if tensor_axis is not None and tensor_axis not in names and tensor_axis in _OPTIONAL_AXES:
    tensor_axis = None
  batch_axes = tuple(name for name in batch_axes if name in names or name not in _OPTIONAL_AXES)
  used = (axis, *batch_axes, *((tensor_axis,) if tensor_axis is not None else ()))
  for name in used:
    if name not in names:
      raise UserError(
        f"{name!r} is not an axis of the mesh, which has {', '.join(map(repr, names))}"
      )
  if len(set(used)) < len(used):
    raise UserError(
      f"axis={axis!r}, batch_axes={batch_axes}, tensor_axis={tensor_axis!r}: one twice"
    )
  for name in names:
    if name not in used and mesh.shape[name] > 1:
      raise UserError(
        f"mesh axis {name!r} of {mesh.shape[name]} devices has no use here: name it in batch_axes, or "
        "use a mesh without it"
      )
  return ContextParallel(mesh, axis, batch_axes, tensor_axis)
