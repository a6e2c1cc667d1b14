"""Adds the commands around training runs: `train`, `plan`, `ablate`."""

import argparse

from ttt_jax.cli.shared import ALL_FIELDS, add_command, given_config_fields
from ttt_jax.config.yaml import load_config, load_fields, make_config, overridden

_TRAIN_EPILOG = """Every field of the config can be overridden, before the file or after it. For example:
  ttt-jax train configs/quickstart.yaml --train.steps 100 --ttt.layers "[2]" --run_dir runs/short
"""

_PLAN_EPILOG = """Exit status 1: it does not fit. Fields of the config can be overridden. For example:
  ttt-jax plan configs/continual_qwen3_14b_128k.yaml --topology v5p:4x4x8 --mesh.context 8
  ttt-jax plan configs/pretrain_4b_8k.yaml --sweep
"""

_ABLATE_EPILOG = """The same command resumes unfinished runs. For example:
  ttt-jax ablate configs/ablation_chunk_size.yaml --train.steps 100
  ttt-jax ablate configs/ablation_target.yaml --devices 0,1 2,3
"""


def add(commands: argparse._SubParsersAction) -> None:
  text = "train a model, evaluate it, draw the result; the same command resumes"
  train = add_command(commands, "train", text, _TRAIN_EPILOG, fields=ALL_FIELDS, unused=("plan",))
  train.add_argument("config", help="a YAML file, see configs/")
  train.set_defaults(run=_run_train)
  _add_plan(commands)
  _add_ablate(commands)


def _run_train(parsed: argparse.Namespace) -> None:
  config = make_config(overridden(load_fields(parsed.config), given_config_fields(parsed)))
  from ttt_jax.parallel import processes as distributed
  from ttt_jax.training.run import run_training

  distributed.start(config.runtime)
  run_training(config)


def _add_plan(commands: argparse._SubParsersAction) -> None:
  text = "compile a run for a TPU slice without having one: does it fit, and what limits its speed"
  command = add_command(commands, "plan", text, _PLAN_EPILOG, fields=ALL_FIELDS)
  command.add_argument("config", help="a YAML file, see configs/")
  command.add_argument("--topology", help="such as v5p:4x4x4 (default: the config's plan.topology)")
  command.add_argument(
    "--mode",
    choices=("train", "prefill"),
    help="plan a training step, or the prefill of long prompts",
  )
  command.add_argument(
    "--sweep", action="store_true", help="print a table over sizes of mesh.context"
  )
  command.add_argument(
    "--json", action="store_true", help="print the result as JSON and nothing else"
  )
  command.set_defaults(run=_run_plan)


def _run_plan(parsed: argparse.Namespace) -> int:
  config = load_config(parsed.config, parsed.overrides)
  from ttt_jax.extras.plan.topology import prepare_environment

  prepare_environment()
  from ttt_jax.extras.plan import command

  return command.run(
    config,
    topology=parsed.topology,
    mode=parsed.mode,
    as_json=parsed.json,
    sweep=parsed.sweep,
  )


def _add_ablate(commands: argparse._SubParsersAction) -> None:
  text = "train a grid of variants over several seeds, and write a table and a plot"
  command = add_command(commands, "ablate", text, _ABLATE_EPILOG, fields=ALL_FIELDS)
  command.add_argument("config", help="a YAML file, see configs/ablation_*")
  command.add_argument(
    "--devices",
    nargs="+",
    default=(),
    metavar="0,1",
    help="groups of devices, one run at a time on each (default: one run at a time on all)",
  )
  command.add_argument(
    "--report-only", action="store_true", help="report finished runs and start none"
  )
  command.add_argument(
    "--directory", default=None, help="directory of the runs and the report (default: runs/NAME)"
  )
  command.set_defaults(run=_run_ablate)


def _run_ablate(parsed: argparse.Namespace) -> int:
  from ttt_jax.extras.ablation import command

  return command.run(
    parsed.config,
    load_fields(None, parsed.overrides),
    device_groups=parsed.devices,
    report_only=parsed.report_only,
    directory=parsed.directory,
  )
