"""Questions asked of the method: a grid of runs that differ in a few fields, a table, a picture."""

from ttt_jax.extras.ablation.grid import Ablation, Variant, load_ablation

__all__ = ["Ablation", "Variant", "load_ablation"]
