"""Adds the command that compares two models sample by sample: `eval compare`."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ttt_jax.cli.shared import add_command, evaluated
from ttt_jax.errors import UserError

_EVALUATIONS = ("facts", "ruler", "perplexity")

_EPILOG = """A and B are models, or directories that eval facts, eval ruler or eval perplexity wrote:
  ttt-jax eval compare models/a models/b --of "facts --rows 32"
  ttt-jax eval compare models/a models/b --of "ruler --tasks niah_single_1 --lengths 4096"
  ttt-jax eval compare runs/a runs/b --of "perplexity --lengths 2048 8192"
  ttt-jax eval compare runs/ruler_a runs/ruler_b

--of names the evaluation, with its options in the same quotes (`ttt-jax eval facts --help` lists them);
they hold for both models, whose results are written to DIR/a and DIR/b. The same command resumes. To give
each model fields of its own, evaluate it by itself, and compare the directories.
"""

Parse = Callable[[Sequence[str]], argparse.Namespace]


def add(commands: argparse._SubParsersAction, parse: Parse) -> None:
  """Adds the command; `parse` parses the words of another one."""
  text = "compare two models on the same samples: paired differences, intervals, sign test"
  command = add_command(commands, "eval compare", text, _EPILOG)
  command.add_argument("a", metavar="A", help="a model, or a directory of results")
  command.add_argument("b", metavar="B", help="the same for the model that is compared with A")
  command.add_argument(
    "--of",
    metavar="EVALUATION",
    help=f"evaluate the models: {', '.join(_EVALUATIONS)}, with options in the same quotes",
  )
  command.add_argument("--out", type=Path, metavar="DIR", help="(default: runs/compare_A_B)")
  command.set_defaults(run=partial(_run, parse))


def _run(parse: Parse, parsed: argparse.Namespace) -> int:
  from ttt_jax.extras.compare import compare, is_results

  sources = {"a": parsed.a, "b": parsed.b}
  out = parsed.out or Path("runs") / f"compare_{Path(parsed.a).stem}_{Path(parsed.b).stem}"
  models = {side: path for side, path in sources.items() if not is_results(path)}
  evaluations = {
    side: _evaluation(parse, path, parsed.of, out / side) for side, path in models.items()
  }
  if parsed.of is not None and not evaluations:
    raise UserError(f"--of {parsed.of}: {parsed.a} and {parsed.b} are results: leave --of out")
  if len(evaluations) == 2:
    _check_tokenizers(**evaluations)
  for evaluation in evaluations.values():
    if status := evaluation.run(evaluation):
      return status
  results = [out / side if side in models else Path(path) for side, path in sources.items()]
  write = partial(compare, *results, out=out, names=(parsed.a, parsed.b))
  if evaluations:
    from ttt_jax.parallel.processes import on_main

    on_main(write)
  else:
    write()  # without a device, which another program may hold
  return 0


def _evaluation(parse: Parse, source: str, of: str | None, out: Path) -> argparse.Namespace:
  """Parses the command that evaluates a model.

  Raises:
    UserError: `of` is no evaluation, or has --out; as `parse`.
  """
  try:
    name, *options = shlex.split(of or "") or [""]
  except ValueError as error:
    raise UserError(f"--of {of!r}: {error}, check its quotes") from error
  if name not in _EVALUATIONS:
    given = "no directory of results" if of is None else f"a model, and --of is {of!r}"
    raise UserError(
      f"{source} is {given}: give the directory that an evaluation wrote, or evaluate the models here: "
      f"--of {', --of '.join(_EVALUATIONS)}"
    )
  parsed = parse(["eval", name, source, *options])
  if parsed.out is not None:
    raise UserError(f"--of {of!r} has --out: give --out to eval compare itself")
  parsed.out = out
  return parsed


def _check_tokenizers(a: argparse.Namespace, b: argparse.Namespace) -> None:
  """Raises UserError if two models encode a text differently, before hours of work."""
  from ttt_jax.extras.facts.make import help_topics

  text = help_topics()
  if _tokenizer(a).encode(text) != _tokenizer(b).encode(text):
    raise UserError(
      "the two models have different tokenizers, so that they would not read the same samples: compare "
      "models with the same tokenizer"
    )


def _tokenizer(evaluation: argparse.Namespace):
  from ttt_jax.checkpoints.open import open_tokenizer
  from ttt_jax.checkpoints.tokenizer import BYTES, load_tokenizer

  if "model" in evaluation:
    return open_tokenizer(evaluation.model)
  return load_tokenizer(evaluated(evaluation)[0].tokenizer or BYTES)
