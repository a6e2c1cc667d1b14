"""Loads the words that RULER draws from, out of the package `wonderwords`."""

from functools import cache

from ttt_jax.errors import UserError


@cache
def word_lists() -> dict[str, list[str]]:
  """Returns nouns, adjectives and verbs.

  Raises:
    UserError: `wonderwords` is not installed.
  """
  try:
    import wonderwords
  except ModuleNotFoundError as error:
    raise UserError(
      "RULER draws its words from the package wonderwords: pip install 'ttt_jax[eval]'"
    ) from error
  lists = wonderwords.RandomWord()._categories
  return {kind: list(lists[kind]) for kind in ("noun", "adjective", "verb")}


@cache
def all_words() -> list[str]:
  """Returns all words in order, each once."""
  return sorted({word for words in word_lists().values() for word in words})


@cache
def compounds() -> tuple[list[str], list[str]]:
  """Returns adjectives and nouns, each once; the keys of needles are `adjective-noun`."""
  lists = word_lists()
  return sorted(set(lists["adjective"])), sorted(set(lists["noun"]))
