"""Loads and saves models: Hugging Face directories, GGUF files, checkpoints of runs, tokenizers.

`tensors.py` holds the one table that maps a checkpoint's tensors to the model's parameters. `hf_config.py`,
`hf_rope.py` and `ttt_config.py` translate config.json, `gguf_keys.py` and `gguf_special.py` the metadata of
a GGUF file. `files.py` and `gguf.py` read bytes; `hf.py` loads and `save.py` saves them tensor by tensor.
`tokenizer.py`, `added_tokens.py` and `gguf_tokenizer.py` make tokenizers; `orbax.py` and `runs.py` handle
the checkpoints of runs. No module here executes code from a checkpoint.
"""
