"""Trains a decoder with a fast weight one step, over a mesh of `data` x `context`, in plain JAX.

    python notebooks/guides/one_step.py      # eight CPU devices, less than half a minute

The whole step, from tokens to updated parameters, runs inside one `jax.shard_map`: an array is what
one device holds, of the batch B rows and T contiguous tokens of each. The four lines marked
COLLECTIVE and their transposes are all communication. `tests/test_one_step.py` holds it to the library.

The library also has packed documents (`segment_ids`), cheaper exchanges
(`ttt_jax.exclusive_prefix`), attention that never forms its scores, a backward pass that keeps one
state instead of one per chunk, and parameters split over devices (`mesh.fsdp`, `mesh.tensor`).

Letters: N chunks of C tokens, D model width, F hidden width, H heads, K channels per head, P shards.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class Config:
  vocab: int = 256
  layers: int = 2
  ttt_layer: int = 1  # its down projection is a fast weight
  d: int = 64
  f: int = 160
  heads: int = 4
  head_dim: int = 16
  window: int = 16  # tokens that a token attends to, itself included
  chunk: int = 16
  inner_lr: float = 0.05  # divided by F
  decay: float = 0.95  # of the fast weight's state, per chunk
  conv_width: int = 5
  theta: float = 10000.0
  eps: float = 1e-6
  learning_rate: float = 5e-3


def init(key: jax.Array, c: Config) -> dict:
  """Returns the parameters: a dict, in it a list with a dict per layer. Every device holds all."""
  keys = iter(jax.random.split(key, 1 + 7 * c.layers))

  def normal(fan_in, *shape):
    return jax.random.normal(next(keys), shape) * fan_in**-0.5

  def layer(i):
    p = {name: normal(c.d, c.d, c.heads, c.head_dim) for name in ("query", "key", "value")}
    p["out"] = normal(c.heads * c.head_dim, c.heads, c.head_dim, c.d)
    p["gate"], p["up"] = normal(c.d, c.d, c.f), normal(c.d, c.d, c.f)
    p["down"] = normal(c.f, c.f, c.d)
    p["attention_norm"], p["mlp_norm"] = jnp.ones(c.d), jnp.ones(c.d)
    if i == c.ttt_layer:
      p["conv"] = jnp.zeros((c.conv_width, c.d)).at[c.conv_width // 2 + 1].set(1)  # the next token
      p["projection"] = jnp.eye(c.d)
      p["log_rate"] = jnp.zeros(())
    return p

  table = normal(c.d, c.vocab, c.d)
  return {"table": table, "layers": [layer(i) for i in range(c.layers)], "norm": jnp.ones(c.d)}


def rms_normalize(x, c):
  return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + c.eps)


def rotate(x, positions, c):
  """Turns the channel pair (i, i + K/2) by `position * theta^(-2i/K)`."""
  frequencies = c.theta ** (jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
  angles = (positions[:, None] / frequencies)[:, None]  # [T, 1, K/2], the same for all heads
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(p, x, c):
  """Each token attends to the last `window` tokens, itself included.

  Local result: a query against the keys of its own shard. Missing: the `window - 1` tokens before the
  shard. Every device sends its last `window - 1` keys and values to its right neighbour. The first
  shard receives zeros, which no query sees: their positions are negative.
  """
  t, halo = x.shape[1], c.window - 1
  assert halo <= t, f"window={c.window} reaches beyond the left neighbour's {t} tokens"
  start = t * lax.axis_index("context")  # position of this device's first token in its row
  positions = start + jnp.arange(t)
  q = rotate(jnp.einsum("btd,dhk->bthk", x, p["query"]), positions, c)
  k = rotate(jnp.einsum("btd,dhk->bthk", x, p["key"]), positions, c)
  kv = jnp.stack([k, jnp.einsum("btd,dhk->bthk", x, p["value"])])
  to_the_right = [(shard, shard + 1) for shard in range(lax.axis_size("context") - 1)]
  # COLLECTIVE: 2 B (window - 1) H K numbers to one neighbour, per layer.
  before = lax.ppermute(kv[:, :, t - halo :], "context", to_the_right)
  k, v = jnp.concatenate([before, kv], axis=2)  # [B, halo + T, H, K]
  key_positions = start - halo + jnp.arange(halo + t)
  behind = positions[:, None] - key_positions  # how far key s lies behind query t
  visible = (behind >= 0) & (behind < c.window) & (key_positions >= 0)
  scores = jnp.einsum("bthk,bshk->bhts", q, k) * c.head_dim**-0.5
  weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
  return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["out"])


def gated(p, h):
  return jax.nn.silu(h @ p["gate"]) * (h @ p["up"])


def targets(p, embeddings, c):
  """Returns V, what the fast weight is to predict: a convolution over the tokens around, projected.

  It looks ahead, but never beyond its chunk. A shard holds whole chunks, so nothing is missing.
  """
  b, t, d = embeddings.shape
  chunks = rms_normalize(embeddings, c).reshape(b, t // c.chunk, c.chunk, d)
  padded = jnp.pad(chunks, ((0, 0), (0, 0), (c.conv_width // 2,) * 2, (0, 0)))
  taps = [padded[:, :, i : i + c.chunk] * p["conv"][i] for i in range(c.conv_width)]
  return sum(taps) @ p["projection"]  # [B, N, C, D]


def fast_mlp(p, h, embeddings, c):
  """The gated MLP whose down projection W keeps learning: chunk n is read, then learned.

      y_n     = Z_n (W + S_n)                  S_0 = 0 in the first chunk of a row
      S_{n+1} = a S_n + U_n                    U_n = lr Z_n^T V_n, a the decay

  On shard p, chunks counted from its first one and E_p the state before that, this unrolls to

      S_n = (sum over m < n of a^(n-1-m) U_m)  +  a^n E_p

  Local result: the sum, made of the shard's own tokens. Missing: E_p, what all earlier shards have
  learned. A shard does to the state what a chunk does, E_{p+1} = a^N E_p + D_p with D_p its sum for
  n = N, and so

      E_p = sum over q < p of a^(N (p-1-q)) D_q

  an exclusive prefix: D_p itself is not in E_p. Who sends what: every device sends its D_p once to the
  others, B F D numbers however long its text is.
  """
  b, t, _ = h.shape
  n = t // c.chunk
  lr = c.inner_lr / c.f * jnp.exp(10.0 * p["log_rate"])  # learned, from its value in the config
  z = gated(p, h).reshape(b, n, c.chunk, c.f)
  v = targets(p, embeddings, c)

  after = c.decay ** jnp.arange(n - 1, -1, -1)  # a^(N-1-m): what is left of U_m at the shard's end
  delta = lr * jnp.einsum("n,bncf,bncd->bfd", after, z, v)  # D_p
  # COLLECTIVE: B F D numbers to each of the P - 1 other devices, once per layer with a fast weight.
  deltas = lax.all_gather(delta, "context")
  distance = lax.axis_index("context") - 1 - jnp.arange(lax.axis_size("context"))  # p - 1 - q
  weights = jnp.where(distance >= 0, c.decay ** (n * jnp.maximum(distance, 0)), 0.0)
  incoming = checkpoint_name(jnp.einsum("q,qbfd->bfd", weights, deltas), "incoming")  # E_p

  def read_then_learn(s, chunk):
    z, v = chunk
    y = jnp.einsum("bcf,bfd->bcd", z, p["down"] + s)  # before the update: strictly causal
    return c.decay * s + lr * jnp.einsum("bcf,bcd->bfd", z, v), y

  chunks = jax.tree.map(lambda x: x.swapaxes(0, 1), (z, v))  # scan runs along the first axis
  _, y = lax.scan(read_then_learn, incoming, chunks)
  return y.swapaxes(0, 1).reshape(b, t, c.d)


# Backward, a layer is computed again from its input and E_p: the halo travels twice, the state once.
KEPT = jax.checkpoint_policies.save_only_these_names("incoming")


@functools.partial(jax.checkpoint, static_argnums=3, policy=KEPT)
def block(p, x, embeddings, c):
  x = x + attention(p, rms_normalize(x, c) * p["attention_norm"], c)
  h = rms_normalize(x, c) * p["mlp_norm"]
  return x + (fast_mlp(p, h, embeddings, c) if "conv" in p else gated(p, h) @ p["down"])


def local_loss(params, tokens, labels, c):
  """Returns the part of this device's tokens in the mean loss of the batch, in nats per token."""
  embeddings = x = params["table"][tokens]
  for p in params["layers"]:
    x = block(p, x, embeddings, c)
  logits = (rms_normalize(x, c) * params["norm"]) @ params["table"].T
  log_probabilities = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)
  return -jnp.sum(picked) / (tokens.size * lax.axis_size("data") * lax.axis_size("context"))


