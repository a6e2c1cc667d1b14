"""The command line: parse, build, call."""

import argparse
import dataclasses
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ttt_jax.config import DTYPES, Config
from ttt_jax.load_config import load_config
from ttt_jax.rundir import CONFIG_FILE

_EPILOG = """Every field of the config can be overridden, as in
  ttt-jax train configs/quickstart.yaml --train.steps 100 --ttt.layers "[2]" --run_dir runs/short
"""

_EVALUATED = "a run's YAML file or directory; or a Hugging Face directory, a .gguf file"

_PERPLEXITY_EPILOG = """The same command goes on where it stopped. Fields of the config can be overridden:
  ttt-jax eval perplexity runs/mine --lengths 2048 8192 32768 --data.path "books/*.txt" --mesh.context 8
"""

_PLAN_EPILOG = """Exit status 1 if it does not fit. Fields of the config can be overridden. For example:
  ttt-jax plan configs/continual_qwen3_14b_128k.yaml --topology v5p:4x4x8 --mesh.context 8
  ttt-jax plan configs/pretrain_4b_8k.yaml --sweep
"""

_CONVERT_EPILOG = """For example, a GGUF file with fast weights in two of its MLPs that change nothing yet:
  ttt-jax convert smollm2.gguf models/smollm2 --dtype bfloat16 --ttt.layers "[14, 28]" --ttt.chunk_size 512
"""

_GENERATE_EPILOG = """Text goes to the standard output, everything else to the standard error. For example:
  ttt-jax generate smollm2.gguf --prompt "The old lighthouse" --temperature 0.7
  ttt-jax generate models/mine --learn book.txt --prompt "The captain's name was"
"""

_ABLATE_EPILOG = """The same command again goes on with what is not finished. For example:
  ttt-jax ablate configs/ablation_chunk_size.yaml --train.steps 100
  ttt-jax ablate configs/ablation_target.yaml --devices 0,1 2,3
"""

_RULER_EPILOG = """The same command goes on where it was stopped. For example:
  ttt-jax eval ruler models/mine --lengths 4096 8192 16384 --samples 50 --haystack book.txt
  ttt-jax eval ruler models/mine --lengths 8192 --tasks niah_single_1 niah_single_2 --strict
"""

_RULER_DATA_EPILOG = """For example:
  ttt-jax data ruler data/ruler --tokenizer models/smollm2 --lengths 131072 --samples 100
"""

