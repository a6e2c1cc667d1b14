"""Lists the names and values that the config, the data and the ops share; imports nothing.

A name of an algorithm stands here once: the config checks it, and the ops map it to their functions.
"""

RULES = ("sum", "least_squares")  # what a chunk reads of earlier ones, see `ttt_jax.inplace_ttt`
IMPLEMENTATIONS = ("associative", "dual", "sequential")  # of either rule
COLLECTIVES = ("all_gather", "doubling", "all_to_all", "ring")  # see `ttt_jax.exclusive_prefix`
ATTENTION_IMPLEMENTATIONS = ("xla", "splash", "cudnn")
IGNORE = -1  # the label of a token that has no successor in its document
