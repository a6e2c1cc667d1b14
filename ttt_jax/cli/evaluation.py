"""Adds the commands that evaluate: `eval`, `eval perplexity`, `eval recall`, `eval ruler`, `eval facts`."""

import argparse
import dataclasses
from pathlib import Path

from ttt_jax.cli.shared import (
  ALL_FIELDS,
  EVALUATED,
  MODEL_FIELDS,
  add_command,
  add_ruler_samples,
  evaluated,
  from_flags,
  given_model_fields,
)
from ttt_jax.config import DTYPES, TrainConfig
from ttt_jax.files import load_text

_EVAL_EPILOG = """For example:
  ttt-jax eval runs/quickstart --eval.seq_len 8192 --eval.documents 16
  ttt-jax eval models/mine --ttt.layers "[]" --data.path "books/*.txt"

Other evaluations are commands of their own, each with --help:
  ttt-jax eval perplexity   loss on a fixed last block as the context before it grows
  ttt-jax eval recall       recall accuracy by the distance to the last occurrence
  ttt-jax eval ruler        the thirteen tasks of RULER, at any length
  ttt-jax eval facts        facts in plain English that attention cannot see
  ttt-jax eval compare      two models on the same samples of one of these (recall excepted)
"""

_PERPLEXITY_EPILOG = """The same command resumes. Fields of the config can be overridden:
  ttt-jax eval perplexity runs/mine --lengths 2048 8192 32768 --data.path "books/*.txt" --mesh.context 8
"""

_RULER_EPILOG = """The same command resumes. For example:
  ttt-jax eval ruler models/mine --lengths 4096 8192 16384 --samples 50 --haystack book.txt
  ttt-jax eval ruler models/mine --lengths 8192 --tasks niah_single_1 niah_single_2 --strict
"""

# Fields of the config that no evaluation of held-out documents reads. The mesh must fit the batch.
_BATCH = ("batch_size", "accumulate")
_UNUSED = (
  *(f"train.{x.name}" for x in dataclasses.fields(TrainConfig) if x.name not in _BATCH),
  "plan",
  "checkpoint.every",
  "checkpoint.keep",
  "checkpoint.keep_every",
  "data.align_documents",
  "data.attend",
  "data.attend_fraction",
  "eval.every",
)
_UNUSED_BY_RECALL = (
  *_UNUSED,
  "eval.before",
  "eval.buckets",
  "eval.prompt_tokens",
  "eval.sample_tokens",
  "eval.temperature",
)


def add(commands: argparse._SubParsersAction) -> None:
  _add_eval(commands)
  _add_perplexity(commands)
  _add_recall(commands)
  _add_ruler(commands)
  _add_facts(commands)


def _add_eval(commands: argparse._SubParsersAction) -> None:
  text = "evaluate the newest checkpoint of a run, or a pretrained model"
  command = add_command(commands, "eval", text, _EVAL_EPILOG, fields=ALL_FIELDS, unused=_UNUSED)
  command.add_argument("config", metavar="run_or_model", help=EVALUATED)
  command.set_defaults(run=_run_eval)


def _run_eval(parsed: argparse.Namespace) -> None:
  config, is_run = evaluated(parsed)
  from ttt_jax.parallel import processes as distributed
  from ttt_jax.training.run import run_evaluation

  distributed.start(config.runtime)
  run_evaluation(config, is_run=is_run)


def _add_perplexity(commands: argparse._SubParsersAction) -> None:
  text = (
    "measure the loss on a fixed last block as the context before it grows, fast weights on and off"
  )
  command = add_command(
    commands,
    "eval perplexity",
    text,
    _PERPLEXITY_EPILOG,
    fields=ALL_FIELDS,
    unused=(*_UNUSED, "eval"),
  )
  command.add_argument("config", help=EVALUATED)
  command.add_argument(
    "--lengths",
    nargs="+",
    type=int,
    default=[2048, 4096, 8192],
    metavar="TOKENS",
    help="tokens before the block (default 2048 4096 8192)",
  )
  command.add_argument(
    "--reset-every",
    nargs="+",
    type=int,
    default=[],
    metavar="TOKENS",
    help="also measure fast weights that restart every so many tokens",
  )
  for flag, default, text in (
    ("block", 1024, "tokens whose loss is compared"),
    ("documents", 16, "documents at most"),
    ("buckets", 8, "parts of the block, for the loss by position"),
    ("batch", 1, "documents evaluated at once"),
    ("seed", 0, "seed of the choice of documents and of the intervals"),
  ):
    command.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  command.add_argument("--out", type=Path, help="directory (default: runs/perplexity_NAME)")
  command.set_defaults(run=_run_perplexity)


