"""Holds the arguments and the results of every implementation of the least-squares rule."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from ttt_jax.ops.fast_weight.chunks import factors_of
from ttt_jax.ops.fast_weight.least_squares.sums import Sums


class Rows(NamedTuple):
  """Holds N > 0 full chunks of one device for this rule, as `ttt_jax.ops.fast_weight.chunks.Chunks`.

  Attributes:
    z: activations; 0 where a token neither reads nor writes.
    v: values, in the dtype of the sums; 0 where a token does not write.
    s_in: the sums before the whole sequence; None is none.
    keep, decay: factors of the sums per chunk; None is 1.
    reads, writes: the tokens that see the sums, and those that enter them; None is all.
    ridge: in units of the mean eigenvalue of A.
  """

  z: Float[Array, "B N C F"]
  v: Float[Array, "B N C D"]
  s_in: Sums | None
  keep: Float[Array, "B N"] | None
  decay: Float[Array, ""] | None
  reads: Bool[Array, "B N C"] | None
  writes: Bool[Array, "B N C"] | None
  ridge: Float[Array, ""]


class Outputs(NamedTuple):
  """Holds R and the leverage of every token, and the sums after this device's last chunk."""

  r: Float[Array, "B N C D"]
  leverage: Float[Array, "B N C"]
  sums: Sums


def row_factors(rows: Rows) -> Float[Array, "B N"] | None:
  """Returns what each chunk leaves of the sums; None when that is all of them, always."""
  return factors_of(rows.keep, rows.decay, rows.z.shape[:2], rows.v.dtype)
