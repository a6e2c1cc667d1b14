"""Plans a run for a TPU slice that is not here: compiles its programs ahead of time."""

from ttt_jax.extras.plan.planner import Mode, Plan, plan

__all__ = ["Mode", "Plan", "plan"]
