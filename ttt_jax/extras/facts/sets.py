"""Holds the words of made facts: kinds of facts, their templates and answers, and whom they are about.

Three sets have no template, name or answer in common: "training" to learn from, "calibration" to choose
with, "evaluation" to report. None of them has a template of RULER's.
"""

import dataclasses
import random
from collections.abc import Sequence

from ttt_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Kind:
  """Holds a kind of fact: its templates, which end before the answer, and the answers or their digits.

  Each of an answer's random digits is a question of its own.
  """

  name: str
  templates: tuple[str, ...]
  answers: tuple[str, ...] | int


@dataclasses.dataclass(frozen=True)
class Fact:
  """Holds a fact: the sentence up to its answer, the answer with the space before it, and its kind."""

  prefix: str
  answer: str
  kind: str

  @property
  def text(self) -> str:
    """Returns the whole sentence and the end of its line."""
    return f"{self.prefix}{self.answer}.\n"


@dataclasses.dataclass(frozen=True)
class FactSet:
  """Holds kinds of facts and those whom they are about."""

  kinds: tuple[Kind, ...]
  subjects: tuple[str, ...]

  def draw(self, rng: random.Random, count: int, kinds: Sequence[str] | None = None) -> list[Fact]:
    """Draws `count` facts, no two about the same subject with the same kind.

    Raises:
      UserError: more facts than there are, or a kind that there is not.
    """
    chosen = [kind for kind in self.kinds if kinds is None or kind.name in kinds]
    unknown = set(kinds or ()) - {kind.name for kind in self.kinds}
    if unknown or not chosen:
      names = ", ".join(kind.name for kind in self.kinds)
      raise UserError(f"facts.kinds={list(kinds or ())} are not all of {names}")
    if count > len(chosen) * len(self.subjects):
      raise UserError(
        f"facts.count={count}, but there are {len(chosen)} kinds for each of {len(self.subjects)} names: "
        f"ask for at most {len(chosen) * len(self.subjects)}"
      )
    pairs = rng.sample([(kind, subject) for kind in chosen for subject in self.subjects], count)
    return [_fact(rng, kind, subject) for kind, subject in pairs]


def _fact(rng: random.Random, kind: Kind, subject: str) -> Fact:
  if isinstance(kind.answers, int):
    answer = "".join(rng.choice("0123456789") for _ in range(kind.answers))
  else:
    answer = rng.choice(kind.answers)
  prefix = rng.choice(kind.templates).format(subject=subject)
  return Fact(prefix, f" {answer}", kind.name)


def _words(text: str) -> tuple[str, ...]:
  return tuple(text.split())


# Subjects of the set "training": names that no text has, and ordinary things.
_BEGINNINGS = "Bal Cor Dra Fen Gal Hes Jor Kel Lum Mor Nev Ost Pel Quil Ras Sim Tor Ulm Ves Wol Yor"
_ENDINGS = (
  "abin aldo ander beth cott dale eron fur gast horn idge kin lund mere nock oway pool rick stow"
)


def _made_up_names() -> tuple[str, ...]:
  return tuple(begin + end for begin in _words(_BEGINNINGS) for end in _words(_ENDINGS))


_THINGS = tuple(
  f"the {adjective} {noun}"
  for adjective in _words(
    "old new small heavy broken narrow wooden famous hidden northern round cheap"
  )
  for noun in _words(
    "bridge ladder anchor basket candle mirror pillow hammer lantern kettle statue fountain barrel "
    "compass saddle violinist blanket curtain drawer engine feather glacier helmet island jacket"
  )
)


def fact_set(name: str) -> FactSet:
  """Returns a set by its name.

  Raises:
    UserError: there is no such set.
  """
  if name not in SETS:
    raise UserError(f"facts.set={name!r} is not one of {', '.join(SETS)}")
  return SETS[name]


