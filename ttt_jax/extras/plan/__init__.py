"""What a run would take on accelerators that are not here: its programs, compiled ahead of time."""

from ttt_jax.extras.plan.planner import Mode, Plan, plan

__all__ = ["Mode", "Plan", "plan"]
