"""What a run would take on accelerators that are not here: its programs, compiled ahead of time."""

from ttt_jax.plan.plan import Mode, Plan, plan

__all__ = ["Mode", "Plan", "plan"]
