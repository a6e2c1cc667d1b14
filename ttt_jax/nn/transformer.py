"""A decoder of the Llama / Qwen kind in which any MLP can have fast weights.

Layers of one kind are stacked and scanned, and so are repeated patterns of them: `group_layers` finds the
shortest program for any choice of layers, so that compile time follows the number of distinct layers, not
the depth.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig, check_layers
from ttt_jax.errors import UserError
from ttt_jax.nn.attention import Attention
from ttt_jax.nn.fast_mlp import MlpStats, TttMlp
from ttt_jax.nn.layers import (
  PROJECTED,
  Embed,
  RMSNorm,
  check_ids,
  in_vocabulary,
  normal_init,
  project,
  rms_normalize,
  rotary_angles,
)
from ttt_jax.nn.mixers import find_mixer
from ttt_jax.nn.mlp import Mlp
from ttt_jax.ops.documents import check_segment_ids, number_documents
from ttt_jax.ops.exchange.prefix import INCOMING_STATE
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import constrain, over_shards, positions
from ttt_jax.parallel.parameters import GATHERED, gathered


class LayerKind(NamedTuple):
  """What tells layers apart: parameters of one kind have equal shapes and can be stacked."""

  ttt: bool
  window: int | None  # of attention
  mixer: str = "attention"


class LayerStack(NamedTuple):
  """`length` layers of one kind, one after another."""

  kind: LayerKind
  length: int


class Group(NamedTuple):
  """`repeats` times the runs of `pattern`, one after another."""

  pattern: tuple[LayerStack, ...]
  repeats: int


def layer_kinds(
  model: ModelConfig, attention: AttentionConfig, ttt: TTTConfig
) -> tuple[LayerKind, ...]:
  """The kind of each layer, from the first to the last."""
  return tuple(
    LayerKind(
      ttt=layer in ttt.layers,
      window=None if layer in attention.full_layers or mixer != "attention" else attention.window,
      mixer=mixer,
    )
    for layer, mixer in enumerate(map(attention.mixer_of, range(model.num_layers)))
  )


def group_layers(kinds: tuple[LayerKind, ...]) -> tuple[Group, ...]:
  """Cuts the layers into repeated patterns of runs so that as few layers as possible are written out.

  `best[j]` is the cheapest plan for the first j layers, by layers written out, one per run, then by
  groups: its last group covers layers i to j-1 with some period p that divides j - i.
  """
  best: list[tuple[int, int, tuple[Group, ...]]] = [(0, 0, ())]
  for j in range(1, len(kinds) + 1):
    plans = []
    for i in range(j):
      length = j - i
      for p in (p for p in range(1, length + 1) if length % p == 0):
        period = kinds[i : i + p]
        if kinds[i:j] == period * (length // p):
          cost, groups, plan = best[i]
          pattern = tuple(
            LayerStack(kind, len(list(same))) for kind, same in itertools.groupby(period)
          )
          group = Group(pattern, length // p)
          plans.append((cost + len(pattern), groups + 1, (*plan, group)))
          break  # a longer period of the same layers writes out more
    best.append(min(plans, key=lambda plan: plan[:2]))
  return best[-1][2]


# What is kept of a layer for the backward pass, by `model.remat`. The state that came in from other
# shards is never exchanged twice, and no layer's gathered parameters are kept.
_SAVED = {
  "layer": jax.checkpoint_policies.save_only_these_names(INCOMING_STATE),
  "minimal": jax.checkpoint_policies.save_only_these_names(INCOMING_STATE, PROJECTED),
  "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
}


class Block(nnx.Module):
  """`x + attention(norm(x))`, then `x + mlp(norm(x))`; `attention` is the layer's mixer of tokens."""

  def __init__(
    self,
    kind: LayerKind,
    model: ModelConfig,
    attention: AttentionConfig,
    ttt: TTTConfig,
    *,
    rngs: nnx.Rngs,
  ):
    param_dtype = jnp.dtype(model.param_dtype)
    norm = partial(RMSNorm, model.d_model, eps=model.norm_eps, param_dtype=param_dtype)
    self.attention_norm = norm()
    if kind.mixer == "attention":
      self.attention = Attention(
        model, attention, window=kind.window, param_dtype=param_dtype, rngs=rngs
      )
    else:
      layer = find_mixer(kind.mixer).layer
      self.attention = layer(model, attention, param_dtype=param_dtype, rngs=rngs)
    self.mlp_norm = norm()
    if kind.ttt:
      self.mlp = TttMlp(model, ttt, param_dtype=param_dtype, rngs=rngs)
    else:
      self.mlp = Mlp(model, param_dtype=param_dtype, rngs=rngs)

  def __call__(self, x, embeddings, rotary, documents, *, update: bool):
    """The block's output, and its `MlpStats` if it updated a fast weight, else None."""
    with jax.named_scope("attention"):
      x = x + self.attention(self.attention_norm(x), rotary, documents)
    with jax.named_scope("mlp"):
      h = self.mlp_norm(x)
      stats = None
      if update and isinstance(self.mlp, TttMlp):
        y, stats = self.mlp.learn(h, self.source(embeddings, h), documents)
      else:
        y = self.mlp(h)
      x = constrain(x + y, "batch", "sequence", None)
    return x, stats

  def source(self, embeddings, h):
    """What the targets of the fast weight are made of."""
    source = embeddings if self.mlp.ttt.target == "input_embed" else h
    return rms_normalize(source, self.mlp_norm.eps) if self.mlp.ttt.normalize_target else source


