"""Lists the thirteen tasks by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ttt_jax.errors import UserError
from ttt_jax.extras.ruler import counting, qa, tracking
from ttt_jax.extras.ruler.materials import Materials
from ttt_jax.extras.ruler.niah import Needles
from ttt_jax.extras.ruler.sample import Draft, Draw, string_match_all, string_match_part


@dataclass(frozen=True)
class Task:
  """Makes and scores the samples of a task.

  Attributes:
    draft: makes a draft from the materials, the random numbers, and the tokens for the document.
    new_tokens: the largest number of tokens of the answer.
    score: scores an answer by the strings expected in it.
  """

  draft: Callable[[Materials, Draw, int], Draft]
  new_tokens: int
  score: Callable[[str, Sequence[str]], float] = string_match_all


def _needles(haystack: str, **options) -> Task:
  return Task(Needles(haystack, **options).draft, new_tokens=128)


def _questions(name: str) -> Task:
  def draft(materials: Materials, draw: Draw, room: int) -> Draft:
    return qa.draft(materials.questions(name), draw)

  return Task(draft, new_tokens=32, score=string_match_part)


TASKS = {
  "niah_single_1": _needles("repeat"),
  "niah_single_2": _needles("essay"),
  "niah_single_3": _needles("essay", values="uuids"),
  "niah_multikey_1": _needles("essay", num_keys=4),
  "niah_multikey_2": _needles("needle"),
  "niah_multikey_3": _needles("needle", keys="uuids", values="uuids"),
  "niah_multivalue": _needles("essay", num_values=4),
  "niah_multiquery": _needles("essay", num_keys=4, num_queries=4),
  "ruler_vt": Task(tracking.draft, tracking.NEW_TOKENS),
  "ruler_cwe": Task(counting.common_words, new_tokens=120),
  "ruler_fwe": Task(counting.frequent_words, new_tokens=50),
  "ruler_qa_squad": _questions("squad"),
  "ruler_qa_hotpot": _questions("hotpot"),
}


def task_named(name: str) -> Task:
  """Returns a task; raises UserError, with all names, if the name is unknown."""
  if name not in TASKS:
    raise UserError(f"there is no RULER task {name!r}; there are {', '.join(TASKS)}")
  return TASKS[name]
