"""Exchanges fast-weight updates between the shards of a sequence."""
