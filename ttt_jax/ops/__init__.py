"""Pure functions on arrays: the fast weights, their exchange between devices, targets and attention.

Nothing here knows Flax, a config class or a mesh; a mesh axis is only ever the name of an axis of an
enclosing `jax.shard_map`.
"""
