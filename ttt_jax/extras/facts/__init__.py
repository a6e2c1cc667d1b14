"""Makes documents of made facts, and asks a model for facts that its attention cannot see any more."""
