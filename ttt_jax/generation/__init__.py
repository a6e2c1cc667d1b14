"""Generates text while fast weights keep learning: prefill, sampling, streaming, saved states."""