def _run_perplexity(parsed: argparse.Namespace) -> None:
  config, is_run = evaluated(parsed)
  from ttt_jax.evaluation.perplexity import PerplexityConfig
  from ttt_jax.evaluation.perplexity_command import run_perplexity
  from ttt_jax.parallel import processes as distributed

  distributed.start(config.runtime)
  run_perplexity(config, from_flags(PerplexityConfig, parsed), is_run=is_run, out=parsed.out)


def _add_recall(commands: argparse._SubParsersAction) -> None:
  text = "measure a run's recall accuracy by the distance to the last occurrence (see data recall)"
  command = add_command(commands, "eval recall", text, fields=ALL_FIELDS, unused=_UNUSED_BY_RECALL)
  command.add_argument("config", help="a run's YAML file or directory")
  command.add_argument(
    "--window", type=int, help="group distances by so many tokens (default: attention.window)"
  )
  command.add_argument("--out", type=Path, help="directory (default: the run's)")
  command.set_defaults(run=_run_recall)


def _run_recall(parsed: argparse.Namespace) -> None:
  config, is_run = evaluated(parsed)
  from ttt_jax.extras.recall.command import run_recall
  from ttt_jax.parallel import processes as distributed

  distributed.start(config.runtime)
  run_recall(config, is_run=is_run, window=parsed.window, out=parsed.out)


def _add_ruler(commands: argparse._SubParsersAction) -> None:
  text = (
    "evaluate RULER's thirteen tasks at any length; --strict hides the document from the question"
  )
  ruler = add_command(commands, "eval ruler", text, _RULER_EPILOG, fields=MODEL_FIELDS)
  ruler.add_argument("model", help="a Hugging Face directory, a .gguf file, or a run directory")
  add_ruler_samples(ruler)
  ruler.add_argument(
    "--strict",
    action="store_true",
    help="prefill the document first and keep only what its fast weights learned for the question",
  )
  ruler.add_argument(
    "--batch-size", type=int, default=4, help="samples evaluated at once (default 4)"
  )
  ruler.add_argument("--dtype", choices=DTYPES, help="dtype of weights and computation")
  ruler.add_argument(
    "--out", type=Path, metavar="DIR", help="directory for the results (default: runs/ruler_MODEL)"
  )
  ruler.set_defaults(run=_run_ruler)


def _run_ruler(parsed: argparse.Namespace) -> int:
  from ttt_jax.extras.ruler import command
  from ttt_jax.extras.ruler.evaluate import RulerConfig

  return command.run(
    parsed.model,
    from_flags(RulerConfig, parsed),
    out=parsed.out,
    dtype=parsed.dtype,
    fields=given_model_fields(parsed),
  )


def _add_facts(commands: argparse._SubParsersAction) -> None:
  text = "ask for facts of a text that attention cannot see any more, fast weights on and off"
  facts = add_command(commands, "eval facts", text, fields=MODEL_FIELDS)
  facts.add_argument("model", help="a Hugging Face directory, a .gguf file, or a run directory")
  facts.add_argument(
    "--text", type=Path, help="prose between the facts (default: Python's help topics)"
  )
  facts.add_argument("--kinds", nargs="+", default=[], metavar="KIND", help="(default: all)")
  for flag, default, text in (
    ("tokens", 512, "tokens of a row of facts alone; with prose between them twice as many"),
    ("facts", 14, "facts in a row"),
    ("rows", 16, "rows of facts alone, and of facts in prose"),
    ("batch", 4, "rows read at once"),
    ("seed", 1, "seed of facts, their order and the prose"),
  ):
    facts.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  facts.add_argument("--dtype", choices=DTYPES, help="dtype of weights and computation")
  facts.add_argument("--out", type=Path, metavar="DIR", help="directory for facts.json")
  facts.set_defaults(run=_run_facts)


def _run_facts(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.facts.evaluate import FactsConfig, run_facts

  run_facts(
    parsed.model,
    from_flags(FactsConfig, parsed),
    text=None if parsed.text is None else load_text(parsed.text),
    fields=given_model_fields(parsed),
    dtype=parsed.dtype,
    out=parsed.out,
  )