def loss_and_gradients(params, tokens, labels, c):
  """Returns the mean loss over all devices and its gradients, the same on every device.

  `pcast` lets a device's gradient differ from the others' (it sends nothing): without it, JAX would
  sum them unseen. What a device's numbers do to the loss of others comes back through the transposes
  of the exchanges above: the halo's cotangents travel to the left, and those of the deltas are summed
  over the devices that read them, a reduce-scatter.
  """
  local = jax.tree.map(lambda x: lax.pcast(x, ("data", "context"), to="varying"), params)
  loss, gradients = jax.value_and_grad(local_loss)(local, tokens, labels, c)
  # COLLECTIVE: one number. Missing are the losses of the other devices' tokens.
  loss = lax.psum(loss, ("data", "context"))
  # COLLECTIVE: an all-reduce of every parameter's size. Missing is what other tokens say about it.
  return loss, lax.psum(gradients, ("data", "context"))


def adam(params, gradients, moments, step, c, b1=0.9, b2=0.999, eps=1e-8):
  """Applies Adam. All devices have equal gradients and compute one update: nothing is exchanged."""
  first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, moments[0], gradients)
  second = jax.tree.map(lambda m, g: b2 * m + (1 - b2) * g * g, moments[1], gradients)

  def moved(x, m1, m2):
    return x - c.learning_rate * m1 / (1 - b1**step) / (jnp.sqrt(m2 / (1 - b2**step)) + eps)

  return jax.tree.map(moved, params, first, second), (first, second)


