"""The training loop: it feeds the step, logs, saves, and can be stopped and gone on with."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ttt_jax.checkpoint import Checkpoints
from ttt_jax.config import Config
from ttt_jax.data import Corpus, training_rows
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.optim import learning_rate
from ttt_jax.progress import TrainingProgress
from ttt_jax.rundir import METRICS_FILE, MetricsLog
from ttt_jax.step import TrainState, abstract_state, init_state, jit_train_step, put_batch
from ttt_jax.trainable import trained_parameters


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """How a call of `train` ended."""

  state: TrainState
  finished: bool  # False: it was interrupted, and saved


def metrics_record(
  config: Config, step: int, metrics: dict[str, Any], tokens_per_second: float | None
) -> dict[str, Any]:
  """One line of `metrics.jsonl`. Loss and norms are those of this step."""
  record = {
    "step": step,
    "loss": float(metrics["loss"]),
    "tokens": step * config.train.batch_size * config.data.seq_len,
    "tokens_per_second": tokens_per_second,
    "grad_norm": float(metrics["grad_norm"]),
    # The rate this step was taken with: the schedule counts steps from 0.
    "learning_rate": float(learning_rate(config.train)(step - 1)),
  }
  stats = metrics["ttt"]
  if stats is not None:
    layers = sorted(config.ttt.layers)
    record["ttt"] = {
      str(layer): {name: float(value[i]) for name, value in stats._asdict().items()}
      for i, layer in enumerate(layers)
    }
  return record


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
  """Turns the first Ctrl-C or SIGTERM into a request to stop; a second one acts as usual."""
  requested = False
  previous = {}

  def request(number, frame):
    nonlocal requested
    requested = True
    for known, handler in previous.items():
      signal.signal(known, handler)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, request)
  try:
    yield lambda: requested
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def train(
  config: Config, corpus: Corpus, mesh: Mesh, run_dir: Path, *, title: str = "training"
) -> TrainResult:
  """Trains to `train.steps`, from the newest checkpoint under `run_dir` if there is one.

  Writes `metrics.jsonl` and `checkpoints/` there. Ctrl-C and SIGTERM finish the running step, save
  and return; the same call again goes on from there, with every logged step in the metrics once.

  Raises:
    ValueError: a checkpoint that cannot be read or is another model's; nothing is overwritten.
  """
  steps = config.train.steps
  rows = iter(
    training_rows(
      corpus.train,
      seq_len=config.data.seq_len,
      batch_size=config.train.batch_size,
      seed=config.seed,
    )
  )
  with Checkpoints(run_dir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
    if checkpoints.latest_step is None:
      state = init_state(config, mesh)
    else:
      _, arrays, data_state = checkpoints.restore(abstract_state(config, mesh)._asdict())
      state = TrainState(**arrays)
      rows.set_state(data_state)
    done = int(state.step)

    def save() -> None:
      checkpoints.save(done, arrays=state._asdict(), data_state=rows.get_state())

    log = MetricsLog.open(run_dir / METRICS_FILE, resume_step=done)
    step = jit_train_step(config, mesh)
    tokens_per_step = config.train.batch_size * config.data.seq_len
    with (
      jax.set_mesh(mesh),
      _stop_on_signal() as stop,
      TrainingProgress(title, done, steps) as progress,
      log,
    ):
      # The first step compiles: it counts in no speed.
      timed_from, timed_steps = None, 0
      while done < steps and not stop():
        state, metrics = step(state, put_batch(next(rows), mesh))
        done += 1
        timed_steps += 1
        if done % config.train.log_every == 0 or done == steps or timed_from is None:
          metrics = jax.device_get(metrics)
          now = time.perf_counter()
          speed = None
          if timed_from is not None:
            speed = timed_steps * tokens_per_step / (now - timed_from)
          timed_from, timed_steps = now, 0
          record = metrics_record(config, done, metrics, speed)
          if done % config.train.log_every == 0 or done == steps:
            log.write(record)
          progress.update(done, record)
          if not math.isfinite(record["loss"]):
            progress.warn(f"step {done}: the loss is {record['loss']}")
        if done % config.checkpoint.every == 0:
          save()
      if checkpoints.latest_step != done:
        save()
  return TrainResult(state=state, finished=done >= steps)


def model_summary(config: Config, model: Transformer) -> str:
  """One line that says what is trained."""
  kinds = f"{config.model.num_layers} layers"
  if config.ttt.layers:
    kinds += (
      f", fast weights in {sorted(config.ttt.layers)}, chunks of {config.ttt.chunk_size} tokens"
    )
  if config.attention.window is not None:
    kinds += f", attention window {config.attention.window}"
  trainable = config.train.trainable
  if trainable != "all":
    trained = sum(x.size for x in trained_parameters(model, trainable).values())
    kinds += f", {trained:,} parameters trained ({trainable})"
  return f"{count_parameters(model):,} parameters, {kinds}"
