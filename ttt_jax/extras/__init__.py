"""Holds what training, evaluation and generation do not need; only the command line imports it."""
