"""Whether learning while reading helps: evaluations that a user of any model can run again.

Loss by position, which `ttt-jax train` ends with, is `ttt_jax.evaluation.heldout`.
"""
