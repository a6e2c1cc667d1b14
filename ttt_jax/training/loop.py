"""Runs the training loop: it feeds the step, logs, saves, and can be stopped and resumed."""

import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32
from rich.console import Console

from ttt_jax.checkpoints.orbax import open_checkpoints
from ttt_jax.config import Config
from ttt_jax.data import Corpus, merge_states, training_rows
from ttt_jax.errors import UserError
from ttt_jax.evaluation.heldout import evaluation_rows, losses_by_token
from ttt_jax.nn.transformer import Transformer, count_parameters
from ttt_jax.ops.hardware import device_in_table
from ttt_jax.parallel.mesh import local_rows
from ttt_jax.parallel.processes import gather, is_main, stop_requests
from ttt_jax.progress import TrainingProgress
from ttt_jax.training.flops import training_flops
from ttt_jax.training.log import Profile, open_log
from ttt_jax.training.step import TrainState, abstract_state, init_state, jit_train_step, put_batch
from ttt_jax.training.trainable import trained_parameters


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """Says how a call of `train` ended."""

  state: TrainState
  finished: bool  # False: interrupted, and saved


class TokenCount:
  """Counts the tokens of all steps on all processes, without the padding of their rows.

  The host counts, per slot of the batch: counting in the step would cost an all-reduce, and processes
  whose devices split a sequence hold the same slots.
  """

  def __init__(self, slots: Sequence[int], before: int = 0):
    self._before = before
    self._counts = dict.fromkeys(slots, 0)

  @classmethod
  def resumed(
    cls, config: Config, slots: Sequence[int], step: int, data_state: dict[str, Any]
  ) -> "TokenCount":
    """Continues the count of a checkpoint, from the total in its data state."""
    if _TOKENS in data_state:
      return cls(slots, data_state[_TOKENS])
    filled = step * config.train.batch_size * config.data.seq_len
    if is_main():
      warnings.warn(
        f"the checkpoint of step {step} was written by an older ttt_jax, which did not count tokens: "
        f"'tokens' goes on from {filled}, which includes the padding of the rows so far",
        stacklevel=3,
      )
    return cls(slots, filled)

  def add(self, rows: dict[str, np.ndarray]) -> None:
    """Adds the tokens of this process's rows of the next batch."""
    for slot, segment_ids in zip(self._counts, rows["segment_ids"], strict=True):
      self._counts[slot] += int(np.count_nonzero(segment_ids))

  def total(self) -> int:
    """Sums over all processes; all of them must call."""
    by_slot = {}
    for counts in gather({str(slot): count for slot, count in self._counts.items()}):
      by_slot |= counts
    return self._before + sum(by_slot.values())


_TOKENS = "tokens"  # the key of the total in the data state of a checkpoint


class Clock:
  """Measures the speed of the steps between two records and their wait for data, without compilation."""

  def __init__(self, config: Config, devices: int):
    self._flops_per_token = training_flops(config) / config.train.batch_size / config.data.seq_len
    self._devices = devices
    self._since, self._tokens, self._waited = None, 0, 0.0

  @property
  def started(self) -> bool:
    return self._since is not None

  @contextmanager
  def waiting(self) -> Iterator[None]:
    """Adds the time of the `with` block to the wait for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def lap(self, tokens: int) -> dict[str, float | None]:
    """Returns the rates of the steps since the last call; call it when their results are on the host.

    `tokens_per_second` and `mfu` count no padding. `mfu` is the FLOPs of the tokens, by `training_flops`,
    against the devices' peak for products of bfloat16; it is None where `ttt_jax.ops.hardware` does not
    know the peak. `waiting_for_data` is the part of the time that the host spent on rows, whether or not
    the devices had to wait for them.

    Args:
      tokens: the total of `TokenCount`.
    """
    now = time.perf_counter()
    values = dict.fromkeys(("tokens_per_second", "mfu", "waiting_for_data"))
    if self._since is not None:
      speed = (tokens - self._tokens) / (now - self._since)
      device = device_in_table()
      values = {
        "tokens_per_second": speed,
        "mfu": device and speed * self._flops_per_token / (self._devices * device.peak),
        "waiting_for_data": self._waited / (now - self._since),
      }
    self._since, self._tokens, self._waited = now, tokens, 0.0
    return values

  def restart(self) -> None:
    """Leaves out the time since `lap`, which was no training."""
    self._since = time.perf_counter()


def metrics_record(
  config: Config, step: int, metrics: dict[str, Any], tokens: int
) -> dict[str, Any]:
  """Makes the line of `metrics.jsonl` for a step, with its loss, norms and learning rate.

  Three fields sum up all steps so far, skipped steps included: the number of `tokens`, the part of the
  rows that was `padding`, and the number of `skipped` steps.
  """
  record = {
    "step": step,
    "loss": float(metrics["loss"]),
    "tokens": tokens,
    "padding": 1 - tokens / (step * config.train.batch_size * config.data.seq_len),
    "grad_norm": float(metrics["grad_norm"]),
    "update_norm": float(metrics["update_norm"]),
    "skipped": int(metrics["skipped"]),
    "learning_rate": float(metrics["learning_rate"]),
  }
  stats = metrics["ttt"]
  if stats is not None:
    layers = sorted(config.ttt.layers)
    record["ttt"] = {
      str(layer): {name: float(value[i]) for name, value in stats._asdict().items()}
      for i, layer in enumerate(layers)
    }
  return record


def device_memory() -> dict[str, float]:
  """Returns the GiB in use on this process's first device, now and at most; empty on a CPU."""
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {"memory_gib": "bytes_in_use", "memory_peak_gib": "peak_bytes_in_use"}
  return {name: stats[key] / 2**30 for name, key in names.items() if key in stats}


