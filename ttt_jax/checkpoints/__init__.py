"""Pretrained models in and out: Hugging Face directories, GGUF files, tokenizers.

`tensors.py` is the one table from a checkpoint's tensors to the model's parameters. `hf_config.py`,
`hf_rope.py` and `ttt_config.py` translate config.json, `gguf_keys.py` and `gguf_special.py` the metadata of
a GGUF file; `files.py` and `gguf.py` read bytes, `hf.py` and `save.py` stream them. `tokenizer.py`,
`added_tokens.py` and `gguf_tokenizer.py` make tokenizers. Nothing here executes code from a checkpoint.
"""
