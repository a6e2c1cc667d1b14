"""The words that RULER draws from, of the package `wonderwords`."""

from functools import cache

from ttt_jax.errors import UserError


@cache
def word_lists() -> dict[str, list[str]]:
  """Nouns, adjectives and verbs.

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
  return sorted({word for words in word_lists().values() for word in words})


@cache
def compounds() -> tuple[list[str], list[str]]:
  """Adjectives and nouns without repetition; `adjective-noun` are the keys of needles."""
  lists = word_lists()
  return sorted(set(lists["adjective"])), sorted(set(lists["noun"]))
