"""Makes tokenizers of several kinds, and files of questions, for the tests of RULER."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ttt_jax.checkpoints.tokenizer import Tokenizer, byte_tokenizer

_TEXT = [
  "One of the special magic numbers for dark-radiator is: 1234567.",
  "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.",
  "Answer the question based on the given documents. VAR ABCDE = 12345",
]


def word_pieces() -> Tokenizer:
  """Makes a byte-level BPE like GPT-2's: words keep their blank."""
  backend = tokenizers.Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return _trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def with_prefix() -> Tokenizer:
  """Makes a tokenizer like Llama 2's: it puts a special token and a blank before every text.

  A unit by itself therefore has more tokens than it has inside of a text.
  """
  backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<s>"))
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  tokenizer = _trained(backend, special_tokens=["<s>", *(f"<0x{i:02X}>" for i in range(256))])
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", 0)]
  )
  return tokenizer


def of_words() -> Tokenizer:
  """Makes a tokenizer with one token per word; most words are unknown."""
  backend = tokenizers.Tokenizer(models.WordLevel(unk_token="?"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.train_from_iterator(_TEXT, trainers.WordLevelTrainer(special_tokens=["?"]))
  return Tokenizer(backend)


def _trained(backend, **how) -> Tokenizer:
  backend.train_from_iterator(
    _TEXT, trainers.BpeTrainer(vocab_size=400, show_progress=False, **how)
  )
  return Tokenizer(backend)


TOKENIZERS = {
  "bytes": byte_tokenizer,
  "word pieces": word_pieces,
  "with a prefix": with_prefix,
  "of words": of_words,
}


def squad(articles: int = 6, paragraphs: int = 4) -> dict:
  """Makes questions in SQuAD's format, one of them impossible; every paragraph names its place."""

  def paragraph(a, p):
    place = f"{a}/{p}"
    return {
      "context": f"In house {place} lives Keeper {place}, who feeds many a cat. " * (1 + (a + p) % 3),
      "qas": [
        {"question": f"Who lives in {place}?", "answers": [{"text": f"Keeper {place}"}, {"text": place}]},
        {"question": "Why?", "is_impossible": True, "answers": []},
      ],
    }  # fmt: skip

  return {
    "data": [{"paragraphs": [paragraph(a, p) for p in range(paragraphs)]} for a in range(articles)]
  }


def hotpot(count: int = 5) -> list[dict]:
  """Makes questions in HotpotQA's format, each with two documents."""
  return [
    {
      "question": f"Whose cat is {i}?",
      "answer": f"Keeper {i}",
      "context": [[f"Cat {i}{part}", [f"It is {part}.", f" Keeper {i} has it."]] for part in "ab"],
    }
    for i in range(count)
  ]


def write(path, data):
  path.write_text(json.dumps(data))
  return path
