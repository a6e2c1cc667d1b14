"""Measures without a model how many bits of a text its distant past saves."""
