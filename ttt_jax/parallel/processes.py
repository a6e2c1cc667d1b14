"""Starts the processes of a program, and coordinates their files and errors.

A process is one of a `jax.distributed` program: a host of a TPU pod slice, a task of SLURM. JAX runs a
training step over the mesh of all their devices without this module; loading files and reporting errors
need it.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttt_jax.config import RuntimeConfig
from ttt_jax.errors import UnsupportedError, UserError

T = TypeVar("T")

_MESSAGE_BYTES = 2048  # longest error message that other processes show


def start(runtime: RuntimeConfig) -> None:
  """Configures JAX before its first use, and connects to the other processes of `runtime.distributed`.

  A second call of a program, which evaluates two models, keeps the connection.

  Raises:
    UserError: the processes cannot connect.
  """
  if runtime.cpu_devices is not None:
    jax.config.update("jax_num_cpu_devices", runtime.cpu_devices)
  if not runtime.distributed or jax.distributed.is_initialized():
    return
  try:
    jax.distributed.initialize(
      coordinator_address=runtime.coordinator,
      num_processes=runtime.num_processes,
      process_id=runtime.process_id,
    )
  except (RuntimeError, ValueError) as error:
    raise UserError(
      "runtime.distributed=true, but the processes of this program could not be found "
      f"({str(error).splitlines()[0]}): outside of TPU pods, SLURM and MPI give runtime.coordinator, "
      "runtime.num_processes and runtime.process_id"
    ) from error


def is_main() -> bool:
  """Tells whether this process writes files and output: only the first one does."""
  return jax.process_index() == 0


def on_every_process(function: Callable[[], T]) -> T:
  """Calls `function()` on every process; an error on one ends the call on all, so that none waits forever.

  Raises:
    UserError: another process raised a `UserError` or an `UnsupportedError`.
    RuntimeError: another process raised anything else.
  """
  if jax.process_count() == 1:
    return function()
  result, error = None, None
  try:
    result = function()
  except Exception as raised:
    error = raised
  message = b""
  if error is not None:
    kind = b"user:" if isinstance(error, UserError | UnsupportedError) else b"bug:"
    message = (kind + f"{type(error).__name__}: {error}".encode())[:_MESSAGE_BYTES]
  padded = np.frombuffer(message.ljust(_MESSAGE_BYTES, b"\0"), np.uint8)
  messages = [row.tobytes().rstrip(b"\0") for row in multihost_utils.process_allgather(padded)]
  if error is not None:
    raise error
  for process, text in enumerate(messages):
    if text:
      kind, _, message = text.decode(errors="replace").partition(":")
      if kind == "user":
        raise UserError(f"process {process}: {message.partition(': ')[2]}")
      raise RuntimeError(f"process {process} failed: {message}")
  return result


def on_main(function: Callable[[], T]) -> T | None:
  """Calls `function()` on the first process; the others wait and get None. Errors as `on_every_process`."""
  return on_every_process(function if is_main() else lambda: None)


def from_main(function: Callable[[], T]) -> T:
  """Returns the first process's JSON-able `function()` on every process; errors as `on_every_process`."""
  return gather(on_main(function))[0]


def gather(value: Any) -> list[Any]:
  """Returns the JSON-able values of all processes, in their order; all processes call it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes.ravel())]


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
  """Turns the first Ctrl-C or SIGTERM into a request to stop; a second one acts as usual.

  Yields a function to call after every step with the number of steps done; it tells whether to stop there.
  With many processes JAX's preemption service forwards the SIGTERM of any process, and all stop at the same
  step.
  """
  if jax.process_count() > 1:
    # The service handles SIGTERM; Ctrl-C reaches the launcher, which ends its processes by SIGTERM.
    yield multihost_utils.reached_preemption_sync_point
    return
  requested = False
  previous = {}

  def request(number, frame):
    nonlocal requested
    requested = True
    for signal_number, handler in previous.items():
      signal.signal(signal_number, handler)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, request)
  try:
    yield lambda step: requested
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
