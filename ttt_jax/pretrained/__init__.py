"""Pretrained models in and out: Hugging Face directories, GGUF files, tokenizers.

`tensors.py` is the one table from a checkpoint's tensors to the model's parameters, `hf_config.py` and
`ttt_config.py` translate config.json; `files.py` and `gguf.py` read bytes, `load.py` and `save.py` stream
them. Nothing here executes code from a checkpoint.
"""
