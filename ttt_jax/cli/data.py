"""Adds the commands on text: `data prepare`, `facts`, `join`, `reach`, `recall` and `ruler`."""

import argparse
from pathlib import Path

from ttt_jax.cli.shared import add_command, add_ruler_samples, from_flags
from ttt_jax.files import load_text

_PREPARE_EPILOG = """For example:
  ttt-jax data prepare "books/**/*.parquet" data/books --tokenizer models/smollm2
  ttt-jax train configs/mine.yaml --data.path data/books --data.tokenizer models/smollm2
"""

_FACTS_EPILOG = """For example, a third of the tokens facts, the rest ordinary text:
  ttt-jax data facts data/facts --text book.txt
  ttt-jax train configs/mine.yaml --data.mixture "[{path: data/facts}, {path: books, weight: 2}]" \\
    --data.attend "{block: [512, 1024]}"
"""

_JOIN_EPILOG = """For example:
  ttt-jax data join ".venv/lib/python3.11/site-packages/**/*.py" data/packages.jsonl
  ttt-jax train configs/mine.yaml --data.path data/packages.jsonl
"""

_REACH_EPILOG = """For example:
  ttt-jax data reach data/packages.jsonl --out runs/reach_packages
  ttt-jax data reach "books/*.txt" --contexts 1024 16384 131072 --compressor lzma
"""

_RULER_EPILOG = """For example:
  ttt-jax data ruler data/ruler --tokenizer models/smollm2 --lengths 131072 --samples 100
"""


def add(commands: argparse._SubParsersAction) -> None:
  data = commands.add_parser("data", help="prepare text for training, or make some")
  kinds = data.add_subparsers(dest="data", required=True, metavar="WHAT")
  _add_prepare(kinds)
  _add_facts(kinds)
  _add_join(kinds)
  _add_reach(kinds)
  _add_recall(kinds)
  _add_ruler(kinds)


def _add_prepare(commands: argparse._SubParsersAction) -> None:
  text = "tokenise a corpus that does not fit in memory, once, into a directory for data.path"
  prepare = add_command(commands, "prepare", text, _PREPARE_EPILOG)
  prepare.add_argument(
    "source",
    help="a directory or glob of .txt, .md, .py, .jsonl, .json (each also .gz, .zst, .bz2, .xz), .parquet, "
    ".array_record files",
  )
  prepare.add_argument("destination", help="a new directory, or an unfinished one to continue")
  prepare.add_argument(
    "--tokenizer", default="bytes", help="as data.tokenizer in training (default bytes)"
  )
  prepare.add_argument(
    "--text-field",
    metavar="NAME",
    help="field of JSON and parquet that has the text (default text)",
  )
  prepare.add_argument(
    "--end-of-text",
    action=argparse.BooleanOptionalAction,
    help="end each document with the tokenizer's end-of-text token (default: if there is one)",
  )
  prepare.add_argument(
    "--start-of-text",
    action=argparse.BooleanOptionalAction,
    help="begin each document with the start-of-text token (default: as the tokenizer does)",
  )
  prepare.add_argument(
    "--shard-size",
    type=int,
    default=256,
    metavar="MIB",
    help="size of a written file (default 256)",
  )
  prepare.add_argument(
    "--max-bad-records",
    type=int,
    default=0,
    metavar="N",
    help="corrupt records to skip (default 0)",
  )
  prepare.set_defaults(run=_run_prepare)


def _run_prepare(parsed: argparse.Namespace) -> None:
  from ttt_jax.data import prepare

  prepare(
    parsed.source,
    parsed.destination,
    tokenizer=parsed.tokenizer,
    text_field=parsed.text_field,
    start_of_text=parsed.start_of_text,
    end_of_text=parsed.end_of_text,
    shard_bytes=parsed.shard_size << 20,
    max_bad_records=parsed.max_bad_records,
  )


def _add_facts(commands: argparse._SubParsersAction) -> None:
  text = (
    "write documents of made facts in plain English, stated and then asked for (see data.attend)"
  )
  facts = add_command(commands, "facts", text, _FACTS_EPILOG)
  facts.add_argument("destination", help="a directory, for data.path")
  facts.add_argument(
    "--text", type=Path, help="prose between the facts; needed unless --characters 0"
  )
  facts.add_argument(
    "--facts",
    nargs=2,
    type=int,
    default=(4, 14),
    metavar=("LEAST", "MOST"),
    help="facts of a document (default 4 14)",
  )
  for flag, default, text in (
    ("documents", 1000, "documents to write"),
    ("parts", 2, "times that a document states its facts"),
    ("characters", 1200, "characters of prose in a part"),
    ("seed", 0, "seed of facts, their order and the prose"),
  ):
    facts.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  facts.set_defaults(run=_run_facts)


