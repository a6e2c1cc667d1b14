"""Trains a grid of runs that differ in a few fields, and reports a table and a picture."""

from ttt_jax.extras.ablation.grid import Ablation, Variant, load_ablation

__all__ = ["Ablation", "Variant", "load_ablation"]
