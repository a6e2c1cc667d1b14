"""The fast weight: meaning and checks, its implementations, targets, statistics, cost and oracle."""
