"""Holds the second rule of the fast weight: a chunk reads a ridge regression on the chunks before it."""
