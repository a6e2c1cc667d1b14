"""Holds pure functions on arrays: fast weights, their exchange between devices, targets and attention.

The ops know no Flax, config or mesh: a mesh axis is the name of an axis of an enclosing `jax.shard_map`.
"""
