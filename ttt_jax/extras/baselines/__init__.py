"""Registers linear recurrences that replace attention, as baselines for comparison."""

from ttt_jax.extras.baselines import layers as layers
