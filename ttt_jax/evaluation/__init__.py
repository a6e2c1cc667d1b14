"""Evaluates whether learning while reading helps, for any model.

`ttt_jax.evaluation.heldout` computes the loss by position that `ttt-jax train` reports at its end.
"""
