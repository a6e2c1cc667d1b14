"""Compares FLOPs from a config with parameter sizes, a count of visible keys, and XLA's number."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import MODEL

from ttt_jax.config import AttentionConfig, Config, DataConfig, ModelConfig, TrainConfig, TTTConfig
from ttt_jax.nn.transformer import Transformer
from ttt_jax.parallel.trees import named_leaves
from ttt_jax.training.flops import token_flops, training_flops, visible_keys

ATTENTION = AttentionConfig(window=5, full_layers=(1,))
TTT = TTTConfig(layers=(0, 3), chunk_size=4)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
def test_visible_keys(window):
  q, k = np.arange(12)[:, None], np.arange(12)[None]
  seen = (k <= q) & (q - k < (window or 12))
  assert visible_keys(12, window) == pytest.approx(seen.sum(1).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_two_flops_for_every_parameter_a_token_meets(tied):
  model = dataclasses.replace(MODEL, tie_embeddings=tied)
  shapes = jax.eval_shape(lambda: Transformer(model, ATTENTION, TTT, rngs=nnx.Rngs(0)))
  sizes = {name: leaf.size for name, leaf in named_leaves(shapes).items()}
  head = sizes["embed/table/value" if tied else "head/value"]

  def of(*names):
    return sum(n for name, n in sizes.items() if name.split("/")[-2] in names)

  flops = token_flops(model, ATTENTION, TTT, 20)
  assert flops.projections == 2 * of("query", "key", "value", "out", "gate", "up", "down")
  assert flops.head == 2 * head
  # A token's update of the fast weight is an outer product with as many entries as W.
  update = 2 * 2 * model.d_ff * model.d_model
  assert flops.fast_weights == 2 * of("conv", "projection") + update
  assert flops.attention == 4 * 24 * (3 * visible_keys(20, 5) + visible_keys(20, None))


@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_forward_pass_is_that_of_xla(layers):
  """Compiles one layer without loops; it also computes masked scores and reads W and S in two products."""
  model = ModelConfig(
    vocab_size=64, num_layers=1, d_model=64, d_ff=192, num_heads=4, num_kv_heads=2, remat="none"
  )
  attention = AttentionConfig(implementation="xla")
  ttt = TTTConfig(layers=layers, chunk_size=16, implementation="associative")
  graph, arrays = nnx.split(Transformer(model, attention, ttt, rngs=nnx.Rngs(0)))
  forward = jax.jit(lambda arrays, tokens: nnx.merge(graph, arrays)(tokens))
  compiled = forward.lower(arrays, np.zeros((2, 64), np.int32)).compile()
  flops = token_flops(model, attention, ttt, 64)
  masked = 4 * 64 * (64 - visible_keys(64, None))
  least = 2 * 64 * (flops.forward + masked + len(layers) * 2 * 64 * 192)
  assert least < compiled.cost_analysis()["flops"] < 1.1 * least  # the rest is not products


def test_a_training_step():
  config = Config(
    model=MODEL,
    attention=ATTENTION,
    ttt=TTT,
    data=DataConfig(seq_len=20),
    train=TrainConfig(batch_size=3),
  )
  flops = token_flops(MODEL, ATTENTION, TTT, 20)
  assert training_flops(config) == pytest.approx(3 * 20 * 3 * sum(flops))
  frozen = dataclasses.replace(config, train=dataclasses.replace(config.train, trainable="ttt"))
  saved = 60 * (flops.projections + flops.head)
  assert training_flops(frozen) == pytest.approx(training_flops(config) - saved)