_PREPARE_EPILOG = """For example:
  ttt-jax data prepare "books/**/*.parquet" data/books --tokenizer models/smollm2
  ttt-jax train configs/mine.yaml --data.path data/books --data.tokenizer models/smollm2
"""


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
  """The parser, and the names of its commands, of which some are two words."""
  parser = argparse.ArgumentParser(
    prog="ttt-jax", description="Language models that learn while they read."
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
  for name, text, positional, run in (
    (
      "train",
      "train a model, evaluate it, draw the result; the same command again resumes",
      "a YAML file, see configs/",
      _run_train,
    ),
    (
      "eval",
      "evaluate the newest checkpoint of a run again, or a pretrained model as it is",
      _EVALUATED,
      _run_eval,
    ),
  ):
    command = commands.add_parser(
      name,
      help=text,
      description=text,
      epilog=_EPILOG,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("config", help=positional)
    command.add_argument(
      "overrides",
      nargs=argparse.REMAINDER,
      metavar="--section.field value",
      help="config overrides",
    )
    command.set_defaults(run=run, takes_overrides=False)
  _add_perplexity(commands)
  _add_recall_evaluation(commands)
  _add_ruler(commands)
  _add_plan(commands)
  _add_ablate(commands)
  _add_convert(commands)
  _add_generate(commands)
  data = commands.add_parser("data", help="prepare text for training, or make some")
  kinds = data.add_subparsers(dest="data", required=True, metavar="WHAT")
  _add_prepare(kinds)
  _add_recall(kinds)
  _add_ruler_data(kinds)
  bench = commands.add_parser("bench", help="measure what fast weights cost on this machine")
  benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
  text = "dense gated MLP against TTT MLP: time, memory, bytes exchanged; tables, JSON and a plot"
  _add_fast_weights(benches.add_parser("fast-weights", help=text, description=text))
  text = (
    "a model that learns while it writes against its twin that does not: time per token, memory"
  )
  _add_generation_bench(benches.add_parser("generation", help=text, description=text))
  return parser, commands.choices


def _add_command(
  commands: argparse._SubParsersAction, name: str, text: str, epilog: str, **how: Any
) -> argparse.ArgumentParser:
  """A command with examples, whose flags are not abbreviated: overrides of the config may look alike."""
  return commands.add_parser(
    name,
    help=text,
    description=text,
    epilog=epilog,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
    **how,
  )


def _add_plan(commands: argparse._SubParsersAction) -> None:
  text = "compile a run for a TPU slice that is not here: does it fit, and what limits it"
  command = _add_command(commands, "plan", text, _PLAN_EPILOG)
  command.add_argument("config", help="a YAML file, see configs/")
  command.add_argument("--topology", help="such as v5p:4x4x4 (default: the config's plan.topology)")
  command.add_argument(
    "--mode", choices=("train", "prefill"), help="a training step, or reading long prompts"
  )
  command.add_argument("--sweep", action="store_true", help="a table over sizes of mesh.context")
  command.add_argument("--json", action="store_true", help="the result as JSON, and nothing else")
  command.set_defaults(run=_run_plan, takes_overrides=True)


def _run_plan(parsed: argparse.Namespace) -> int:
  config = load_config(parsed.config, parsed.overrides)
  from ttt_jax.plan.topology import prepare_environment

  prepare_environment()
  from ttt_jax.plan import command

  return command.run(
    config,
    topology=parsed.topology,
    mode=parsed.mode,
    as_json=parsed.json,
    sweep=parsed.sweep,
  )


def _add_ablate(commands: argparse._SubParsersAction) -> None:
  text = "train a grid of variants over several seeds; one table, one picture"
  command = _add_command(commands, "ablate", text, _ABLATE_EPILOG)
  command.add_argument("config", help="a YAML file, see configs/ablation_*")
  command.add_argument(
    "--devices",
    nargs="+",
    default=(),
    metavar="0,1",
    help="groups of devices, one run at a time on each (default: one run at a time on all)",
  )
  command.add_argument(
    "--report-only", action="store_true", help="of what is finished; run nothing"
  )
  command.add_argument(
    "--directory", default=None, help="of the runs and the report (default: runs/NAME)"
  )
  command.set_defaults(run=_run_ablate, takes_overrides=True)


def _run_ablate(parsed: argparse.Namespace) -> int:
  from ttt_jax.ablation import command

  return command.run(
    parsed.config,
    parsed.overrides,
    device_groups=parsed.devices,
    report_only=parsed.report_only,
    directory=parsed.directory,
  )


def _add_convert(commands: argparse._SubParsersAction) -> None:
  text = "write a model as a Hugging Face directory, with its tokenizer"
  usage = "%(prog)s [-h] source destination [--dtype DTYPE] [--ttt.field value ...]"
  convert = _add_command(commands, "convert", text, _CONVERT_EPILOG, usage=usage)
  convert.add_argument("source", help="a Hugging Face directory, a .gguf file, or a run directory")
  convert.add_argument("destination", help="a directory that does not exist yet")
  convert.add_argument(
    "--dtype", choices=DTYPES, default=None, help="of the tensors (default: as they are)"
  )
  convert.set_defaults(run=_run_convert, takes_overrides=True)


def _add_generate(commands: argparse._SubParsersAction) -> None:
  text = "continue texts with a model whose fast weights learn on while it reads and writes"
  generate = _add_command(commands, "generate", text, _GENERATE_EPILOG)
  generate.add_argument("model", help="a Hugging Face directory, a .gguf file, or a run directory")
  generate.add_argument(
    "--prompt", action="append", default=[], help="a text to continue; several are done together"
  )
  generate.add_argument("--prompt-file", action="append", type=Path, default=[], metavar="FILE")
  generate.add_argument("--max-new-tokens", type=int, default=200, help="(default 200)")
  generate.add_argument("--temperature", type=float, default=0.0, help="(default 0: the likeliest)")
  generate.add_argument("--top-k", type=int, help="draw from the K likeliest tokens")
  generate.add_argument("--top-p", type=float, help="draw from the likeliest that sum to P")
  generate.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
  generate.add_argument("--dtype", choices=DTYPES, help="of weights and computation")
  generate.add_argument("--no-update", action="store_true", help="fast weights stay as they are")
  start = generate.add_mutually_exclusive_group()
  start.add_argument(
    "--learn",
    type=Path,
    metavar="FILE",
    help="read this text first; only what the fast weights learned of it is kept",
  )
  start.add_argument("--load-state", type=Path, metavar="FILE", help="go on from a saved state")
  generate.add_argument("--save-state", type=Path, metavar="FILE", help="to go on from later")
  generate.set_defaults(run=_run_generate, takes_overrides=True)


def _add_ruler(commands: argparse._SubParsersAction) -> None:
  text = (
    "the thirteen tasks of RULER, on documents of any length; also with the document out of sight"
  )
  ruler = _add_command(commands, "eval ruler", text, _RULER_EPILOG)
  ruler.add_argument("model", help="a Hugging Face directory, a .gguf file, or a run directory")
  _add_ruler_samples(ruler)
  ruler.add_argument(
    "--strict",
    action="store_true",
    help="the document is read first; only what the fast weights learned of it is kept for the question",
  )
  ruler.add_argument("--batch-size", type=int, default=4, help="samples at once (default 4)")
  ruler.add_argument("--dtype", choices=DTYPES, help="of weights and computation")
  ruler.add_argument(
    "--out", type=Path, metavar="DIR", help="for the results (default: runs/ruler_MODEL)"
  )
  ruler.set_defaults(run=_run_ruler, takes_overrides=True)


def _add_ruler_samples(command: argparse.ArgumentParser) -> None:
  """What `SamplesConfig` has."""
  command.add_argument("--tasks", nargs="+", metavar="TASK", help="(default: all)")
  command.add_argument(
    "--lengths",
    nargs="+",
    type=int,
    default=[4096],
    metavar="TOKENS",
    help="of prompt and answer (default 4096)",
  )
  command.add_argument(
    "--samples", type=int, default=100, help="of a task and length (default 100)"
  )
  command.add_argument(
    "--haystack", type=Path, metavar="FILE", help="text that needles are hidden in (default: noise)"
  )
  command.add_argument("--squad", type=Path, metavar="FILE", help="questions in SQuAD's format")
  command.add_argument(
    "--hotpot", type=Path, metavar="FILE", help="in SQuAD's or HotpotQA's format"
  )
  command.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")


def _run_ruler(parsed: argparse.Namespace) -> int:
  from ttt_jax.evaluation.ruler import command
  from ttt_jax.evaluation.ruler.evaluate import RulerConfig

  return command.run(
    parsed.model,
    _from_flags(RulerConfig, parsed),
    out=parsed.out,
    dtype=parsed.dtype,
    ttt_overrides=parsed.overrides,
  )


def _add_prepare(commands: argparse._SubParsersAction) -> None:
  text = (
    "tokenise text once, into a directory that data.path names; for what does not fit in memory"
  )
  prepare = _add_command(commands, "prepare", text, _PREPARE_EPILOG)
  prepare.add_argument(
    "source", help="a directory or glob of .txt, .md, .py, .jsonl, .parquet, .array_record files"
  )
  prepare.add_argument("destination", help="a new directory, or one that was left unfinished")
  prepare.add_argument(
    "--tokenizer", default="bytes", help="as data.tokenizer in training (default bytes)"
  )
  prepare.add_argument(
    "--text-field", default="text", metavar="NAME", help="of JSON and parquet (default text)"
  )
  prepare.add_argument(
    "--shard-size", type=int, default=256, metavar="MIB", help="of a file (default 256)"
  )
  prepare.add_argument(
    "--max-bad-records", type=int, default=0, metavar="N", help="corrupt ones to skip (default 0)"
  )
  prepare.set_defaults(run=_run_prepare, takes_overrides=False)


def _add_recall(commands: argparse._SubParsersAction) -> None:
  text = "write documents of the recall task: pairs that come again, far beyond any window"
  recall = commands.add_parser("recall", help=text, description=text)
  recall.add_argument("destination", help="a directory, for data.path")
  for flag, default in (("documents", 600), ("tokens", 4096), ("seed", 0)):
    recall.add_argument(f"--{flag}", type=int, default=default, help=f"(default {default})")
  recall.set_defaults(run=_run_recall_data, takes_overrides=False)


def _run_recall_data(parsed: argparse.Namespace) -> None:
  from ttt_jax.evaluation.recall import write_documents

  path = write_documents(
    parsed.destination, documents=parsed.documents, tokens=parsed.tokens, seed=parsed.seed
  )
  print(f"written: {path}")


def _add_ruler_data(commands: argparse._SubParsersAction) -> None:
  text = "write samples of RULER's thirteen tasks as files, for other models and programs too"
  ruler = _add_command(commands, "ruler", text, _RULER_DATA_EPILOG)
  ruler.add_argument("destination", help="a directory that does not exist yet")
  ruler.add_argument(
    "--tokenizer",
    default="bytes",
    help="whose tokens the lengths count, as data.tokenizer in training (default bytes)",
  )
  _add_ruler_samples(ruler)
  ruler.set_defaults(run=_run_ruler_data, takes_overrides=False)


def _run_ruler_data(parsed: argparse.Namespace) -> None:
  from ttt_jax.evaluation.ruler.config import SamplesConfig
  from ttt_jax.evaluation.ruler.write import write_samples

  write_samples(parsed.tokenizer, _from_flags(SamplesConfig, parsed), parsed.destination)


def _run_prepare(parsed: argparse.Namespace) -> None:
  from ttt_jax.data import prepare

  prepare(
    parsed.source,
    parsed.destination,
    tokenizer=parsed.tokenizer,
    text_field=parsed.text_field,
    shard_bytes=parsed.shard_size << 20,
    max_bad_records=parsed.max_bad_records,
  )


def _run_convert(parsed: argparse.Namespace) -> None:
  from ttt_jax.pretrained.convert import convert

  convert(parsed.source, parsed.destination, dtype=parsed.dtype, ttt_overrides=parsed.overrides)


def _run_generate(parsed: argparse.Namespace) -> None:
  from ttt_jax.generation import command

  command.run(parsed)


def _run_train(parsed: argparse.Namespace) -> None:
  config = load_config(parsed.config, parsed.overrides)
  from ttt_jax import distributed
  from ttt_jax.run import run_training

  distributed.start(config.runtime)
  run_training(config)


def _evaluated(parsed: argparse.Namespace) -> tuple[Config, bool]:
  """The config of what is to be evaluated, and whether it is a run, whose model is in its checkpoints."""
  path = Path(parsed.config)
  if path.suffix in (".yaml", ".yml"):
    return load_config(path, parsed.overrides), True
  if (path / CONFIG_FILE).is_file():
    words = ["--run_dir", str(path), *parsed.overrides]
    return load_config(path / CONFIG_FILE, words), True
  given = ["--init_from", parsed.config, "--name", path.stem]
  return load_config(None, [*given, *parsed.overrides]), False


def _run_eval(parsed: argparse.Namespace) -> None:
  config, is_run = _evaluated(parsed)
  from ttt_jax import distributed
  from ttt_jax.run import run_evaluation

  distributed.start(config.runtime)
  run_evaluation(config, is_run=is_run)


def _add_perplexity(commands: argparse._SubParsersAction) -> None:
  text = "the loss of a document's last block, the text before it growing; fast weights on and off"
  command = _add_command(commands, "eval perplexity", text, _PERPLEXITY_EPILOG)
  command.add_argument("config", help=_EVALUATED)
  command.add_argument(
    "--lengths",
    nargs="+",
    type=int,
    default=[2048, 4096, 8192],
    metavar="TOKENS",
    help="before the block (default 2048 4096 8192)",
  )
  command.add_argument(
    "--reset-every",
    nargs="+",
    type=int,
    default=[],
    metavar="TOKENS",
    help="also with fast weights that start again so often",
  )
  for flag, default, text in (
    ("block", 1024, "tokens whose loss is compared"),
    ("documents", 16, "at most so many"),
    ("buckets", 8, "of the loss by position"),
    ("batch", 1, "documents read at once"),
    ("seed", 0, "of the choice of documents and of the intervals"),
  ):
    command.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  command.add_argument("--out", type=Path, help="directory (default: runs/perplexity_NAME)")
  command.set_defaults(run=_run_perplexity, takes_overrides=True)


def _run_perplexity(parsed: argparse.Namespace) -> None:
  config, is_run = _evaluated(parsed)
  from ttt_jax import distributed
  from ttt_jax.evaluation.perplexity import PerplexityConfig
  from ttt_jax.evaluation.perplexity_command import run_perplexity

  distributed.start(config.runtime)
  run_perplexity(config, _from_flags(PerplexityConfig, parsed), is_run=is_run, out=parsed.out)


def _add_recall_evaluation(commands: argparse._SubParsersAction) -> None:
  text = "how often a run's model knows a value again, by how long ago it came (see data recall)"
  command = commands.add_parser("eval recall", help=text, description=text, allow_abbrev=False)
  command.add_argument("config", help="a run's YAML file or directory")
  command.add_argument(
    "--window", type=int, help="count distances by so many tokens (default: attention.window)"
  )
  command.add_argument("--out", type=Path, help="directory (default: the run's)")
  command.set_defaults(run=_run_recall, takes_overrides=True)


def _run_recall(parsed: argparse.Namespace) -> None:
  config, is_run = _evaluated(parsed)
  from ttt_jax import distributed
  from ttt_jax.evaluation.recall_command import run_recall

  distributed.start(config.runtime)
  run_recall(config, is_run=is_run, window=parsed.window, out=parsed.out)


def _add_fast_weights(parser: argparse.ArgumentParser) -> None:
  for flag, default, text in (
    ("tokens", 8192, "T, of a row"),
    ("chunk-size", 512, "C"),
    ("d-model", 512, "D"),
    ("d-ff", 1536, "F"),
    ("batch", 1, "rows"),
    ("shards", 1, "devices for the part about the exchange; on a CPU, it is split into as many"),
    ("repeats", 5, "rounds, at least 5"),
  ):
    parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} (default {default})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--ways", nargs="+", default=None, help="only these ways to compute it")
  parser.add_argument("--op-only", action="store_true", help="the down projection alone")
  parser.add_argument("--name", default="bench_fast_weights", help="of the files written")
  parser.add_argument("--out", type=Path, default=Path("bench"), help="directory (default bench)")
  parser.set_defaults(run=_run_bench, takes_overrides=False)


def _add_generation_bench(parser: argparse.ArgumentParser) -> None:
  for flag, default in (
    ("layers", 30),
    ("d-model", 576),
    ("d-ff", 1536),
    ("heads", 9),
    ("kv-heads", 3),
    ("vocab", 49152),
    ("every", 6),
    ("chunk-size", 128),
    ("prompt", 256),
    ("batch", 1),
    ("repeats", 5),
  ):
    parser.add_argument(f"--{flag}", type=int, default=default, help=f"(default {default})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--name", default="bench_generation", help="of the file written")
  parser.add_argument("--out", type=Path, default=Path("bench"), help="directory (default bench)")
  parser.set_defaults(run=_run_generation_bench, takes_overrides=False)


def _run_generation_bench(parsed: argparse.Namespace) -> None:
  from ttt_jax.generation.bench import GenerationBenchConfig, run_generation_bench

  run_generation_bench(_from_flags(GenerationBenchConfig, parsed), parsed.name, parsed.out)


def _run_bench(parsed: argparse.Namespace) -> None:
  import jax

  if parsed.shards > 1:
    jax.config.update("jax_num_cpu_devices", parsed.shards)
  from ttt_jax.bench import BenchConfig, run_bench

  run_bench(_from_flags(BenchConfig, parsed), parsed.name, parsed.out)


def _from_flags(config: type, parsed: argparse.Namespace) -> Any:
  """A dataclass whose fields are flags; what a flag collects in a list is a tuple in it."""
  given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
  return config(**{k: tuple(x) if isinstance(x, list) else x for k, x in given.items()})


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; a user's mistake is one line on stderr and exit status 2."""
  parser, named = _parser()
  arguments = list(sys.argv[1:] if arguments is None else arguments)
  if " ".join(arguments[:2]) in named:  # `eval ruler SRC` is a command, `eval SRC` another
    arguments[:2] = [" ".join(arguments[:2])]
  parsed, overrides = parser.parse_known_args(arguments)
  if overrides and not parsed.takes_overrides:
    parser.error(f"unrecognized arguments: {' '.join(overrides)}")
  parsed.overrides = [*getattr(parsed, "overrides", []), *overrides]
  try:
    with warnings.catch_warnings():
      warnings.showwarning = partial(_show_warning, warnings.showwarning)
      return parsed.run(parsed) or 0
  except (ValueError, NotImplementedError) as error:
    if not _is_ours(error):
      raise
    print(f"ttt-jax {parsed.command}: {error}", file=sys.stderr)
    return 2


def _show_warning(
  show: Callable, message: Warning, category: type, *where: Any, **more: Any
) -> None:
  """What ttt_jax tells its user is a line without the place in the code; other warnings as ever."""
  if category is UserWarning:
    print(f"ttt-jax: {message}", file=sys.stderr)
  else:
    show(message, category, *where, **more)


def _is_ours(error: BaseException) -> bool:
  """Whether ttt_jax itself raised: its message is for the user, another one's wants a traceback."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  return Path(innermost.filename).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
  sys.exit(main())
