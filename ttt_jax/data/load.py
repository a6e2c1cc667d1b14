"""Loads the documents of a run, tokenised for its model."""

from ttt_jax.checkpoints.tokenizer import load_tokenizer
from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, load_corpus
from ttt_jax.data.tokens import VOCAB_SIZE
from ttt_jax.errors import UserError


def load_data(config: Config) -> Corpus:
  """Loads the documents of a resolved config.

  That of a run that exists has passed `with_recorded_data`, so that its documents stay the same.

  Raises:
    UserError: the model's vocabulary is smaller than the tokenizer's; as `load_tokenizer` and
      `load_corpus`.
  """
  tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
  tokens = VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
  if tokens > config.model.vocab_size:
    raise UserError(
      f"model.vocab_size={config.model.vocab_size} is smaller than the vocabulary of "
      f"{config.tokenizer or 'bytes'}, {tokens} tokens: "
      + (
        f"set model.vocab_size={tokens}"
        if config.init_from is None
        else f"data.tokenizer is not the tokenizer of init_from={config.init_from!r}; leave it out"
      )
    )
  return load_corpus(config.data, seed=config.seed, tokenizer=tokenizer)
