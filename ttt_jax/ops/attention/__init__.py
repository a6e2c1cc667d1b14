"""Computes attention over the shards of a sequence, with several kernels."""
