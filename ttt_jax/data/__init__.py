"""Text as tokens: files to documents, documents to packed training rows and to held-out rows.

    files -> formats -> tokens -> corpus -> rows      text, tokenised when a run starts
    files -> formats -> tokens -> preparation         text, tokenised once (`ttt-jax data prepare`)
                        prepared -> corpus -> rows    its tokens, read where they are needed

Host side only: arrays here are NumPy's, and nothing is put on a device.
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
from ttt_jax.data.tokens import IGNORE, VOCAB_SIZE, decode, encode

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
