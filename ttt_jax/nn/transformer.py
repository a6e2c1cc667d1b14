"""Implements a decoder of the Llama / Qwen kind in which any MLP can have fast weights.

Layers of one kind are stacked and scanned, and so are repeated patterns of stacks (`stacking.py`), so that
compile time grows with the number of distinct layers, not with the depth.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ttt_jax.config import AttentionConfig, ModelConfig, TTTConfig, check_layers
from ttt_jax.errors import UserError
from ttt_jax.nn.attention import Attention
from ttt_jax.nn.fast_mlp import TttMlp
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
from ttt_jax.nn.stacking import LayerKind, group_layers, layer_kinds
from ttt_jax.ops.documents import check_segment_ids, number_documents
from ttt_jax.ops.exchange.prefix import INCOMING_STATE
from ttt_jax.ops.numerics import accumulation_dtype
from ttt_jax.parallel.mesh import constrain, over_shards, positions
from ttt_jax.parallel.parameters import GATHERED, gathered

# What remat saves of a layer for the backward pass, by `model.remat`. These files set the names:
#   INCOMING_STATE  the state from other shards (ops/exchange/prefix.py); always saved, so that the
#                   backward pass does not exchange it again
#   PROJECTED       outputs of projections and mixers (nn/attention.py, nn/mlp.py,
#                   extras/baselines/layers.py)
#   GATHERED        parameters gathered over fsdp (parallel/parameters.py); never saved
# `jax.checkpoint` without a policy recomputes scores, solves or logits piece by piece in
# ops/attention/local.py, ops/fast_weight/dual.py, ops/fast_weight/least_squares/kernel.py,
# extras/baselines/ops.py and nn/loss.py.
_REMAT_POLICIES = {
  "layer": jax.checkpoint_policies.save_only_these_names(INCOMING_STATE),
  "minimal": jax.checkpoint_policies.save_only_these_names(INCOMING_STATE, PROJECTED),
  "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
}


class Block(nnx.Module):
  """Computes `x + attention(norm(x))`, then `x + mlp(norm(x))`; `attention` is the layer's mixer."""

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

  def __call__(self, x, embeddings, rotary, documents, attention_documents, *, update: bool):
    """Returns the block's output, and its `MlpStats` if it updated a fast weight, else None.

    Attention has documents of its own. A mixer with a state keeps it in `documents`, as a fast weight
    does.
    """
    is_attention = isinstance(self.attention, Attention)
    with jax.named_scope("attention"):
      seen = attention_documents if is_attention else documents
      x = x + self.attention(self.attention_norm(x), rotary, seen)
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
    """Returns the input of the convolution that makes the fast weight's targets."""
    source = embeddings if self.mlp.ttt.target == "input_embed" else h
    return rms_normalize(source, self.mlp_norm.eps) if self.mlp.ttt.normalize_target else source


