"""Thin Flax NNX modules on top of `ttt_jax.ops` own parameters, call an op and return an array.

Modules are pytrees of `nnx.Param`; no forward pass changes one, so plain `jax.jit`, `jax.grad`,
`jax.lax.scan` and `jax.checkpoint` apply.
"""
