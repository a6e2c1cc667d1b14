"""ttt_jax trains and runs language models that learn while they read.

In-Place Test-Time Training (Feng et al., ICLR 2026, arXiv 2604.06169) in JAX makes the down projections of
gated MLPs fast weights, updated chunk by chunk along the sequence. The ops are pure functions on arrays and
accept a sequence that is split over devices, inside `jax.shard_map`. The parts that need Flax (models,
pretrained checkpoints, tokenizers, generation) are imported when they are first used.

Glossary, with the paper's symbols:

| term | meaning | paper |
|---|---|---|
| fast weight | a down projection that changes along a document: W + S | W_down^(i) |
| slow weight | W `[F, D]`, the trained start of a fast weight; the paper's is transposed | W_down^(0) |
| state | S `[F, D]`, the sum of the updates so far; 0 where a document starts | |
| chunk | C consecutive tokens that are read with one state and then make one update | C |
| read | the product of a chunk's activations with the fast weight, Z (W + S) | O |
| activations | z = act(h W_gate) * (h W_up), the input of the down projection | Z |
| target | the value that an update stores for an activation, made of the coming tokens | V |
| projection | the learned matrix `[D, D]` behind the target's convolution | W_target |
| inner rate | the step size of an update, `inner_lr` | eta |
| clip | the largest Frobenius norm of one chunk's update, `clip_norm` | tau |
| update | the pair (keep, delta) of the map S -> keep S + delta; updates compose associatively | |
| decay | the factor of the state per chunk, `keep` without documents; the paper's is 1 | |
| half-life | the number of tokens after which an update counts half: a decay in tokens | |
| context | the mesh axis along which the tokens of a row are split; each shard holds whole chunks | |
| exchange | the exclusive prefix of the shards' updates: the state that each shard starts from | |
| segment | a document of a packed row, as `segment_ids` name it; 0 is padding | |
| run | a run directory: the config, metrics and checkpoints of one training | |
| plan | a program compiled ahead of time for a TPU slice: its memory and a bound of its time | |
"""

import importlib
from typing import TYPE_CHECKING, Any

from ttt_jax.errors import UnsupportedError as UnsupportedError
from ttt_jax.errors import UserError as UserError
from ttt_jax.ops.exchange.prefix import exclusive_prefix as exclusive_prefix
from ttt_jax.ops.fast_weight.api import FastWeightState as FastWeightState
from ttt_jax.ops.fast_weight.api import FastWeightStats as FastWeightStats
from ttt_jax.ops.fast_weight.api import inplace_ttt as inplace_ttt
from ttt_jax.ops.fast_weight.cost import Explanation as Explanation
from ttt_jax.ops.fast_weight.cost import explain as explain
from ttt_jax.ops.fast_weight.sharded import context_parallel as context_parallel
from ttt_jax.ops.fast_weight.targets import ntp_targets as ntp_targets
from ttt_jax.ops.update import Update as Update
from ttt_jax.ops.update import combine as combine

if TYPE_CHECKING:
  from ttt_jax.checkpoints.hf import load_pretrained as load_pretrained
  from ttt_jax.checkpoints.save import save_pretrained as save_pretrained
  from ttt_jax.checkpoints.tokenizer import Tokenizer as Tokenizer
  from ttt_jax.checkpoints.tokenizer import load_tokenizer as load_tokenizer
  from ttt_jax.config import AttentionConfig as AttentionConfig
  from ttt_jax.config import Config as Config
  from ttt_jax.config import ModelConfig as ModelConfig
  from ttt_jax.config import TTTConfig as TTTConfig
  from ttt_jax.generation.generate import Generation as Generation
  from ttt_jax.generation.generate import generate as generate
  from ttt_jax.generation.state import GenerationState as GenerationState
  from ttt_jax.generation.state import load_state as load_state
  from ttt_jax.nn.transformer import Transformer as Transformer

__version__ = "0.1.0"

__all__ = [
  "AttentionConfig",
  "Config",
  "Explanation",
  "FastWeightState",
  "FastWeightStats",
  "Generation",
  "GenerationState",
  "ModelConfig",
  "TTTConfig",
  "Tokenizer",
  "Transformer",
  "UnsupportedError",
  "Update",
  "UserError",
  "combine",
  "context_parallel",
  "exclusive_prefix",
  "explain",
  "generate",
  "inplace_ttt",
  "load_pretrained",
  "load_state",
  "load_tokenizer",
  "ntp_targets",
  "save_pretrained",
]

# Names that are imported when they are first used, by the module that has them.
_LAZY = {
  "AttentionConfig": "ttt_jax.config",
  "Config": "ttt_jax.config",
  "Generation": "ttt_jax.generation.generate",
  "GenerationState": "ttt_jax.generation.state",
  "ModelConfig": "ttt_jax.config",
  "TTTConfig": "ttt_jax.config",
  "Tokenizer": "ttt_jax.checkpoints.tokenizer",
  "Transformer": "ttt_jax.nn.transformer",
  "generate": "ttt_jax.generation.generate",
  "load_pretrained": "ttt_jax.checkpoints.hf",
  "load_state": "ttt_jax.generation.state",
  "load_tokenizer": "ttt_jax.checkpoints.tokenizer",
  "save_pretrained": "ttt_jax.checkpoints.save",
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_LAZY[name]), name)