SETS = {
  "training": FactSet(
    kinds=(
      Kind(
        "register",
        (
          "The register lists {subject} under",
          "In the register {subject} stands under",
          "Look for {subject} under entry",
        ),
        6,
      ),
      Kind(
        "founded",
        ("The year of {subject} is", "{subject} dates from", "All began for {subject} in"),
        4,
      ),
      Kind(
        "weight",
        (
          "The weight of {subject} in pounds is",
          "On the scales {subject} shows",
        ),
        3,
      ),
      Kind(
        "account", ("The account of {subject} has the number", "Pay for {subject} into account"), 7
      ),
      Kind(
        "ticket", ("The ticket for {subject} carries the digits", "{subject} goes with ticket"), 5
      ),
      Kind("telephone", ("To reach {subject} dial", "The extension of {subject} is"), 4),
      Kind("serial", ("The serial of {subject} reads", "Stamped on {subject} one finds"), 8),
      Kind(
        "metal",
        ("The metal of {subject} is", "{subject} contains mostly", "One melts {subject} to get"),
        _words(
          "iron copper tin zinc lead nickel chrome titanium aluminum brass steel bronze mercury"
        ),
      ),
      Kind(
        "trade",
        (
          "The trade behind {subject} is that of a",
          "Whoever made {subject} was a",
          "Ask about {subject} the",
        ),
        _words(
          "baker carpenter tailor sailor farmer painter lawyer nurse pilot butcher miner judge poet"
        ),
      ),
      Kind(
        "month",
        ("The month of {subject} is", "{subject} always comes in", "They open {subject} in"),
        _words(
          "January February March April May June July August September October November December"
        ),
      ),
      Kind(
        "country",
        (
          "The origin of {subject} lies in",
          "{subject} is shipped to",
          "Most of {subject} is found in",
        ),
        _words(
          "France Spain Japan Brazil Canada Mexico Norway Sweden Egypt India China Kenya Peru Chile Turkey "
          "Poland Greece Ireland Portugal Hungary"
        ),
      ),
      Kind(
        "drink",
        ("The drink served with {subject} is", "With {subject} one orders", "{subject} smells of"),
        _words("tea coffee milk beer wine cider water juice rum brandy"),
      ),
      Kind(
        "vehicle",
        (
          "The usual transport for {subject} is the",
          "{subject} arrives by",
          "They move {subject} with a",
        ),
        _words("train bus truck boat plane tram cart sled ferry bicycle taxi wagon"),
      ),
      Kind(
        "sport",
        (
          "The sport named with {subject} is",
          "For {subject} the team plays",
          "{subject} reminds me of",
        ),
        _words(
          "tennis golf hockey football baseball cricket rugby boxing skiing rowing chess fencing"
        ),
      ),
      Kind(
        "language",
        (
          "The language around {subject} is",
          "All signs at {subject} are in",
          "{subject} was written in",
        ),
        _words(
          "Latin German Russian Arabic Hebrew Dutch Danish Korean Turkish Polish Italian Hindi"
        ),
      ),
      Kind(
        "room",
        (
          "The right place for {subject} is the",
          "I have left {subject} in the",
          "You find {subject} in the",
        ),
        _words(
          "kitchen garage attic cellar library bedroom bathroom hall office stable tower chapel"
        ),
      ),
      Kind(
        "mood",
        (
          "The mood about {subject} was",
          "People call {subject}",
          "After all these years {subject} is",
        ),
        _words("happy angry sad proud calm nervous tired curious bitter hopeful bored afraid"),
      ),
      Kind(
        "position",
        ("The rank of {subject} is", "In the list {subject} comes", "{subject} finished"),
        _words("first second third fourth fifth sixth seventh eighth ninth tenth last"),
      ),
    ),
    subjects=(*_made_up_names(), *_THINGS),
  ),
  "calibration": FactSet(
    kinds=(
      Kind(
        "badge",
        (
          "The badge number of Doctor {subject} is",
          "Doctor {subject} has badge number",
          "Doctor {subject} wears a badge with the number",
        ),
        5,
      ),
      Kind(
        "instrument",
        (
          "The instrument of Doctor {subject} is the",
          "Doctor {subject} plays the",
          "In the evening Doctor {subject} practises the",
        ),
        _words("piano violin guitar flute trumpet cello harp drum organ banjo accordion clarinet"),
      ),
      Kind(
        "animal",
        (
          "The pet of Doctor {subject} is a",
          "Doctor {subject} keeps a",
          "The only animal that Doctor {subject} likes is the",
        ),
        _words("horse rabbit parrot snake turtle goat duck mouse sheep frog spider monkey"),
      ),
      Kind(
        "weekday",
        (
          "The free day of Doctor {subject} is",
          "Doctor {subject} is away on",
          "The office of Doctor {subject} is closed on",
        ),
        _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
      ),
    ),
    subjects=_words(
      "Abbott Barnes Carver Dalton Ellison Fletcher Garner Hobbs Irving Jenkins Keller Lambert "
      "Mercer Norris Osborne Parsons Quincy Ramsey Sawyer Thornton Underwood Vaughn Whitaker Yates "
      "Ziegler Benson Crawford Dixon Everett Finch Goodwin Harmon Ingram Joyner Kirby Lawson Maddox "
      "Newell Oakley Porter Randall Shepard Tanner Upton Vance Waller Yardley Zimmer Atwood Bradshaw"
    ),
  ),
  "evaluation": FactSet(
    kinds=(
      Kind(
        "locker",
        (
          "The locker code of {subject} is",
          "{subject} opens the locker with",
          "The secret number that {subject} remembers is",
        ),
        5,
      ),
      Kind(
        "city",
        (
          "The home town of {subject} is",
          "{subject} was born in",
          "Every summer {subject} travels to",
        ),
        _words(
          "Paris London Berlin Madrid Rome Vienna Boston Chicago Dallas Denver Tokyo Sydney Toronto "
          "Dublin Lisbon Athens Oslo Cairo Moscow Delhi"
        ),
      ),
      Kind(
        "color",
        (
          "The favorite color of {subject} is",
          "{subject} likes everything that is",
          "The front door of {subject} is painted",
        ),
        _words("red blue green yellow white black brown orange purple pink gray silver"),
      ),
      Kind(
        "fruit",
        (
          "The favorite fruit of {subject} is the",
          "{subject} always buys a",
          "The tree in the garden of {subject} is a",
        ),
        _words("lemon peach cherry plum pear mango fig olive walnut banana apricot chestnut"),
      ),
    ),
    subjects=_words(
      "Anna Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Louis Maria Nathan Olivia "
      "Peter Rachel Simon Teresa Victor Wendy Xavier Yvonne Zachary Alice Bruno Cecilia Daniel "
      "Esther Frank Gloria Hugo Isabel Julian Kate Leo Monica Nicholas Oscar Paula Robert Sarah "
      "Thomas Ursula Vincent Walter Agnes Bernard Charlotte Edward"
    ),
  ),
}
