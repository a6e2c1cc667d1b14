"""ttt_jax: language models that learn while they read.

In-Place Test-Time Training (Feng et al., ICLR 2026, arXiv 2604.06169) in JAX: the down projections of
gated MLPs become fast weights, updated chunk by chunk along the sequence. The ops are pure functions
on arrays and run on a sequence split over devices inside `jax.shard_map`.
"""

from ttt_jax.context_parallel import context_parallel as context_parallel
from ttt_jax.ops.context import exclusive_prefix as exclusive_prefix
from ttt_jax.ops.cost import explain as explain
from ttt_jax.ops.fast_weight import FastWeightState as FastWeightState
from ttt_jax.ops.fast_weight import FastWeightStats as FastWeightStats
from ttt_jax.ops.fast_weight import inplace_ttt as inplace_ttt
from ttt_jax.ops.target import ntp_targets as ntp_targets
from ttt_jax.ops.update import Update as Update
from ttt_jax.ops.update import combine as combine

__all__ = [
  "FastWeightState",
  "FastWeightStats",
  "Update",
  "combine",
  "context_parallel",
  "exclusive_prefix",
  "explain",
  "inplace_ttt",
  "ntp_targets",
]