class Transformer(nnx.Module):
  """Token embeddings, blocks, a final norm and a tied or untied head.

  `groups[g][p]` holds the blocks of run p of group g's pattern in all its repeats, stacked on a leading
  axis; `layers` says where each layer is.
  """

  def __init__(
    self,
    model: ModelConfig,
    attention: AttentionConfig | None = None,
    ttt: TTTConfig | None = None,
    *,
    rngs: nnx.Rngs,
  ):
    attention = AttentionConfig() if attention is None else attention
    ttt = TTTConfig() if ttt is None else ttt
    check_layers(model, attention, ttt)
    self.model, self.attention, self.ttt = model, attention, ttt
    self.stacking = group_layers(layer_kinds(model, attention, ttt))
    param_dtype = jnp.dtype(model.param_dtype)

    # A layer's parameters depend on the seed and its index only: a model with and one without fast
    # weights start from the same values.
    layer_keys = jax.random.split(rngs.params(), model.num_layers)

    def make(kind, key):
      return Block(kind, model, attention, ttt, rngs=nnx.Rngs(params=key))

    groups = []
    start = 0
    for pattern, repeats in self.stacking:
      ends = list(itertools.accumulate(run.length for run in pattern))
      keys = layer_keys[start : start + ends[-1] * repeats].reshape(repeats, ends[-1])
      groups.append(
        nnx.List(
          jax.vmap(partial(make, run.kind))(keys[:, end - run.length : end].reshape(-1))
          for run, end in zip(pattern, ends)
        )
      )
      start += ends[-1] * repeats
    self.groups = nnx.List(groups)
    self.embed = Embed(
      model.vocab_size,
      model.d_model,
      dtype=jnp.dtype(model.dtype),
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.norm = RMSNorm(model.d_model, eps=model.norm_eps, param_dtype=param_dtype)
    if model.tie_embeddings:
      self.head = None
    else:
      self.head = normal_init(
        rngs.params(), (model.d_model, model.vocab_size), param_dtype, fan_in=model.d_model
      )

  def __call__(
    self,
    tokens: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    update: bool = True,
    return_stats: bool = False,
  ):
    """The logits `[B, T, V]` of every token's successor, in float32 or wider.

    Args:
      tokens: rows of tokens. One outside of the vocabulary is an error where its value is known; in a
        traced array its embedding is NaN, and so are the logits that depend on it.
      segment_ids: documents of packed rows: neighbouring documents differ, 0 is padding. No logit
        depends on another document. Padding may have any token, also -1.
      update: whether the fast weights learn along the row; False reads with W throughout.
      return_stats: also return the `MlpStats` of the TTT layers, stacked in the order of the layers
        (None where none updates).

    Raises:
      UserError: tokens or segment_ids of the wrong shape or dtype, tokens outside of the vocabulary.
    """
    x, stats = self.hidden(tokens, segment_ids, update=update)
    logits = next_token_logits(x, self.embed, self.norm, self.head)
    return (logits, stats) if return_stats else logits

  def hidden(
    self,
    tokens: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    update: bool = True,
  ):
    """What `next_token_logits` makes the logits of: `[B, T, D]` after the last block, and the stats.

    Arguments and errors are those of `__call__`; `ttt_jax.nn.loss.model_losses` reads it piece by piece.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise UserError(
        f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, expected integers [B, T]"
      )
    given, tokens, documents = (tokens, segment_ids), jnp.asarray(tokens), None
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids)
      check_segment_ids(segment_ids, tokens.shape)
    check_ids("tokens", given[0], self.model.vocab_size, given[1])
    if segment_ids is not None:
      known = in_vocabulary(tokens, self.model.vocab_size, None)
      tokens = jnp.where((segment_ids == 0) & ~known, 0, tokens)
      rows = ("batch", "sequence")
      documents = over_shards(
        lambda ids, *, axes: number_documents(ids, context_axis=axes.context),
        segment_ids,
        dims=(rows,),
        out_dims=rows,
      )
    rotary = rotary_angles(
      positions(tokens.shape[1]),
      self.model.head_size,
      self.model.rope_theta,
      self.model.rope_scaling,
    )
    with jax.named_scope("embed"):
      embeddings = constrain(self.embed(tokens), "batch", "sequence", None)

    @partial(jax.checkpoint, policy=_SAVED[self.model.remat])
    def layer(x, block, embeddings, documents):
      block = gathered(block, x.dtype)
      return block(x, embeddings, rotary, documents, update=update)

    def superblock(x, runs):
      collected = []
      for blocks in runs:
        x, stats = _run(lambda x, block: layer(x, block, embeddings, documents), x, blocks)
        collected.append(stats)
      return x, _joined(collected)

    x = embeddings
    collected = []
    for group, (_, repeats) in zip(self.groups, self.stacking):
      runs = jax.tree.map(partial(_repeated, repeats), list(group))
      x, stats = jax.lax.scan(superblock, x, runs)
      collected.append(stats)
    return x, _joined(collected)

  def layers(self) -> list[tuple[int, int, int]]:
    """For every layer its place in the parameters: group, run of the pattern, place in the stack."""
    return [
      (g, p, r * run.length + i)
      for g, (pattern, repeats) in enumerate(self.stacking)
      for r in range(repeats)
      for p, run in enumerate(pattern)
      for i in range(run.length)
    ]


def _repeated(repeats: int, stack: Array) -> Array:
  """A stack of layers by the repeats of their pattern."""
  return stack.reshape(repeats, -1, *stack.shape[1:])


def _run(function, x, blocks):
  """`lax.scan` over the layers of a run, without a loop around a single one."""
  if jax.tree.leaves(blocks)[0].shape[0] > 1:
    return jax.lax.scan(function, x, blocks)
  x, stats = function(x, jax.tree.map(lambda a: a[0], blocks))
  return x, jax.tree.map(lambda a: a[None], stats)


def _joined(stats: list[MlpStats | None]) -> MlpStats | None:
  """The statistics of layers one after another, on one axis in their order."""
  there = [s for s in stats if s is not None]
  if not there:
    return None
  return jax.tree.map(lambda *s: jnp.concatenate([a.reshape(-1) for a in s]), *there)


# The product with the head, by whether it is the table of embeddings.
HEAD_EINSUM = {True: "btd,vd->btv", False: "btd,dv->btv"}


def next_token_logits(
  x: Float[Array, "B T D"], embed: Embed, norm: RMSNorm, head: nnx.Param | None
) -> Float[Array, "B T V"]:
  """The last norm and the head, tied if there is none of its own; in float32 or wider."""
  with jax.named_scope("head"):
    if head is None:
      kernel = gathered({"table": embed.table}, x.dtype)["table"]
    else:
      kernel = gathered({"head": head}, x.dtype)["head"]
    return project(HEAD_EINSUM[head is None], norm(x), kernel, accumulation_dtype(x.dtype))


def split_tokens(x: Array) -> str | None:
  """The logical dimension of the tokens of `[B, T, ...]`: a single one cannot be split."""
  return "sequence" if x.shape[1] > 1 else None


def count_parameters(model: nnx.Module) -> int:
  return sum(x.size for x in jax.tree.leaves(model))
