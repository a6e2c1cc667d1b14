"""Drafts two counting tasks: the common words of a numbered list, the frequent words of a coded text."""

import math
from string import ascii_lowercase

import numpy as np

from ttt_jax.extras.ruler.materials import Materials
from ttt_jax.extras.ruler.sample import Draft, Draw
from ttt_jax.extras.ruler.words import all_words, compounds

COMMON_CONTEXT = (
  "Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
  "ones that appear most often.\n{context}\n"
)
COMMON_QUESTION = (
  "Question: What are the 10 most common words in the above list?\n\n"
  "Answer: The top 10 words that appear most often in the list are:"
)
FREQUENT_CONTEXT = (
  "Read the following coded text and track the frequency of each coded word. Find the three most "
  "frequently appeared coded words. {context}\n"
)
FREQUENT_QUESTION = (
  "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
  "frequently appeared words in the above coded text? Answer: According to the coded text above, the "
  "three most frequently appeared words are:"
)

_COMMON = 10  # words asked for
_LONG = 4096  # tokens of a sample, from which on words appear more often
_TOKENS_PER_ENTRY = 4  # at least, for most tokenizers: a number, a dot, and a word
_FREQUENT = 3  # words asked for
_LETTERS = 6  # of a coded word
_TOKENS_PER_CODE = 50  # a sample has one coded word per so many tokens
_ALPHA = 2.0  # rank k is drawn in proportion to k ** -_ALPHA
_ZETA = math.pi**2 / 6  # zeta(_ALPHA)
_LEAST_FREQUENT = 74  # words of a text, from which on rank 3 is more frequent than rank 4


def common_words(materials: Materials, draw: Draw, room: int) -> Draft:
  """Drafts a numbered list; a unit is a word, common or not.

  If the list needs more words than there are, `adjective-noun` compounds are added; the harness ends the
  list instead.
  """
  often, seldom = (30, 3) if draw.length >= _LONG else (6, 1)
  words = all_words().copy()
  draw("words").shuffle(words)
  enough = max(room // _TOKENS_PER_ENTRY // seldom, _COMMON) + 2
  added = _compounds(draw, max(0, enough - len(words)))
  words = words[:enough]
  word_tokens = materials.pieces([f" {word}" for word in words])
  added_tokens = materials.counter.parts([f" {word}" for word in added])
  words, word_tokens = [*words, *added], np.concatenate([word_tokens, added_tokens])
  repeats = np.where(np.arange(len(words)) < _COMMON, often, seldom)
  listed = np.concatenate([[0], np.cumsum(repeats)])
  tokens = np.concatenate([[0], np.cumsum(repeats * word_tokens)])
  tokens += materials.number_tokens(int(listed[-1]))[listed]

  def make(n: int):
    entries = [word for word, times in zip(words[:n], repeats.tolist()) for _ in range(times)]
    draw("order").shuffle(entries)
    document = " ".join([f"{i}. {word}" for i, word in enumerate(entries, 1)])
    return draw.sample(COMMON_CONTEXT.format(context=document), COMMON_QUESTION, words[:_COMMON])

  return Draft(make, _COMMON + 1, tokens)


def _compounds(draw: Draw, count: int) -> list[str]:
  adjectives, nouns = compounds()
  places = draw("compounds").sample(range(len(adjectives) * len(nouns)), count)
  return [f"{adjectives[i // len(nouns)]}-{nouns[i % len(nouns)]}" for i in places]


def frequent_words(materials: Materials, draw: Draw, room: int) -> Draft:
  """Drafts n words, floor(n k^-2 / zeta(2)) of them of rank k: dots first, then the three asked for.

  Here the harness leaves no room for the answer: its prompts have the whole length.
  """
  vocabulary = ["...", *_codes(draw, max(_COMMON, draw.length // _TOKENS_PER_CODE) - 1)]
  share = np.arange(1, len(vocabulary) + 1) ** -_ALPHA / _ZETA
  most = max(room, _LEAST_FREQUENT) + 1
  cost = materials.counter.parts([f" {word}" for word in vocabulary])
  tokens = _frequent_tokens(share, cost, most)

  def make(n: int):
    counts = (n * share).astype(int).tolist()
    words = [word for word, times in zip(vocabulary, counts) for _ in range(times)]
    draw("order").shuffle(words)
    return draw.sample(
      FREQUENT_CONTEXT.format(context=" ".join(words)),
      FREQUENT_QUESTION,
      vocabulary[1 : 1 + _FREQUENT],
    )

  return Draft(make, _LEAST_FREQUENT, tokens)


def _codes(draw: Draw, count: int) -> list[str]:
  rng, codes = draw("codes"), {}
  while len(codes) < count:
    codes["".join(rng.choices(ascii_lowercase, k=_LETTERS))] = None
  return list(codes)


def _frequent_tokens(share, cost, most: int):
  """Returns entry n = sum over k of floor(n share[k]) cost[k], from the n where each word is repeated."""
  counts = (most * share).astype(int)
  first = np.concatenate([[0], np.cumsum(counts)])
  nth = np.arange(first[-1]) - np.repeat(first[:-1], counts) + 1
  first_n = np.ceil(nth / np.repeat(share, counts) - 1e-9).astype(int)
  added = np.bincount(first_n, weights=np.repeat(cost, counts), minlength=most + 1)
  return np.cumsum(added[: most + 1]).astype(np.int64)
