"""Turns files into documents of tokens, and documents into packed training rows and held-out rows.

    files -> formats -> tokens -> corpus -> rows      text, tokenised when a run starts
    files -> formats -> tokens -> preparation         text, tokenised once (`ttt-jax data prepare`)
                        prepared -> corpus -> rows    prepared tokens, loaded when they are needed

All arrays here are NumPy arrays on the host.
"""

from ttt_jax.data.corpus import (
  Corpus,
  Document,
  Documents,
  InMemory,
  Source,
  heldout_rows,
  load_corpus,
)
from ttt_jax.data.preparation import prepare
from ttt_jax.data.rows import Rows, merge_states, training_rows
from ttt_jax.data.tokens import VOCAB_SIZE, decode, encode
from ttt_jax.names import IGNORE

__all__ = [
  "IGNORE",
  "VOCAB_SIZE",
  "Corpus",
  "Document",
  "Documents",
  "InMemory",
  "Rows",
  "Source",
  "decode",
  "encode",
  "heldout_rows",
  "load_corpus",
  "merge_states",
  "prepare",
  "training_rows",
]
