"""Evaluations with names of their own: RULER, and an adapter for the lm-evaluation-harness.

Loss by position, which `ttt-jax train` ends with, is `ttt_jax.evaluate`.
"""
