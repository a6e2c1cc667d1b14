"""Makes rows and documents of made facts: what a reader can only know if it remembers the text.

A row states facts, between prose if there is any, and states them again in another order. The answer of a
fact ends its sentence, so that every answer of the second half is a question to the first. Documents for
training state their facts several times in the same way.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from ttt_jax.errors import UserError
from ttt_jax.extras.facts.sets import Fact, fact_set
from ttt_jax.files import write_text

_FILE = "facts.jsonl"


@dataclasses.dataclass(frozen=True)
class FactRow:
  """Holds a row of two halves of equal length: facts, and the same facts in another order.

  Attributes:
    tokens: of both halves, filled up with `filling`.
    cut: where the second half begins.
    answers: the places of the answers' tokens in the second half.
    firsts: those of them that begin an answer.
    kinds: the kind of each place in `answers`.
  """

  tokens: tuple[int, ...]
  cut: int
  answers: tuple[int, ...]
  firsts: tuple[int, ...]
  kinds: tuple[str, ...]


def make_row(
  facts: Sequence[Fact],
  encode: Callable[[str], list[int]],
  *,
  half: int,
  rng: random.Random,
  prose: Sequence[int] = (),
) -> FactRow:
  """Returns a row of `2 half` tokens.

  Args:
    facts: those that the row states.
    encode: a tokenizer's, without the tokens that it puts around a text.
    half: tokens of each half; what the facts leave of it is prose before and between them.
    rng: for the order of the second half and where the prose goes.
    prose: tokens of ordinary text, at least `2 half`, of which a part goes between the facts of each half;
      empty: lines without text fill the row up.

  Raises:
    UserError: the facts do not fit.
  """
  pieces = [(encode(fact.prefix), encode(fact.answer), encode(".\n")) for fact in facts]
  used = sum(len(part) for piece in pieces for part in piece)
  if used > half:
    raise UserError(
      f"facts.count={len(facts)} facts are {used} tokens, more than half of the row, {half}: ask for "
      "fewer, or for longer rows"
    )
  if prose and len(prose) < 2 * half:
    raise UserError(f"prose has {len(prose)} tokens, a row with facts needs {2 * half}")
  newline = encode("\n")
  tokens, answers, firsts, kinds = [], [], [], []
  order = list(range(len(facts)))
  for part in range(2):
    filling = list(prose[part * half : (part + 1) * half]) if prose else newline * half
    cuts = sorted(rng.randrange(half - used + 1) for _ in order) if prose else [0] * len(order)
    begin = 0
    for place, index in zip(cuts, order, strict=True):
      prefix, answer, end = pieces[index]
      tokens += filling[begin:place]
      begin = place
      start = len(tokens) + len(prefix)
      tokens += [*prefix, *answer, *end]
      if part == 1:
        places = range(start, start + len(answer))
        answers += places
        kinds += [facts[index].kind] * len(answer)
        firsts.append(start)
    tokens += filling[begin : half - used]
    rng.shuffle(order)
  return FactRow(tuple(tokens), half, tuple(answers), tuple(firsts), tuple(kinds))


def make_rows(
  name: str,
  encode: Callable[[str], list[int]],
  *,
  rows: int,
  facts: int,
  half: int,
  seed: int,
  prose: Sequence[int] = (),
  kinds: Sequence[str] | None = None,
) -> list[FactRow]:
  """Makes rows with facts of a set, each with its own facts and, if there is prose, its own part of it.

  Args:
    name: a set of `ttt_jax.extras.facts.sets`.
    rows, facts: rows, and facts in each.
    seed: of facts, their order and the places in the prose.
    kinds: names of kinds; None for all.

  Raises:
    UserError: too many facts, or too little prose.
  """
  facts_of = fact_set(name)
  if prose and len(prose) < 2 * half:
    raise UserError(f"the text has {len(prose)} tokens, a row with facts in it needs {2 * half}")
  rng, made = random.Random(seed), []
  for _ in range(rows):
    drawn = facts_of.draw(rng, facts, kinds)
    start = rng.randrange(len(prose) - 2 * half + 1) if prose else 0
    text = prose[start : start + 2 * half]
    made.append(make_row(drawn, encode, half=half, rng=rng, prose=text))
  return made


@dataclasses.dataclass(frozen=True)
class FactDocuments:
  """Configures documents of facts.

  Attributes:
    documents: how many.
    facts: the least and the largest number of facts of a document.
    parts: how often a document states its facts; all but the first ask for what the first says.
    characters: of prose in a part, between the facts; 0 for none.
    seed: of facts, their order and the prose.
  """

  documents: int = 1000
  facts: tuple[int, int] = (4, 14)
  parts: int = 2
  characters: int = 1200
  seed: int = 0

  def __post_init__(self):
    for name in ("documents", "parts"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be positive")
    if self.characters < 0:
      raise UserError(f"characters={self.characters} must not be negative")
    low, high = self.facts
    if not 0 < low <= high:
      raise UserError(f"facts={list(self.facts)} must be two numbers, the least and the largest")


def make_document(config: FactDocuments, index: int, lines: Sequence[str] = ()) -> str:
  """Makes document `index`: parts of prose, each with all facts in an order of its own.

  Args:
    config: the sizes and the seed.
    index: of the document, which its facts depend on.
    lines: of prose; empty if `config.characters` is 0.
  """
  rng = random.Random(f"{config.seed} {index}")
  facts = fact_set("training").draw(rng, rng.randint(*config.facts))
  place, text = rng.randrange(max(1, len(lines))), []
  for _ in range(config.parts):
    part, characters = [], 0
    while characters < config.characters:
      part.append(lines[place])
      characters += len(part[-1])
      place = (place + 1) % len(lines)
    for fact in rng.sample(facts, len(facts)):
      part.insert(rng.randint(0, len(part)), fact.text)
    text += part
  return "".join(text)


def write_documents(
  directory: str | Path, config: FactDocuments | None = None, *, prose: str = ""
) -> Path:
  """Writes documents for `data.path` to `facts.jsonl` in a directory, which must not have one.

  Raises:
    UserError: the prose is missing or shorter than a document's, a set has too few facts, or the file
      exists.
  """
  config = FactDocuments() if config is None else config
  path = Path(directory) / _FILE
  if path.exists():
    raise UserError(f"{path} is there already: delete it, or name another directory")
  needed = config.parts * config.characters
  lines = [line + "\n" for line in prose.split("\n")] if needed else []
  if len(prose) < needed:
    raise UserError(
      f"the text has {len(prose)} characters, parts={config.parts} of characters={config.characters} need "
      f"{needed}: give a longer text, or --characters 0 for facts without prose"
    )
  documents = (make_document(config, index, lines) for index in range(config.documents))
  text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, text)
  return path


def help_topics() -> str:
  """Returns the topics of Python's own help: ordinary prose that every installation has."""
  from pydoc_data.topics import topics

  return "\n\n".join(topics[name] for name in sorted(topics))
