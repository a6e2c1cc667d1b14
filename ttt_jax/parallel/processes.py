"""Many processes, one program: how they start, what only the first does, and how they agree.

A process here is one of a program of `jax.distributed`: a host of a TPU pod slice, a task of SLURM. A
step needs nothing of this, since JAX runs it over the mesh of all their devices; files and mistakes do.
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

_MESSAGE_BYTES = 2048  # of an error that other processes show


def start(runtime: RuntimeConfig) -> None:
  """Tells JAX what it must know before its first use, and waits for the other processes if there are any.

  Raises:
    UserError: the processes could not be found.
  """
  if runtime.cpu_devices is not None:
    jax.config.update("jax_num_cpu_devices", runtime.cpu_devices)
  if not runtime.distributed:
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
  """Whether this process writes what a run leaves, and speaks."""
  return jax.process_index() == 0


def on_every_process(function: Callable[[], T]) -> T:
  """`function()` on every process; what one raises ends the call on all, so that none waits for it.

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
      kind, _, said = text.decode(errors="replace").partition(":")
      if kind == "user":
        raise UserError(f"process {process}: {said.partition(': ')[2]}")
      raise RuntimeError(f"process {process} failed: {said}")
  return result


def on_main(function: Callable[[], T]) -> T | None:
  """`function()` on the first process, None on the others once it is done; errors as `on_every_process`."""
  return on_every_process(function if is_main() else lambda: None)


def from_main(function: Callable[[], T]) -> T:
  """`function()` of the first process, of what JSON has, on every process; errors as `on_every_process`."""
  return gather(on_main(function))[0]


def gather(value: Any) -> list[Any]:
  """A JSON-able value of every process, by process; all of them call it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.array([data.size], np.int32))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: data.size] = data
  every = multihost_utils.process_allgather(padded)
  return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes.ravel())]


@contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
  """Turns the first Ctrl-C or SIGTERM into a request to stop; a second one acts as usual.

  What it gives is called with the number of steps done, after every step, and says whether to stop there.
  With many processes JAX's preemption service passes the SIGTERM of any of them on, and all stop at the
  same step.
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
    for known, handler in previous.items():
      signal.signal(known, handler)

  for number in (signal.SIGINT, signal.SIGTERM):
    previous[number] = signal.signal(number, request)
  try:
    yield lambda step: requested
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