class Transformer(nnx.Module):
  """The model computes token embeddings, blocks, a final norm and a tied or untied head.

  `groups[g][p]` holds the blocks of stack p of group g's pattern in all its repeats, on a leading axis;
  `layers` gives the index of each layer. `stacking` describes the groups.
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

    # A layer's parameters depend only on the seed and the layer's index: models with and without fast
    # weights start from the same values.
    layer_keys = jax.random.split(rngs.params(), model.num_layers)

    def make(kind, key):
      return Block(kind, model, attention, ttt, rngs=nnx.Rngs(params=key))

    groups = []
    start = 0
    for pattern, repeats in self.stacking:
      ends = list(itertools.accumulate(stack.length for stack in pattern))
      keys = layer_keys[start : start + ends[-1] * repeats].reshape(repeats, ends[-1])
      groups.append(
        nnx.List(
          jax.vmap(partial(make, stack.kind))(keys[:, end - stack.length : end].reshape(-1))
          for stack, end in zip(pattern, ends)
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
    attention_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    update: bool = True,
    return_stats: bool = False,
  ):
    """Returns the logits `[B, T, V]` of every token's successor, in float32 or wider.

    Args:
      tokens: rows of tokens. A token outside the vocabulary is an error if its value is known; in a traced
        array its embedding is NaN, and so are the logits that depend on it.
      segment_ids: documents of packed rows: neighbouring documents differ, 0 is padding. No logit
        depends on another document. Padding may have any token, also -1.
      attention_segment_ids: documents of attention, where they are not those of the fast weights:
        attention restarts here, fast weights go on to the end of a document in `segment_ids`.
      update: whether the fast weights learn along the row; False reads with W throughout.
      return_stats: also return the `MlpStats` of the TTT layers, stacked in the order of the layers
        (None if no layer updates).

    Raises:
      UserError: tokens or segment_ids have the wrong shape or dtype, or tokens are outside the vocabulary.
    """
    x, stats = self.hidden(tokens, segment_ids, attention_segment_ids, update=update)
    logits = next_token_logits(x, self.embed, self.norm, self.head)
    return (logits, stats) if return_stats else logits

  def hidden(
    self,
    tokens: Int[Array | np.ndarray, "B T"],
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    attention_segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    *,
    update: bool = True,
  ):
    """Returns the last block's output `[B, T, D]`, the input of `next_token_logits`, and the stats.

    Arguments and errors are those of `__call__`.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise UserError(
        f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, expected integers [B, T]"
      )
    original, tokens = (tokens, segment_ids), jnp.asarray(tokens)
    documents = attention_documents = None
    if segment_ids is not None:
      documents = attention_documents = _documents("segment_ids", segment_ids, tokens.shape)
    check_ids("tokens", original[0], self.model.vocab_size, original[1])
    if segment_ids is not None:
      valid = in_vocabulary(tokens, self.model.vocab_size, None)
      tokens = jnp.where((documents == 0) & ~valid, 0, tokens)
    if attention_segment_ids is not None:
      attention_documents = _documents("attention_segment_ids", attention_segment_ids, tokens.shape)
    rotary = rotary_angles(
      positions(tokens.shape[1]),
      self.model.head_size,
      self.model.rope_theta,
      self.model.rope_scaling,
    )
    with jax.named_scope("embed"):
      embeddings = constrain(self.embed(tokens), "batch", "sequence", None)

    @partial(jax.checkpoint, policy=_REMAT_POLICIES[self.model.remat])
    def layer(x, block, embeddings, documents, attention_documents):
      block = gathered(block, x.dtype)
      return block(x, embeddings, rotary, documents, attention_documents, update=update)

    def pattern_layers(x, stacks):
      collected = []
      for blocks in stacks:
        x, stats = _scan_stack(
          lambda x, block: layer(x, block, embeddings, documents, attention_documents), x, blocks
        )
        collected.append(stats)
      return x, _concatenated(collected)

    x = embeddings
    collected = []
    for group, (_, repeats) in zip(self.groups, self.stacking):
      stacks = jax.tree.map(partial(_split_repeats, repeats), list(group))
      x, stats = _scan_stack(pattern_layers, x, stacks)
      collected.append(stats)
    return x, _concatenated(collected)

  def layers(self) -> list[tuple[int, int, int]]:
    """Returns the indices of every layer's parameters: group, stack of the pattern, layer in the stack."""
    return [
      (g, p, r * stack.length + i)
      for g, (pattern, repeats) in enumerate(self.stacking)
      for r in range(repeats)
      for p, stack in enumerate(pattern)
      for i in range(stack.length)
    ]


def _documents(name: str, segment_ids: Array | np.ndarray, shape: tuple[int, ...]) -> Array:
  """Numbers the documents of rows over all shards; raises UserError unless there is one id per token."""
  segment_ids = jnp.asarray(segment_ids)
  check_segment_ids(segment_ids, shape, name=name)
  rows = ("batch", "sequence")
  return over_shards(
    lambda ids, *, axes: number_documents(ids, context_axis=axes.context),
    segment_ids,
    dims=(rows,),
    out_dims=rows,
  )


def _split_repeats(repeats: int, stack: Array) -> Array:
  """Splits the leading axis of stacked layers into the repeats of their pattern and the rest."""
  return stack.reshape(repeats, -1, *stack.shape[1:])


def _scan_stack(function, x, blocks):
  """Scans over the leading axis of `blocks`; one element has no loop.

  A loop would make a backward pass through all of its body, also below the first parameter that trains.
  """
  if jax.tree.leaves(blocks)[0].shape[0] > 1:
    return jax.lax.scan(function, x, blocks)
  x, stats = function(x, jax.tree.map(lambda a: a[0], blocks))
  return x, jax.tree.map(lambda a: a[None], stats)


def _concatenated(stats: list[Any]) -> Any:
  """Concatenates the statistics of layers in their order; None if there are none."""
  present = [s for s in stats if s is not None]
  if not present:
    return None
  return jax.tree.map(lambda *s: jnp.concatenate([a.reshape(-1) for a in s]), *present)


# The einsum of the head, by whether it is tied to the table of embeddings.
HEAD_EINSUM = {True: "btd,vd->btv", False: "btd,dv->btv"}


def next_token_logits(
  x: Float[Array, "B T D"], embed: Embed, norm: RMSNorm, head: nnx.Param | None
) -> Float[Array, "B T V"]:
  """Applies the last norm and the head, tied if `head` is None; in float32 or wider."""
  with jax.named_scope("head"):
    if head is None:
      kernel = gathered({"table": embed.table}, x.dtype)["table"]
    else:
      kernel = gathered({"head": head}, x.dtype)["head"]
    return project(HEAD_EINSUM[head is None], norm(x), kernel, accumulation_dtype(x.dtype))


def split_tokens(x: Array) -> str | None:
  """Returns the logical dimension of the T axis of `[B, T, ...]`; a single token cannot be split."""
  return "sequence" if x.shape[1] > 1 else None


def count_parameters(model: nnx.Module) -> int:
  return sum(x.size for x in jax.tree.leaves(model))
