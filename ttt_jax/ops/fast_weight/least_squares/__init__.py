"""The second rule of the fast weight: what a chunk reads is a ridge regression on the chunks before it."""
