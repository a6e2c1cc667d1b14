"""Trains a model: the step, the loop around it, the run directory and the metrics."""
