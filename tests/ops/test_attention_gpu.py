"""The default attention kernel of a GPU depends on its vendor and capability, here or in another mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from ttt_jax.ops.attention.api import _choose
from ttt_jax.ops.hardware import find_device


class _Gpu:
  platform = "gpu"

  def __init__(self, device_kind, compute_capability):
    self.device_kind, self.compute_capability = device_kind, compute_capability


@pytest.mark.parametrize(
  ("gpu", "head_size", "expected"),
  [
    (_Gpu("AMD Instinct MI300X", "gfx942"), 8, "xla"),
    (_Gpu("gfx950:sramecc+:xnack-", "gfx950"), 8, "xla"),
    (_Gpu("Tesla V100-SXM2-16GB", "7.0"), 8, "xla"),
    (_Gpu("NVIDIA A100-SXM4-40GB", "8.0"), 8, "cudnn"),
    (_Gpu("NVIDIA H100 80GB HBM3", "9.0"), 256, "cudnn"),
    (_Gpu("NVIDIA B200", "10.0"), 256, "cudnn"),
  ],
  ids=lambda x: getattr(x, "device_kind", None),
)
@pytest.mark.parametrize("traced_for", ["a device here", "a mesh of its kind", "a mesh of another"])
def test_default_attention_on_a_gpu(gpu, head_size, expected, traced_for, monkeypatch):
  """The GPU that is traced for decides; the capability of a kind that is not here is unknown."""
  monkeypatch.setattr("jax.devices", lambda: [gpu])
  kind = "NVIDIA A40" if traced_for == "a mesh of another" else gpu.device_kind
  abstract = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
  q = jax.ShapeDtypeStruct((1, 8, 2, head_size), jnp.bfloat16)
  chosen = []

  def choose(q):
    chosen.append(_choose(None, q, q, q, None, None, None))
    return q

  mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=abstract)
  if traced_for == "a device here":
    jax.eval_shape(choose, q)
  else:
    with use_abstract_mesh(mesh):
      jax.eval_shape(choose, q)
  if traced_for == "a mesh of another":  # a head size that every cuDNN takes
    expected = "cudnn" if head_size <= 128 else "xla"
  assert chosen == [expected]
  assert find_device().name in ("h100", "h200")
