"""Forward and gradient compile ahead of time for TPUs, where libtpu is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu] has it"
  ),
]

# libtpu wants its environment before jax is imported: a process of its own.
_PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import ttt_jax
from ttt_jax.extras.plan.hlo import count_collectives

topology, shape, implementation = sys.argv[1], tuple(map(int, sys.argv[2].split("x"))), sys.argv[3]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
mesh = Mesh(np.array(devices).reshape(shape), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
op = ttt_jax.context_parallel(mesh)
T, D, F, C = 512 * shape[1], 256, 384, 256

def loss(z, v, w, lr, decay, segment_ids):
  y, state = op(z, v, w, chunk_size=C, inner_lr=lr, decay=decay, segment_ids=segment_ids,
                clip_norm=1.0, implementation=implementation)
  return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state.S)

def shaped(spec, *dims, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

rows, tokens, number = shape[0], P("data", "context"), shaped(P(), dtype=jnp.float32)
arguments = (shaped(tokens, rows, T, F), shaped(tokens, rows, T, D), shaped(P(), F, D), number, number,
             shaped(tokens, rows, T, dtype=jnp.int32))
for program in (loss, jax.grad(loss, (0, 1, 2, 3, 4))):
  compiled = jax.jit(program).lower(*arguments).compile()
  print(sorted(count_collectives(compiled.as_text())), compiled.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.parametrize("implementation", ["sequential", "dual"])
@pytest.mark.parametrize(("topology", "shape"), [("v5e:4x4", "2x8"), ("v5p:4x4x4", "4x16")])
def test_compiles_for_a_slice(topology, shape, implementation):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  command = [sys.executable, "-c", _PROGRAM, topology, shape, implementation]
  run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
  assert run.returncode == 0, run.stderr[-3000:]
  forward, gradient = run.stdout.strip().splitlines()[-2:]
  # Links form a torus there: the cost model sends states around a ring.
  assert "collective-permute" in forward
  assert "collective-permute" in gradient
