"""Training runs: one, a grid of them, its evaluation, its plan."""

import argparse
from collections.abc import Callable

from ttt_jax.cli.shared import EVALUATED, add_command, evaluated
from ttt_jax.load_config import load_config

_EPILOG = """Every field of the config can be overridden, as in
  ttt-jax train configs/quickstart.yaml --train.steps 100 --ttt.layers "[2]" --run_dir runs/short
"""

_PLAN_EPILOG = """Exit status 1 if it does not fit. Fields of the config can be overridden. For example:
  ttt-jax plan configs/continual_qwen3_14b_128k.yaml --topology v5p:4x4x8 --mesh.context 8
  ttt-jax plan configs/pretrain_4b_8k.yaml --sweep
"""

_ABLATE_EPILOG = """The same command again goes on with what is not finished. For example:
  ttt-jax ablate configs/ablation_chunk_size.yaml --train.steps 100
  ttt-jax ablate configs/ablation_target.yaml --devices 0,1 2,3
"""


def add(commands: argparse._SubParsersAction) -> None:
  _add_run(
    commands,
    "train",
    "train a model, evaluate it, draw the result; the same command again resumes",
    "a YAML file, see configs/",
    _run_train,
  )
  _add_run(
    commands,
    "eval",
    "evaluate the newest checkpoint of a run again, or a pretrained model as it is",
    EVALUATED,
    _run_eval,
  )
  _add_plan(commands)
  _add_ablate(commands)


def _add_run(
  commands: argparse._SubParsersAction, name: str, text: str, positional: str, run: Callable
) -> None:
  command = commands.add_parser(
    name,
    help=text,
    description=text,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_argument("config", help=positional)
  command.add_argument(
    "overrides", nargs=argparse.REMAINDER, metavar="--section.field value", help="config overrides"
  )
  command.set_defaults(run=run, takes_overrides=False)


def _run_train(parsed: argparse.Namespace) -> None:
  config = load_config(parsed.config, parsed.overrides)
  from ttt_jax import distributed
  from ttt_jax.run import run_training

  distributed.start(config.runtime)
  run_training(config)


def _run_eval(parsed: argparse.Namespace) -> None:
  config, is_run = evaluated(parsed)
  from ttt_jax import distributed
  from ttt_jax.run import run_evaluation

  distributed.start(config.runtime)
  run_evaluation(config, is_run=is_run)


def _add_plan(commands: argparse._SubParsersAction) -> None:
  text = "compile a run for a TPU slice that is not here: does it fit, and what limits it"
  command = add_command(commands, "plan", text, _PLAN_EPILOG)
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
  command = add_command(commands, "ablate", text, _ABLATE_EPILOG)
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
