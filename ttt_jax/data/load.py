"""The documents of a run, in the tokens that its model reads."""

from ttt_jax.checkpoints.runs import as_begun
from ttt_jax.checkpoints.tokenizer import load_tokenizer
from ttt_jax.config import Config
from ttt_jax.data.corpus import Corpus, load_corpus
from ttt_jax.data.tokens import VOCAB_SIZE
from ttt_jax.errors import UserError


def load_data(config: Config) -> Corpus:
  """The documents of a resolved config, in the tokens that its model reads; those of a run, as it began.

  Raises:
    UserError: the model has not as many tokens as the tokenizer; as `load_tokenizer` and
      `load_corpus`.
  """
  config = as_begun(config)
  tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
  tokens = VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
  if tokens > config.model.vocab_size:
    raise UserError(
      f"model.vocab_size={config.model.vocab_size} is less than the {tokens} tokens of "
      f"{config.tokenizer or 'bytes'}: "
      + (
        f"set model.vocab_size={tokens}"
        if config.init_from is None
        else f"data.tokenizer is not that of init_from={config.init_from!r}"
      )
    )
  return load_corpus(config.data, seed=config.seed, tokenizer=tokenizer)
