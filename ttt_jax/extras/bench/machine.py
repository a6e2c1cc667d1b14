"""Names the machine that a benchmark ran on, and opens the console that its tables are printed to."""

import platform
from pathlib import Path

import jax
from rich.console import Console


def wide_console() -> Console:
  """Returns a console on the standard output, 120 columns wide where that is a file."""
  console = Console()
  return console if console.is_terminal else Console(width=120)


def processor() -> str:
  """Returns the number of cores and the name of the processor."""
  cpuinfo = Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    if names:
      return f"{len(names)} x {names[0].split(': ')[1]}"
  return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
  """Describes the device, the processor and the versions that a benchmark ran with."""
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "processor": processor(),
    "jax": jax.__version__,
    "python": platform.python_version(),
  }
