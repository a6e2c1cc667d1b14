"""A training run: its step, the loop around it, its directory and its log."""
