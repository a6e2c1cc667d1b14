"""Adds the tokens with which a document begins and ends.

A model learns to stop only from labels, so each document needs an end-of-text token. It is the last token
of the document's segment, and so the label of the last token of the text; the start-of-text token is its
first. Neither token is added twice. (If a text fills its last row, the end-of-text token is alone in
another row, where it is no label.)
"""

from dataclasses import dataclass

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError


@dataclass(frozen=True)
class Boundaries:
  """Holds the tokens to put around the tokens of a document.

  Attributes:
    start: the first token of a document; None adds no token.
    end: the last token of a document; None adds no token, though the tokenizer may end texts by itself.
    special: whether the tokenizer puts its own special tokens around a text; if not, only its suffix is
      added.
    suffix: the tokens that the tokenizer puts after a text.
  """

  start: int | None = None
  end: int | None = None
  special: bool = True
  suffix: tuple[int, ...] = ()

  def add_to(self, tokens: list[int]) -> list[int]:
    """Returns the tokens of a document from the tokens of its text, encoded as `special` says."""
    tokens = tokens if self.special else [*tokens, *self.suffix]
    before = [] if self.start is None or tokens[:1] == [self.start] else [self.start]
    after = [] if self.end is None or tokens[-1:] == [self.end] else [self.end]
    return before + tokens + after


def boundaries(
  tokenizer: Tokenizer | None,
  *,
  start_of_text: bool | None = None,
  end_of_text: bool | None = None,
  name: str | None = None,
) -> Boundaries:
  """Returns the boundaries of documents for `data.start_of_text` and `data.end_of_text`.

  Args:
    tokenizer: None for bytes, which have no such tokens.
    start_of_text: None: texts begin as the tokenizer itself begins them.
    end_of_text: None: true if the tokenizer has an end-of-text token. False: no token is added to those of
      the tokenizer itself.
    name: the tokenizer's name, for messages.

  Raises:
    UserError: the tokenizer lacks a requested token.
  """
  bos, eos = special_ids(tokenizer)
  for field, asked, token, kind in (
    ("start_of_text", start_of_text, bos, "bos_token"),
    ("end_of_text", end_of_text, eos, "eos_token"),
  ):
    if asked and token is None:
      whose = "bytes have" if tokenizer is None else f"the tokenizer {name!r} has"
      raise UserError(
        f"data.{field}=true, but {whose} no {field.replace('_', '-')} token: name its {kind} in "
        f"tokenizer_config.json, give another data.tokenizer, or leave data.{field} out"
      )
  prefix, suffix = ((), ()) if tokenizer is None else (tokenizer.prefix, tokenizer.suffix)
  return Boundaries(
    start={None: next(iter(prefix), None), True: bos, False: None}[start_of_text],
    end=None if end_of_text is False else eos,
    special=start_of_text is not False,
    suffix=suffix,
  )


def special_ids(tokenizer: Tokenizer | None) -> tuple[int | None, int | None]:
  """Returns the tokens that begin and end a text; None for ids outside of the tokenizer's vocabulary."""
  if tokenizer is None:
    return None, None
  ids = (tokenizer.bos_id, tokenizer.eos_id)
  start, end = (i if i is not None and i < tokenizer.vocab_size else None for i in ids)
  return start, end
