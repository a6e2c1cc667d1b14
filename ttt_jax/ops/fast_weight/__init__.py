"""The fast weight: the public op, its checks and implementations, targets, statistics, cost, reference."""
