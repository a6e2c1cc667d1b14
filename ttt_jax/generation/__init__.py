"""Text from a model whose fast weights learn on: prompts, sampling, streaming, saved states."""
