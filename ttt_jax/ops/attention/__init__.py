"""Attention over the shards of a sequence, and its kernels."""