def train(
  config: Config,
  corpus: Corpus,
  mesh: Mesh,
  run_dir: Path,
  *,
  heldout: Int32[np.ndarray, "B T"] | None = None,
  title: str = "training",
  console: Console | None = None,
) -> TrainResult:
  """Trains to `train.steps`, from the newest checkpoint under `run_dir` if there is one.

  Writes `metrics.jsonl` and `checkpoints/` into `run_dir`. Ctrl-C and SIGTERM finish the running step,
  save and return; the same call resumes, and the metrics have every logged step once. With `eval.every`
  the records of these steps have the `heldout_loss`, the mean over `evaluation_rows`, which the caller
  may pass as `heldout`.

  Raises:
    UserError: a checkpoint cannot be loaded or belongs to another model, and nothing is overwritten; or
      more than `train.max_bad_steps` steps in a row had no finite loss and gradient, and nothing more is
      saved.
  """
  steps = config.train.steps
  rows = training_rows(
    corpus.sources,
    seq_len=config.data.seq_len,
    batch_size=config.train.batch_size,
    seed=config.seed,
    slots=local_rows(mesh, config.train.batch_size),
    align=config.ttt.chunk_size if config.data.align_documents else 1,
    attend=config.data.attend_blocks,
    attend_fraction=config.data.attend_fraction,
    chunk_size=config.ttt.chunk_size,
  )
  with closing(rows), open_checkpoints(config.checkpoint, run_dir) as checkpoints:
    if checkpoints.latest_step is None:
      state, tokens = init_state(config, mesh), TokenCount(rows.slots)
    else:
      restored, arrays, data_state = checkpoints.restore(abstract_state(config, mesh)._asdict())
      state = TrainState(**arrays)
      tokens = TokenCount.resumed(config, rows.slots, restored, data_state)
      rows.set_state(data_state)
    done = int(state.step)

    def save() -> None:
      # A state with too many bad steps in a row would never train again.
      _check_bad(config, done, int(state.bad_in_a_row))
      checkpoints.save(
        done,
        arrays=state._asdict(),
        data_state={**merge_states(gather(rows.get_state())), _TOKENS: tokens.total()},
        config=dataclasses.asdict(config),
      )

    step = jit_train_step(config, mesh)
    if config.eval.every is not None and heldout is None:
      heldout = evaluation_rows(config, corpus)
    clock = Clock(config, mesh.size)
    with (
      jax.set_mesh(mesh),
      stop_requests() as stop,
      TrainingProgress(title, done, steps, console) as progress,
      open_log(config, run_dir, resume_step=done) as log,
      Profile(config.train.profile, run_dir) as profile,
    ):
      while done < steps and not stop(done):
        profile.before(done + 1, state)
        with clock.waiting():
          batch = next(rows)
          tokens.add(batch)
          batch = put_batch(batch, mesh)
        state, metrics = step(state, batch)
        done += 1
        profile.after(done, state)
        evaluates = config.eval.every is not None and done % config.eval.every == 0
        logs = evaluates or done % config.train.log_every == 0 or done == steps
        if logs or not clock.started:
          # Nothing else is transferred from the devices between two checkpoints.
          metrics = jax.device_get(metrics)
          total = tokens.total()
          record = metrics_record(config, done, metrics, total) | clock.lap(total) | device_memory()
          if evaluates:
            record["heldout_loss"] = float(losses_by_token(state.model, heldout, mesh).mean())
            clock.restart()
          if logs:
            log.write(record)
          progress.show(done, record)
          _check_bad(config, done, int(metrics["bad_in_a_row"]))
          if metrics["bad_in_a_row"]:
            progress.note(f"step {done} was skipped: its loss or gradient is not finite", "yellow")
        if done % config.checkpoint.every == 0:
          save()
      if checkpoints.latest_step != done:
        save()
  return TrainResult(state=state, finished=done >= steps)


def _check_bad(config: Config, step: int, in_a_row: int) -> None:
  """Raises UserError if too many steps in a row were skipped."""
  if in_a_row > config.train.max_bad_steps:
    raise UserError(
      f"step {step} is the last of {in_a_row} in a row without a finite loss and gradient, more than "
      f"train.max_bad_steps={config.train.max_bad_steps}: they changed no parameter, and the newest "
      "checkpoint is as it was; lower train.learning_rate or ttt.inner_lr, or look at the data there"
    )


def model_summary(config: Config, model: Transformer) -> str:
  """Describes in one line what is trained."""
  kinds = f"{config.model.num_layers} layers"
  if config.ttt.layers:
    kinds += (
      f", fast weights in {sorted(config.ttt.layers)}, chunks of {config.ttt.chunk_size} tokens"
    )
  if config.attention.mixer != "attention":
    mixed = [
      i for i in range(config.model.num_layers) if config.attention.mixer_of(i) != "attention"
    ]
    kinds += f", {config.attention.mixer} in {mixed}"
  if config.attention.window is not None:
    kinds += f", attention window {config.attention.window}"
  trainable = config.train.trainable
  if trainable != "all":
    trained = sum(x.size for x in trained_parameters(model, trainable).values())
    kinds += f", {trained:,} parameters trained ({trainable})"
  return f"{count_parameters(model):,} parameters, {kinds}"
