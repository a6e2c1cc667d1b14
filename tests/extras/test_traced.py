"""Compares FLOPs counted in traced programs with the shapes, and with XLA's numbers."""

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of
from jax import lax
from jax.sharding import PartitionSpec as P

import ttt_jax
from ttt_jax.config import (
  AttentionConfig,
  Config,
  DataConfig,
  MeshConfig,
  ModelConfig,
  TrainConfig,
  TTTConfig,
)
from ttt_jax.extras.plan.programs import trace_training
from ttt_jax.extras.plan.traced import device_flops
from ttt_jax.ops.attention import splash
from ttt_jax.parallel.mesh import make_mesh
from ttt_jax.training.flops import token_flops, visible_keys

pytestmark = pytest.mark.usefixtures("standard_promotion")


def count(function, *arguments, devices=1, tokens=1, window=None):
  jaxpr = jax.make_jaxpr(function)(*arguments)
  return device_flops(jaxpr, devices=devices, tokens=tokens, window=window)


def test_products_in_scans_and_rematerialised():
  x, w = jnp.ones((3, 5)), jnp.ones((4, 5, 5))
  product = 2 * 3 * 5 * 5

  def forward(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  def remat(x, w):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
    return lax.scan(layer, x, w)[0].sum()

  assert count(forward, x, w) == 4 * product
  assert count(jax.grad(forward, (0, 1)), x, w) == 3 * 4 * product
  assert count(jax.grad(remat, (0, 1)), x, w) == 4 * 4 * product


def test_products_are_those_of_xla_which_counts_a_loop_once():
  x, w = jnp.ones((3, 5)), jnp.ones((4, 5, 5))

  def layer(x, w):
    return jnp.tanh(x @ w)

  def layers(x, w):
    return lax.scan(lambda x, w: (layer(x, w), None), x, w)[0]

  def of_xla(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

  assert count(layer, x, w[0]) == of_xla(layer, x, w[0])
  assert count(layers, x, w) == pytest.approx(4 * of_xla(layers, x, w), rel=0.05)  # its counter


def test_a_shard_counts_whole_and_the_rest_by_devices():
  mesh = mesh_of(2, 4)
  x, w = jnp.ones((2, 8, 6)), jnp.ones((6, 10))

  def function(x, w):
    tokens = P("data", "context")
    y = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(tokens, P()), out_specs=tokens)(x, w)
    return y @ w.T

  product = 2 * 16 * 6 * 10
  assert count(function, x, w, devices=8) == 2 * product / 8


def test_the_dearest_branch():
  w = jnp.ones((6, 6))

  def function(i, w):
    return lax.switch(i, (lambda w: w, lambda w: w @ w, lambda w: w @ w @ w), w)

  assert count(function, 1, w) == 2 * 2 * 6**3


@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize(("backward", "products"), [(False, 2), (True, 9)])
def test_attention_kernels(window, backward, products):
  """Counts two products of scores' size forward, nine with the backward kernels, which recompute scores."""
  t, heads, width = 2048, 4, 128
  q = jax.ShapeDtypeStruct((1, t, heads, width), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, t, 2, width), jnp.bfloat16)

  def attend(q, k, v):
    out = splash.attend(q, k, v, jnp.arange(t, dtype=jnp.int32), window=window)
    return jnp.sum(out.astype(jnp.float32))

  function = jax.grad(attend, (0, 1, 2)) if backward else attend
  flops = count(function, q, k, k, tokens=t, window=window)
  assert flops == pytest.approx(
    products * 2 * width * heads * t * visible_keys(t, window), rel=1e-3
  )


@pytest.mark.parametrize(
  "mesh", [MeshConfig(), MeshConfig(fsdp=2, context=2), MeshConfig(context=2, tensor=2)], ids=str
)
def test_a_training_step(mesh):
  """A step without remat has three times the FLOPs of `flops.py`, and those that shards repeat."""
  config = Config(
    mesh=mesh,
    model=ModelConfig(
      vocab_size=64, num_layers=3, d_model=64, d_ff=192, num_heads=4, num_kv_heads=2, remat="none"
    ),
    attention=AttentionConfig(window=8),
    ttt=TTTConfig(layers=(1,), chunk_size=32),
    data=DataConfig(seq_len=512),
    train=TrainConfig(batch_size=2),
  )
  traced = trace_training(config, make_mesh(mesh, jax.devices()[: mesh.size]))
  assert (traced.tokens, traced.runs) == (2 * 512, 1)
  counted = mesh.size * device_flops(traced.program.jaxpr, devices=mesh.size, tokens=512, window=8)
  flops = token_flops(config.model, config.attention, config.ttt, 512)
  least = 2 * 512 * 3 * (flops.projections + flops.fast_weights + flops.head)
  # Besides: attention in blocks, the head's logits once more, a shard's total of updates, both passes, and
  # the target's projection on every device of `tensor`.
  assert least < counted < 1.6 * least


def test_factorisations_and_solves():
  """Least squares factors and solves once a chunk; the model's own count is that of the program."""
  b, n, c, f, d = 2, 3, 4, 6, 5
  z, v, w = jnp.ones((b, n * c, f)), jnp.ones((b, n * c, d)), jnp.ones((f, d))
  state = ttt_jax.FastWeightState(A=jnp.ones((b, f, f)), D=jnp.ones((b, f, d)))

  def read(z, v, w, state):
    return ttt_jax.inplace_ttt(
      z, v, w, chunk_size=c, rule="least_squares", implementation="sequential", state=state
    )[0]

  counted = count(read, z, v, w, state)
  model = ModelConfig(num_layers=1, d_model=d, d_ff=f, num_heads=1, num_kv_heads=1, head_dim=2)
  ttt = TTTConfig(layers=(0,), chunk_size=c, rule="least_squares", projection=False, conv_width=3)
  fast = token_flops(model, AttentionConfig(), ttt, n * c).fast_weights - 2 * 3 * d  # no target
  assert counted == pytest.approx(b * n * c * (fast + 2 * f * d))  # and Z W