def make_step(mesh: Mesh, c: Config):
  """Returns the jitted step: `(params, moments, step, tokens, labels) -> (loss, params, moments)`."""

  def step_on_device(params, moments, step, tokens, labels):
    loss, gradients = loss_and_gradients(params, tokens, labels, c)
    return loss, *adam(params, gradients, moments, step, c)

  rows, whole = jax.P("data", "context"), jax.P()
  specs = {"in_specs": (whole, whole, whole, rows, rows), "out_specs": whole}
  return jax.jit(jax.shard_map(step_on_device, mesh=mesh, **specs), donate_argnums=(0, 1))


def main(steps: int = 20, rows: int = 8, length: int = 256) -> list[float]:
  """Trains on the bytes of this file and prints the loss."""
  data = 2 if jax.device_count() % 2 == 0 else 1
  shape, auto = (data, jax.device_count() // data), (AxisType.Auto, AxisType.Auto)
  mesh, c = jax.make_mesh(shape, ("data", "context"), axis_types=auto), Config()
  text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
  params = init(jax.random.key(0), c)
  moments = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(2))
  train_step, rng, losses = make_step(mesh, c), np.random.default_rng(0), []
  for step in range(1, steps + 1):
    starts = rng.integers(0, len(text) - length, rows)
    batch = np.stack([text[start : start + length + 1] for start in starts])
    # Labels are cut on the host: a shard's last label is its right neighbour's first token.
    loss, params, moments = train_step(params, moments, step, batch[:, :-1], batch[:, 1:])
    losses.append(float(loss))
    print(f"step {step:2d}  loss {loss:.3f}")
  return losses


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)  # of no effect on GPUs and TPUs
  main()
