"""The whole model: layer plans, causality as a gradient, exactness of TTT at rest, equality over meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
  ATTENTION,
  MESHES,
  MODEL,
  TTT,
  mesh_of,
  random_model,
  random_rows,
  relative_error,
)

from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.nn.layers import rotary_angles
from ttt_jax.nn.stacking import Group, LayerKind, LayerStack, group_layers, layer_kinds
from ttt_jax.nn.transformer import Transformer, next_token_logits
from ttt_jax.ops.documents import number_documents
from ttt_jax.parallel.mesh import sharding

TTT_KIND, PLAIN, FULL = LayerKind(True, 5), LayerKind(False, 5), LayerKind(False, None)


@pytest.mark.parametrize(
  ("kinds", "written"),
  [
    ((PLAIN,) * 7, 1),
    ((TTT_KIND, *(PLAIN,) * 5) * 4, 2),
    ((*(PLAIN,) * 5, TTT_KIND) * 6 + (PLAIN,) * 4, 3),
    ((PLAIN,) * 12 + (TTT_KIND,) + (PLAIN,) * 11, 3),
    ((PLAIN, PLAIN, TTT_KIND, PLAIN), 3),
    ((TTT_KIND, PLAIN, FULL), 3),
    ((PLAIN, FULL) * 3 + (TTT_KIND,), 3),
  ],
)
def test_plan_covers_the_layers_with_the_fewest_written_out(kinds, written):
  plan = group_layers(kinds)
  covered = [(run.kind,) * run.length for group in plan for run in group.pattern * group.repeats]
  assert sum(covered, ()) == kinds
  assert sum(len(group.pattern) for group in plan) == written


def test_plan_of_a_period_is_one_group():
  pattern = (LayerStack(TTT_KIND, 1), LayerStack(PLAIN, 2))
  assert group_layers((TTT_KIND, PLAIN, PLAIN) * 4) == (Group(pattern, 4),)


def test_any_set_of_layers_can_be_ttt_or_full():
  kinds = layer_kinds(MODEL, ATTENTION, TTT)
  assert kinds == (TTT_KIND, PLAIN, TTT_KIND, FULL)


@pytest.mark.parametrize(
  ("layers", "ttt"),
  [
    (4, (0, 2)),  # runs of one
    (9, (2, 5)),  # (two plain, one TTT) twice, then three plain
    (8, (2, 3, 6, 7)),  # runs of two, with statistics of two
  ],
)
def test_layers_are_applied_in_order(layers, ttt):
  """A model in runs and repeats equals the same blocks called one after another, and so its statistics."""
  config = dataclasses.replace(MODEL, num_layers=layers)
  attention = AttentionConfig(window=5)
  model = random_model(config, attention, dataclasses.replace(TTT, layers=ttt))
  tokens, segment_ids, _ = random_rows(2, 16)

  @jax.jit
  def one_after_another(model, tokens, segment_ids):
    x = embeddings = model.embed(tokens)
    rotary = rotary_angles(jnp.arange(16), MODEL.head_size, MODEL.rope_theta)
    documents = number_documents(segment_ids)
    collected = []
    for g, p, r in model.layers():
      block = jax.tree.map(lambda a, r=r: a[r], model.groups[g][p])
      x, stats = block(x, embeddings, rotary, documents, documents, update=True)
      collected += [] if stats is None else [stats]
    logits = next_token_logits(x, model.embed, model.norm, model.head)
    return logits, jax.tree.map(lambda *s: jnp.stack(s), *collected)

  expected, expected_stats = one_after_another(model, jnp.asarray(tokens), jnp.asarray(segment_ids))
  actual, stats = jax.jit(lambda m, *rows: m(*rows, return_stats=True))(model, tokens, segment_ids)
  assert relative_error(actual, expected) < 1e-5
  for a, b in zip(stats, expected_stats, strict=True):
    assert a.shape == (len(ttt),)
    assert relative_error(a, b) < 1e-5


LENGTH = 32
# Every token of a row has a vocabulary entry of its own, so that a gradient in the table of embeddings
# is one in the token; the untied head keeps the table out of the logits otherwise.
SPELLED = dataclasses.replace(MODEL, vocab_size=LENGTH, tie_embeddings=False, num_layers=3)


def _input_sensitivity(model, segment_ids, mesh):
  """`J[t, s]`: how much the logits at t of row 0 change with the embedding of token s."""
  probe = jax.random.normal(jax.random.key(2), (LENGTH,))
  where = sharding(mesh, "batch", "sequence")

  @jax.jit
  def row(model, t, ids, segment_ids):
    def logit(model):
      return jnp.vdot(model(ids, segment_ids)[0, t], probe)

    return jnp.sum(jnp.abs(jax.grad(logit)(model).embed.table[...]), axis=1)

  with jax.set_mesh(mesh):
    ids = jax.device_put(jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32)[None], (2, 1)), where)
    # Row 1 spells other words, so that it cannot stand in for row 0.
    ids = ids.at[1].set(0)
    if segment_ids is not None:
      segment_ids = jax.device_put(segment_ids, where)
    model = jax.device_put(model, sharding(mesh))
    return np.stack([np.asarray(row(model, jnp.int32(t), ids, segment_ids)) for t in range(LENGTH)])


@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
@pytest.mark.parametrize("mesh", MESHES)
def test_no_logit_depends_on_a_later_token_or_another_document(mesh, target):
  model = random_model(
    SPELLED,
    AttentionConfig(window=5, full_layers=(2,)),
    TTTConfig(layers=(0, 1), chunk_size=4, target=target),
  )
  document = np.repeat([1, 2, 3, 0], [9, 12, 8, 3])
  segment_ids = np.stack([document, np.flip(document)]).astype(np.int32)
  position = np.arange(LENGTH)
  later = position[None, :] > position[:, None]
  elsewhere = document[None, :] != document[:, None]
  elsewhere[:, -3:] = elsewhere[-3:, :] = False  # padding is nobody's document
  packed = _input_sensitivity(model, segment_ids, mesh_of(*MESHES[mesh]))
  assert not packed[later | elsewhere].any()
  # The test can fail: everything that may depend does.
  assert (packed[~later & ~elsewhere & (document != 0)[:, None]] > 0).all()


@pytest.mark.parametrize("mesh", ["1", "context 8"])
def test_no_logit_depends_on_a_later_token_of_one_long_document(mesh):
  model = random_model(
    SPELLED, AttentionConfig(window=3), TTTConfig(layers=(0, 1, 2), chunk_size=4)
  )
  position = np.arange(LENGTH)
  later = position[None, :] > position[:, None]
  reach = _input_sensitivity(model, None, mesh_of(*MESHES[mesh]))
  assert not reach[later].any()
  # All layers have windows: what lies beyond 3 * 2 tokens is reached through the fast weights alone.
  assert (reach[~later] > 0).all()


def test_a_window_alone_does_not_reach_far():
  """Without fast weights a logit sees `layers * (window - 1)` tokens back: the reach above is theirs."""
  attention = AttentionConfig(window=3)
  model = random_model(SPELLED, attention, TTTConfig(), seed=1)
  reach = _input_sensitivity(model, None, mesh_of(1, 1))
  assert reach[31, 31 - 6] > 0
  assert not reach[31, : 31 - 6].any()


@pytest.mark.parametrize("target", ["input_embed", "hidden_states"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_convolution_gives_the_logits_of_the_plain_model_bit_for_bit(dtype, target):
  ttt = dataclasses.replace(TTT, init="identity", target=target)
  config = dataclasses.replace(MODEL, dtype=dtype)
  with_ttt = Transformer(config, ATTENTION, ttt, rngs=nnx.Rngs(3))
  plain = Transformer(config, ATTENTION, TTTConfig(), rngs=nnx.Rngs(3))
  tokens, segment_ids, _ = random_rows(2, 30)
  # By default XLA may skip a rounding to bfloat16 inside a fusion, and these are other programs.
  exact = {"xla_allow_excess_precision": False}
  forward = jax.jit(lambda model, *rows: model(*rows), compiler_options=exact)
  with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention mixes dtypes
    for rows in ((tokens,), (tokens, segment_ids)):
      assert np.array_equal(forward(with_ttt, *rows), forward(plain, *rows))


def test_updates_off_is_the_plain_model():
  """With the same weights; and with updates on it is another one."""
  model = random_model()
  tokens, segment_ids, _ = random_rows(2, 32)
  plain = Transformer(MODEL, ATTENTION, TTTConfig(), rngs=nnx.Rngs(0))
  # Same parameters, layer by layer, without those of the targets.
  for (g, p, r), (pg, pp, pr) in zip(model.layers(), plain.layers()):
    _, own = nnx.split(model.groups[g][p])
    graph, theirs = nnx.split(plain.groups[pg][pp])
    own, theirs = dict(nnx.to_flat_state(own)), dict(nnx.to_flat_state(theirs))
    for path in theirs:
      theirs[path] = theirs[path].replace(theirs[path][...].at[pr].set(own[path][...][r]))
    plain.groups[pg][pp] = nnx.merge(graph, nnx.from_flat_state(list(theirs.items())))
  plain.embed, plain.norm = model.embed, model.norm
  forward = jax.jit(lambda m, update: m(tokens, segment_ids, update=update), static_argnums=1)
  expected = forward(plain, True)
  assert np.array_equal(forward(model, False), expected)
  assert relative_error(forward(model, True), expected) > 1e-2


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_logits_and_stats_do_not_depend_on_the_mesh(mesh):
  model = random_model()
  tokens, segment_ids, _ = random_rows(2, 64)
  forward = jax.jit(lambda m, *rows: m(*rows, return_stats=True))
  expected, expected_stats = forward(model, tokens, segment_ids)
  mesh = mesh_of(*MESHES[mesh])
  where = sharding(mesh, "batch", "sequence")
  with jax.set_mesh(mesh):
    rows = (jax.device_put(tokens, where), jax.device_put(segment_ids, where))
    actual, stats = forward(jax.device_put(model, sharding(mesh)), *rows)
  assert relative_error(actual, expected) < 1e-5
  for name in ("output_ratio", "inner_lr"):
    assert relative_error(getattr(stats, name), getattr(expected_stats, name)) < 1e-5
  # This ratio is of the last chunks of the shards, which on one device is another sample.
  assert stats.update_ratio.shape == (2,)
  assert np.all(stats.update_ratio > 0.2 * expected_stats.update_ratio)


def test_inside_somebody_elses_shard_map():
  """The model also runs whole inside a `jax.shard_map` over `context`, positions and all."""
  model = random_model()
  tokens, _, _ = random_rows(2, 32)
  mesh = mesh_of(1, 4)
  spec = jax.sharding.PartitionSpec(None, "context")
  mapped = jax.jit(
    jax.shard_map(
      lambda model, tokens: model(tokens),
      mesh=mesh,
      in_specs=(jax.sharding.PartitionSpec(), spec),
      out_specs=spec,
    )
  )
  assert relative_error(mapped(model, tokens), jax.jit(lambda m: m(tokens))(model)) < 1e-5


def test_remat_changes_nothing():
  tokens, segment_ids, _ = random_rows(2, 32)

  def gradient(remat):
    model = random_model(dataclasses.replace(MODEL, remat=remat))
    return jax.jit(jax.grad(lambda m: jnp.mean(m(tokens, segment_ids) ** 2)))(model)

  expected = jax.tree.leaves(gradient("none"))
  for remat in ("layer", "minimal"):
    for a, b in zip(jax.tree.leaves(gradient(remat)), expected):
      assert relative_error(a, b) < 1e-5


def test_tree_mode_gives_the_same():
  tokens, _, _ = random_rows(2, 16)
  expected = jax.jit(lambda m: m(tokens))(random_model())
  nnx.set_graph_mode(False)
  try:
    assert np.array_equal(jax.jit(lambda m: m(tokens))(random_model()), expected)
  finally:
    nnx.set_graph_mode(True)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("layers", (0, 4), r"ttt\.layers=\[0, 4\].*layer 4.*num_layers=4.*0 to 3"),
    ("layers", (-1,), r"ttt\.layers=\[-1\]"),
    ("layers", (1, 1), "twice"),
  ],
)
def test_layer_index_out_of_range(field, value, message):
  with pytest.raises(ValueError, match=message):
    Transformer(MODEL, ATTENTION, dataclasses.replace(TTT, **{field: value}), rngs=nnx.Rngs(0))


def test_bad_tokens_and_segments(unchecked_types):
  model = random_model()
  with pytest.raises(ValueError, match=r"tokens has shape \(8,\)"):
    model(jnp.zeros(8, jnp.int32))
  with pytest.raises(ValueError, match="float32"):
    model(jnp.zeros((1, 8), jnp.float32))
  with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 7\), expected \(1, 8\)"):
    model(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 7), jnp.int32))
  with pytest.raises(ValueError, match="segment_ids has dtype float32"):
    model(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), jnp.float32))
