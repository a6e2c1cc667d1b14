"""Runs the command line as `python -m ttt_jax.cli`."""

import sys

from ttt_jax.cli import main

sys.exit(main())
