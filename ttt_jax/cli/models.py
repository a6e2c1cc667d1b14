"""Adds the commands that take any model: `convert`, `generate`."""

import argparse
import sys
from pathlib import Path

from ttt_jax.cli.shared import MODEL_FIELDS, add_command, from_flags, given_model_fields
from ttt_jax.config import DTYPES
from ttt_jax.errors import UserError
from ttt_jax.files import load_text

SOURCE = "a Hugging Face directory, a .gguf file (any part of a split one), or a run directory"

_CONVERT_EPILOG = """For example, a GGUF file gets two fast weights, which change nothing before training:
  ttt-jax convert smollm2.gguf models/smollm2 --dtype bfloat16 --ttt.layers "[14, 28]" --ttt.chunk_size 512
"""

_GENERATE_EPILOG = """Text goes to the standard output, everything else to the standard error. For example:
  ttt-jax generate smollm2.gguf --prompt "The old lighthouse" --temperature 0.7
  ttt-jax generate models/mine --learn book.txt --prompt "The captain's name was"
"""


_CALIBRATE_EPILOG = """No training: minutes for a model of 135M parameters. For example:
  ttt-jax calibrate smollm2.gguf --out models/smollm2-memory
  ttt-jax generate models/smollm2-memory --learn book.txt --prompt "The captain's name is"
"""


def add(commands: argparse._SubParsersAction) -> None:
  _add_convert(commands)
  _add_generate(commands)
  _add_calibrate(commands)


def _add_convert(commands: argparse._SubParsersAction) -> None:
  text = "write a model as a Hugging Face directory, with its tokenizer"
  convert = add_command(commands, "convert", text, _CONVERT_EPILOG, fields=MODEL_FIELDS)
  convert.add_argument("source", help=SOURCE)
  convert.add_argument("destination", help="a directory that does not exist yet")
  convert.add_argument(
    "--dtype",
    choices=DTYPES,
    default=None,
    help="dtype of the written tensors (default: as they are)",
  )
  convert.set_defaults(run=_run_convert)


def _run_convert(parsed: argparse.Namespace) -> None:
  from ttt_jax.checkpoints.convert import convert

  fields = given_model_fields(parsed)
  convert(parsed.source, parsed.destination, dtype=parsed.dtype, fields=fields)


def _add_generate(commands: argparse._SubParsersAction) -> None:
  text = "continue texts with a model whose fast weights learn from prompt and output"
  generate = add_command(commands, "generate", text, _GENERATE_EPILOG, fields=MODEL_FIELDS)
  generate.add_argument("model", help=SOURCE)
  generate.add_argument(
    "--prompt", action="append", default=[], help="a text to continue; several form a batch"
  )
  generate.add_argument("--prompt-file", action="append", type=Path, default=[], metavar="FILE")
  generate.add_argument("--max-new-tokens", type=int, default=200, help="(default 200)")
  generate.add_argument("--temperature", type=float, default=0.0, help="(default 0: greedy)")
  generate.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
  generate.add_argument(
    "--top-p", type=float, help="draw from the likeliest tokens whose probabilities sum to P"
  )
  generate.add_argument(
    "--min-p", type=float, help="draw from tokens at least P times as likely as the likeliest"
  )
  generate.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
  generate.add_argument("--dtype", choices=DTYPES, help="dtype of weights and computation")
  generate.add_argument(
    "--no-update", action="store_true", help="keep the fast weights as they are"
  )
  start = generate.add_mutually_exclusive_group()
  start.add_argument(
    "--learn",
    type=Path,
    metavar="FILE",
    help="prefill this text first and keep only what the fast weights learned from it",
  )
  start.add_argument("--load-state", type=Path, metavar="FILE", help="continue from a saved state")
  generate.add_argument(
    "--save-state", type=Path, metavar="FILE", help="save the state, to continue from it later"
  )
  generate.set_defaults(run=_run_generate)


def _run_generate(parsed: argparse.Namespace) -> None:
  from ttt_jax.generation.command import Sampling, run

  fields = given_model_fields(parsed)
  run(
    parsed.model,
    _prompts(parsed),
    from_flags(Sampling, parsed),
    fields=fields,
    dtype=parsed.dtype,
    update=not parsed.no_update,
    learn=parsed.learn,
    load_state=parsed.load_state,
    save_state=parsed.save_state,
  )


def _prompts(parsed: argparse.Namespace) -> list[str]:
  """Returns the texts of the flags, or else the one on the standard input."""
  prompts = [*parsed.prompt, *(load_text(path) for path in parsed.prompt_file)]
  if not prompts and not sys.stdin.isatty():
    try:
      prompts = [sys.stdin.read().removeprefix("\ufeff")]
    except UnicodeDecodeError as error:
      raise UserError(f"the piped text is not valid {sys.stdin.encoding}: {error}") from error
  if not prompts:
    raise UserError(
      "there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in"
    )
  return prompts


def _add_calibrate(commands: argparse._SubParsersAction) -> None:
  text = "give a pretrained model a memory of least squares, chosen by evaluations alone"
  command = add_command(commands, "calibrate", text, _CALIBRATE_EPILOG)
  command.add_argument("model", help="a Hugging Face directory or a .gguf file")
  command.add_argument("--text", type=Path, help="ordinary text (default: Python's help topics)")
  command.add_argument("--out", type=Path, help="a new directory for the model with its memory")
  command.add_argument("--dtype", choices=DTYPES, help="dtype of weights and computation")
  command.add_argument(
    "--layers", nargs="+", type=int, metavar="LAYER", help="layers to choose from (default: all)"
  )
  for flag, kind, default, text in (
    ("chunk-size", int, 256, "tokens of a chunk of the fast weight"),
    ("tokens", int, 512, "tokens of a row of facts, both halves"),
    ("rows", int, 4, "rows of facts, and of facts between prose"),
    ("facts", int, 14, "facts of a row"),
    ("loss-tokens", int, 2048, "tokens of the text whose ordinary loss may not rise"),
    ("loss-rows", int, 2, "rows of that text"),
    ("max-loss-rise", float, 0.01, "nats per token that it may rise at most"),
    ("seed", int, 0, "seed of facts and text"),
  ):
    command.add_argument(
      f"--{flag}", type=kind, default=default, help=f"{text} (default {default})"
    )
  command.set_defaults(run=_run_calibrate)


def _run_calibrate(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.calibrate import CalibrationConfig, calibrate

  text = None if parsed.text is None else load_text(parsed.text)
  config = from_flags(CalibrationConfig, parsed)
  calibrate(parsed.model, config, text=text, out=parsed.out, dtype=parsed.dtype)
