"""Benchmarks of fast weights and of generation."""
