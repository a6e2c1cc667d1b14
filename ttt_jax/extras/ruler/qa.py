"""Drafts question answering: the paragraphs with the answer stand among others of the same file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ttt_jax.errors import UserError
from ttt_jax.extras.ruler.fit import TokenCounter
from ttt_jax.extras.ruler.sample import Draft, Draw

CONTEXT = (
  "Answer the question based on the given documents. Only give me the answer and do not output any other "
  "words.\n\nThe following are given documents.\n\n{context}\n\n"
)
QUESTION = (
  "Answer the question based on the given documents. Only give me the answer and do not output any other "
  "words.\n\nQuestion: {question} Answer:"
)
DOCUMENT = "Document {number}:\n{document}"


@dataclass(frozen=True)
class Question:
  """Holds a question, its answers, the documents with the answers, and related documents."""

  text: str
  answers: tuple[str, ...]
  documents: tuple[int, ...]
  related: tuple[int, ...]


class Questions:
  """Loads the questions that have answers, and the documents, of a SQuAD or HotpotQA file.

  Raises:
    UserError: the file does not exist, is no JSON, lacks a field, or has no question with an answer.
  """

  def __init__(self, path: str | Path, counter: TokenCounter):
    self.path = Path(path)
    data = _load(self.path)
    parse = _squad if isinstance(data, dict) else _hotpot
    questions, documents = parse(partial(_field, self.path), data)
    if not questions:
      raise UserError(f"{self.path} has no question that has an answer")
    self.documents = sorted(set(documents))
    number = {document: i for i, document in enumerate(self.documents)}
    self.questions = [
      Question(
        text,
        tuple(answers),
        tuple(number[d] for d in gold),
        tuple(dict.fromkeys(number[d] for d in related if d not in gold)),
      )
      for text, answers, gold, related in questions
    ]
    self._tokens = counter.parts(self.documents)
    headers = ["\n\n" + DOCUMENT.format(number=i + 1, document="") for i in number.values()]
    self._headers = np.cumsum(counter.parts(headers))

  def tokens(self, documents: list[int]) -> Int[np.ndarray, "N"]:
    """Returns entry n = the tokens of the first n of these documents."""
    return np.concatenate([[0], np.cumsum(self._tokens[documents]) + self._headers])


def draft(questions: Questions, draw: Draw) -> Draft:
  """Drafts question number `draw.index`; a unit is a document, related documents come first."""
  if draw.index >= len(questions.questions):
    raise UserError(
      f"{questions.path} has {len(questions.questions)} questions with answers: ask for no more samples"
    )
  question = questions.questions[draw.index]
  rng = draw("documents")
  related = rng.sample(question.related, len(question.related))
  first = {*question.documents, *related}
  others = [i for i in range(len(questions.documents)) if i not in first]
  order = [*question.documents, *related, *rng.sample(others, len(others))]

  def make(n: int):
    chosen = order[:n]
    draw("order").shuffle(chosen)
    texts = [
      DOCUMENT.format(number=i, document=questions.documents[document])
      for i, document in enumerate(chosen, 1)
    ]
    return draw.sample(
      CONTEXT.format(context="\n\n".join(texts)),
      QUESTION.format(question=question.text),
      question.answers,
    )

  return Draft(make, len(question.documents), questions.tokens(order))


def _load(path: Path) -> dict | list:
  try:
    data = json.loads(path.read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from error
  except ValueError as error:  # of Unicode and of JSON
    raise UserError(f"{path} is not JSON: {error}") from error
  if not isinstance(data, dict | list):
    raise UserError(f"{path} is neither in SQuAD's format (an object) nor in HotpotQA's (a list)")
  return data


def _field(path: Path, parent: Any, name: str | int, kind: type, where: str) -> Any:
  """Returns `parent[name]`; raises UserError if it is missing or not of this kind."""
  if isinstance(name, int):
    exists = isinstance(parent, list) and len(parent) > name
  else:
    exists = isinstance(parent, dict) and name in parent
  if not exists:
    raise UserError(f"{path}: {where} has no field {name!r}, which the format asks for")
  if not isinstance(parent[name], kind):
    raise UserError(f"{path}: {where}.{name} is not a {_KINDS[kind]}")
  return parent[name]


_KINDS = {list: "list", str: "text", bool: "truth value"}


def _squad(field: Callable, data: dict):
  questions, documents = [], []
  for a, article in enumerate(field(data, "data", list, "the file")):
    place = f"data[{a}]"
    paragraphs = field(article, "paragraphs", list, place)
    contexts = [
      field(paragraph, "context", str, f"{place}.paragraphs[{p}]")
      for p, paragraph in enumerate(paragraphs)
    ]
    documents.extend(contexts)
    for p, paragraph in enumerate(paragraphs):
      for q, asked in enumerate(field(paragraph, "qas", list, f"{place}.paragraphs[{p}]")):
        here = f"{place}.paragraphs[{p}].qas[{q}]"
        text = field(asked, "question", str, here)
        found = field(asked, "answers", list, here)
        if "is_impossible" in asked and field(asked, "is_impossible", bool, here):
          continue
        answers = [field(x, "text", str, f"{here}.answers[{i}]") for i, x in enumerate(found)]
        if answers:
          questions.append((text, answers, [contexts[p]], contexts))
  return questions, documents


def _hotpot(field: Callable, data: list):
  questions, documents = [], []
  for i, asked in enumerate(data):
    place = f"[{i}]"
    text = field(asked, "question", str, place)
    answer = field(asked, "answer", str, place)
    context = field(asked, "context", list, place)
    gold = [
      _hotpot_document(field, part, f"{place}.context[{c}]") for c, part in enumerate(context)
    ]
    documents.extend(gold)
    questions.append((text, [answer], list(dict.fromkeys(gold)), []))
  return questions, documents


def _hotpot_document(field: Callable, part: Any, place: str) -> str:
  """Joins a title and its sentences."""
  title, sentences = field(part, 0, str, place), field(part, 1, list, place)
  parts = [field(sentences, i, str, f"{place}[1]") for i in range(len(sentences))]
  return f"{title}\n{''.join(parts)}"
