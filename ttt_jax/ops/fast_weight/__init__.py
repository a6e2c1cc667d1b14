"""Holds the fast weight: the op, its checks, implementations, targets, statistics, cost, reference."""
