"""The tokens that a document begins and ends with.

A model learns to end a text from nothing but labels: without an end-of-text token behind each document it
is never told to stop. The token is the document's last one, of the same segment in a row, so that it is
the label of the last token of the text; what begins a text is the first one. Neither is there twice.
(A text that fills its last row to the end has the token in a row of its own, where it is no label.)
"""

from dataclasses import dataclass

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError


@dataclass(frozen=True)
class Boundaries:
  """The tokens around a document's own; None where there is none.

  Attributes:
    start: what it begins with.
    end: what is put behind it; None also where a tokenizer ends texts by itself and nothing is added.
    special: whether the tokenizer puts its own special tokens around a text; if not, only those behind
      it are put there, `suffix`.
  """

  start: int | None = None
  end: int | None = None
  special: bool = True
  suffix: tuple[int, ...] = ()

  def around(self, tokens: list[int]) -> list[int]:
    """The tokens of a document from those of its text, encoded with special tokens or without."""
    tokens = tokens if self.special else [*tokens, *self.suffix]
    before = [] if self.start is None or tokens[:1] == [self.start] else [self.start]
    behind = [] if self.end is None or tokens[-1:] == [self.end] else [self.end]
    return before + tokens + behind


def boundaries(
  tokenizer: Tokenizer | None,
  *,
  start_of_text: bool | None = None,
  end_of_text: bool | None = None,
  name: str | None = None,
) -> Boundaries:
  """The boundaries of documents by `data.start_of_text` and `data.end_of_text`.

  Args:
    tokenizer: None for bytes, which have no such tokens.
    start_of_text: None: as the tokenizer itself begins a text.
    end_of_text: None: wherever the tokenizer has a token for it. False: none is added to what the
      tokenizer itself makes.
    name: the tokenizer's, for messages.

  Raises:
    UserError: a token is asked for that the tokenizer does not have.
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
  """The tokens that begin and end a text, if the vocabulary has them: a model's config may name others."""
  if tokenizer is None:
    return None, None
  ids = (tokenizer.bos_id, tokenizer.eos_id)
  start, end = (i if i is not None and i < tokenizer.vocab_size else None for i in ids)
  return start, end
