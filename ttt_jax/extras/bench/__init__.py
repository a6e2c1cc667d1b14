"""Measures fast weights and generation."""
