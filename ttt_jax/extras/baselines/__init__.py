"""Linear recurrences in the place of attention, to compare with; importing this registers them."""

from ttt_jax.extras.baselines import layers as layers
