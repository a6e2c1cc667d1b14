"""Small models with random, non-zero weights, and the meshes that tests run on."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttt_jax.config import AttentionConfig, MeshConfig, ModelConfig, TTTConfig
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.mesh import make_mesh

MODEL = ModelConfig(
  vocab_size=17,
  num_layers=4,
  d_model=12,
  d_ff=20,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  qk_norm=True,
)
ATTENTION = AttentionConfig(window=5, full_layers=(3,))
TTT = TTTConfig(layers=(0, 2), chunk_size=4, decay=0.9)

# data x context
MESHES = {"1": (1, 1), "context 8": (1, 8), "data 2 x context 4": (2, 4)}


def mesh_of(data: int, context: int, *, fsdp: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
  config = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
  return make_mesh(config, jax.devices()[: config.size])


def randomized(tree, seed: int, scale: float = 0.1):
  """`tree` with noise on every leaf: a zero convolution would hide every bug."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), tree)


def random_model(model=MODEL, attention=ATTENTION, ttt=TTT, *, seed=0) -> Transformer:
  return randomized(Transformer(model, attention, ttt, rngs=nnx.Rngs(seed)), seed)


def random_rows(rows: int, length: int, *, vocab: int = 17, documents: int = 4, seed: int = 0):
  """Tokens, packed segment ids with padding at the end of the last row, and next-token labels."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  segment_ids = 1 + np.sort(rng.integers(0, documents, (rows, length)), axis=1).astype(np.int32)
  segment_ids[-1, -3:] = 0
  labels = np.full_like(tokens, -1)
  same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
  labels[:, :-1] = np.where(same, tokens[:, 1:], -1)
  return tokens, segment_ids, labels


def relative_error(actual, expected) -> float:
  """`max |actual - expected| / max |expected|`."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  return float(np.max(np.abs(actual - expected)) / max(np.max(np.abs(expected)), 1e-30))


def write_files(root, files) -> str:
  """Writes files, text or bytes by their path under `root`, and returns `root` as text."""
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(root)