def _run_facts(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.facts.make import FactDocuments, write_documents

  config = from_flags(FactDocuments, parsed)
  prose = "" if parsed.text is None else load_text(parsed.text)
  print(f"written: {write_documents(parsed.destination, config, prose=prose)}")


def _add_join(commands: argparse._SubParsersAction) -> None:
  text = "join the files of each directory into one document: packages, repositories, manuals"
  join = add_command(commands, "join", text, _JOIN_EPILOG)
  join.add_argument(
    "source",
    help="a directory or glob, as data.path; each entry of the directory before its first wildcard becomes "
    "a document",
  )
  join.add_argument("destination", type=Path, help="a new .jsonl file, for data.path")
  join.set_defaults(run=_run_join)


def _run_join(parsed: argparse.Namespace) -> None:
  from ttt_jax.data.skipped import Skipped
  from ttt_jax.extras.join import join

  skipped = Skipped()
  joined = join(parsed.source, parsed.destination, skipped=skipped)
  print(
    f"{parsed.destination}: {joined.documents:,} documents of {joined.files:,} files, {joined.bytes:,} "
    f"bytes; skipped: {skipped}"
  )


def _add_reach(commands: argparse._SubParsersAction) -> None:
  text = "measure without a model how many bits of a text its distant past saves"
  reach = add_command(commands, "reach", text, _REACH_EPILOG)
  reach.add_argument("path", help="a directory, glob or file of text, as data.path")
  reach.add_argument(
    "--contexts",
    nargs="+",
    type=int,
    default=[1024, 4096, 16384, 65536, 262144],
    metavar="BYTES",
    help="bytes of the document before a block (default 1024 4096 16384 65536 262144)",
  )
  for flag, default, text in (
    ("block", 4096, "bytes of a block"),
    ("documents", 32, "documents at most"),
    ("blocks", 4, "blocks of a document"),
    ("primer", 1 << 20, "bytes of other documents that the compressor knows; 0: nothing"),
    ("seed", 0, "seed of the choice of documents, blocks and primers, and of the intervals"),
  ):
    reach.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  reach.add_argument(
    "--compressor",
    choices=("ppmd", "lzma"),
    default="ppmd",
    help="ppmd is stronger and faster and needs pip install 'ttt_jax[reach]' (default ppmd)",
  )
  reach.add_argument(
    "--text-field",
    metavar="NAME",
    help="field of JSON and parquet that has the text (default text)",
  )
  reach.add_argument("--out", type=Path, help="directory for reach.json and reach.png")
  reach.set_defaults(run=_run_reach)


def _run_reach(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.reach.command import run_reach
  from ttt_jax.extras.reach.measure import ReachConfig

  run_reach(parsed.path, from_flags(ReachConfig, parsed), out=parsed.out)


def _add_recall(commands: argparse._SubParsersAction) -> None:
  text = "write documents of the recall task: keys that come again far beyond any attention window"
  recall = commands.add_parser("recall", help=text, description=text)
  recall.add_argument("destination", help="a directory, for data.path")
  for flag, default in (("documents", 600), ("tokens", 4096), ("seed", 0)):
    recall.add_argument(f"--{flag}", type=int, default=default, help=f"(default {default})")
  recall.set_defaults(run=_run_recall)


def _run_recall(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.recall.task import write_documents

  path = write_documents(
    parsed.destination, documents=parsed.documents, tokens=parsed.tokens, seed=parsed.seed
  )
  print(f"written: {path}")


def _add_ruler(commands: argparse._SubParsersAction) -> None:
  text = "write samples of RULER's thirteen tasks as files for any model or program"
  ruler = add_command(commands, "ruler", text, _RULER_EPILOG)
  ruler.add_argument("destination", help="a directory that does not exist yet")
  ruler.add_argument(
    "--tokenizer",
    default="bytes",
    help="tokenizer that counts the lengths, as data.tokenizer in training (default bytes)",
  )
  add_ruler_samples(ruler)
  ruler.set_defaults(run=_run_ruler)


def _run_ruler(parsed: argparse.Namespace) -> None:
  from ttt_jax.extras.ruler.config import SamplesConfig
  from ttt_jax.extras.ruler.write import write_samples

  write_samples(parsed.tokenizer, from_flags(SamplesConfig, parsed), parsed.destination)
