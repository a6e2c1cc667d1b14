"""`ttt-jax calibrate`: gives a pretrained model a memory without training.

The rule of least squares needs a layer, a scale, a ridge and a gate. All are chosen by evaluations of made
facts behind a cut of attention, under the condition that the ordinary loss of a text, nothing cut, does not
rise. The facts are of the set "calibration", which shares no words with what is evaluated later.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from ttt_jax.checkpoints.files import local_path
from ttt_jax.checkpoints.hf import load_pretrained
from ttt_jax.checkpoints.open import open_tokenizer
from ttt_jax.checkpoints.save import save_pretrained
from ttt_jax.config import TTTConfig
from ttt_jax.errors import UserError
from ttt_jax.evaluation.plots import subplots
from ttt_jax.extras.facts.evaluate import score_facts
from ttt_jax.extras.facts.make import FactRow, help_topics, make_rows
from ttt_jax.files import check_new, write_json
from ttt_jax.nn.fast_mlp import LOG_SCALE
from ttt_jax.nn.transformer import Transformer

_OFF = 1e-30  # the scale of a layer that reads nothing
_NOTICEABLE = 0.05  # more right answers than without a memory
_OPEN = (1e-3, 1e3)  # a gate that is open wherever anything was seen


@dataclasses.dataclass(frozen=True)
class CalibrationConfig:
  """Configures the search.

  Attributes:
    chunk_size: tokens that a chunk of the fast weight holds; half of `tokens` is whole chunks.
    tokens: of a row of facts, both halves; rows of prose between facts have twice as many.
    rows: rows of each kind.
    facts: facts of a row without prose; with prose it is two thirds of these.
    layers: the layers to choose from; None is all.
    loss_tokens, loss_rows: of the text whose ordinary loss may not rise.
    max_loss_rise: nats per token that it may rise at most.
    seed: of facts and text.
  """

  chunk_size: int = 256
  tokens: int = 512
  rows: int = 4
  facts: int = 14
  layers: tuple[int, ...] | None = None
  loss_tokens: int = 2048
  loss_rows: int = 2
  max_loss_rise: float = 0.01
  seed: int = 0

  def __post_init__(self):
    for name in ("chunk_size", "tokens", "rows", "facts", "loss_tokens", "loss_rows"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be positive")
    if self.tokens % (2 * self.chunk_size):
      raise UserError(
        f"tokens={self.tokens}: half of it is not whole chunks of chunk_size={self.chunk_size}, and the "
        "last chunk of a half would never be learned"
      )


_CANDIDATES = 3  # layers that are tried with every scale and gate
_SCALES = (5.0, 10.0, 20.0, 40.0)
_SCREENING_SCALE = 20.0
_RIDGES = (0.01, 0.1, 1.0)
_GATES = (None, (0.9, 50.0), (0.95, 80.0), (0.98, 150.0))


@dataclasses.dataclass(frozen=True)
class Setting:
  """Says how one layer reads."""

  layer: int
  read_scale: float
  ridge: float = _RIDGES[0]
  gate: tuple[float, float] | None = None

  @classmethod
  def of(cls, result: Mapping[str, Any]) -> "Setting":
    """Returns the setting of which `result` is."""
    return cls(*(result[field.name] for field in dataclasses.fields(cls)))

  def text(self) -> str:
    """Returns the setting as a line of output says it."""
    gate = "no gate" if self.gate is None else f"gate {self.gate[0]:g}, {self.gate[1]:g}"
    return f"layer {self.layer}, scale {self.read_scale:g}, ridge {self.ridge:g}, {gate}"

  def config(self, chunk_size: int) -> TTTConfig:
    """Returns the section of a model that reads so."""
    threshold, sharpness = self.gate or (TTTConfig.gate_threshold, TTTConfig.gate_sharpness)
    return TTTConfig(
      layers=(self.layer,),
      chunk_size=chunk_size,
      init="next_token",
      rule="least_squares",
      ridge=self.ridge,
      read_scale=self.read_scale,
      read_gate="none" if self.gate is None else "leverage",
      gate_threshold=threshold,
      gate_sharpness=sharpness,
    )


class _Models:
  """Holds models with a memory in some layers, one per ridge; scales and gates are set."""

  def __init__(self, path: Path, config: CalibrationConfig, dtype: str | None):
    self._path, self._config, self._dtype = path, config, dtype
    self._models: dict[tuple[tuple[int, ...], float], Transformer] = {}

  def plain(self) -> Transformer:
    """Returns the model without fast weights."""
    model = load_pretrained(self._path, dtype=self._dtype, ttt={"layers": ()})
    self._models = {((), 0.0): model}
    return model

  def depth(self) -> int:
    """Returns the number of layers."""
    return len(next(iter(self._models.values())).layers())

  def with_memory(self, layers: tuple[int, ...], setting: Setting) -> Transformer:
    """Returns the model with a memory in all `layers`, of which only the setting's reads."""
    key = layers, setting.ridge
    if key not in self._models:
      ttt = dataclasses.replace(
        setting.config(self._config.chunk_size), layers=layers, read_gate="leverage"
      )
      self._models = {key: load_pretrained(self._path, dtype=self._dtype, ttt=ttt)}
    model = self._models[key]
    _set(model, setting)
    return model


def _set(model: Transformer, setting: Setting) -> None:
  """Lets one layer of a model read as the setting says, and the other layers nothing."""
  threshold, sharpness = _OPEN if setting.gate is None else setting.gate
  places = model.layers()
  for g, group in enumerate(model.groups):
    for p, block in enumerate(group):
      mlp = block.mlp
      if getattr(mlp, "log_read_scale", None) is None:
        continue
      scales = np.full(mlp.log_read_scale[...].shape, _OFF)
      for layer, (own_g, own_p, i) in enumerate(places):
        if (own_g, own_p) == (g, p) and layer == setting.layer:
          scales[i] = setting.read_scale
      ttt = mlp.ttt
      gates = np.log([(1 - threshold) / (1 - ttt.gate_threshold), sharpness / ttt.gate_sharpness])
      for parameter, value in (
        (mlp.log_read_scale, np.log(scales / ttt.read_scale) / LOG_SCALE),
        (mlp.log_gate, np.broadcast_to(gates / LOG_SCALE, (*scales.shape, 2))),
      ):
        parameter[...] = jnp.asarray(value, parameter[...].dtype)


@jax.jit
def _loss(model: Transformer, tokens: jax.Array) -> jax.Array:
  logits = jax.nn.log_softmax(model(tokens)[:, :-1])
  return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2))


def calibrate(
  path: str | Path,
  config: CalibrationConfig | None = None,
  *,
  text: str | None = None,
  out: str | Path | None = None,
  dtype: str | None = None,
  console: Console | None = None,
) -> dict[str, Any]:
  """Chooses layer, scale, ridge and gate, prints the table it chose from, and writes the model.

  Args:
    path: a Hugging Face directory or a `.gguf` file.
    config: the search; None for the defaults.
    text: ordinary text; None for the topics of Python's own help.
    out: a new directory for the model with its memory, `calibration.json`, and what each setting costs
      and remembers as `calibration.png`; None writes nothing.
    dtype: of weights and computation; None as stored.
    console: the output.

  Returns:
    The report: `chosen`, every setting evaluated with its results (the last `compared` of `tried` with
    their loss), and the `gain` in right answers.

  Raises:
    UserError: the text is too short; no setting keeps the ordinary loss; `out` exists already.
  """
  config = CalibrationConfig() if config is None else config
  console = Console() if console is None else console
  if out is not None:
    check_new(out)
  path = local_path(path)
  started = time.perf_counter()
  tokenizer = open_tokenizer(path)

  def encode(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)

  prose = encode(help_topics() if text is None else text)
  needed = max(config.loss_tokens, 2 * config.tokens)
  if len(prose) < 2 * needed:
    raise UserError(f"the text has {len(prose)} tokens, {2 * needed} are needed: give a longer one")
  rows, rows_in_prose = _fact_rows(config, encode, prose)
  windows = _windows(prose, config.loss_tokens, config.loss_rows, config.seed)
  models = _Models(path, config, dtype)
  plain = models.plain()
  none = {**_both(plain, rows, rows_in_prose), "loss": float(_loss(plain, windows))}
  tried: list[dict[str, Any]] = []

  def evaluate(
    setting: Setting, layers: tuple[int, ...], *, with_prose: bool = False, with_loss: bool = False
  ) -> dict[str, Any]:
    model = models.with_memory(layers, setting)
    result: dict[str, Any] = dataclasses.asdict(setting)
    seen = []
    if with_loss:
      result["loss"] = float(_loss(model, windows))
      seen.append(f"loss {result['loss'] - none['loss']:+.3f}")
    result["facts"] = score_facts(model, rows)
    seen.append(f"right {result['facts']['answers']:.0%}")
    if with_prose:
      result["prose"] = score_facts(model, rows_in_prose)
      seen.append(f"in prose {result['prose']['answers']:.0%}")
    tried.append(result)
    console.print(f"{setting.text()}: {', '.join(seen)}", highlight=False, soft_wrap=True)
    return result

  def by_answers(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(results, key=lambda result: -result["facts"]["answers"])

  layers = config.layers or tuple(range(models.depth()))
  screened = by_answers([evaluate(Setting(n, _SCREENING_SCALE), layers) for n in layers[::2]])
  around = [n for n in layers[1::2] if abs(n - screened[0]["layer"]) == 1]
  screened = by_answers(
    [*screened, *(evaluate(Setting(n, _SCREENING_SCALE), layers) for n in around)]
  )
  thorough = partial(evaluate, with_prose=True, with_loss=True)

  def best_allowed(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    allowed = [r for r in results if r["loss"] <= none["loss"] + config.max_loss_rise]
    return max(allowed, key=_remembered, default=None)

  # The layer that remembers most without a gate need not be the one that does under a gate.
  candidates = [result["layer"] for result in screened[:_CANDIDATES]]
  final = [
    thorough(Setting(layer, scale, _RIDGES[0], gate), (layer,))
    for layer in candidates
    for scale in _SCALES
    for gate in _GATES
  ]
  start = best_allowed(final) or max(final, key=_remembered)
  kept = Setting.of(start)
  final += [
    thorough(dataclasses.replace(kept, ridge=ridge), (kept.layer,)) for ridge in _RIDGES[1:]
  ]
  chosen = best_allowed(final)
  report = {
    "model": str(path),
    "config": dataclasses.asdict(config),
    "without_memory": none,
    "chosen": chosen,
    "tried": tried,
    "compared": len(final),
    "seconds": time.perf_counter() - started,
  }
  _print(report, final, console)
  if chosen is None:
    raise UserError(
      f"no setting keeps the ordinary loss within {config.max_loss_rise}: give --max-loss-rise, or --layers"
    )
  gain = _remembered(chosen) - _remembered(none)
  report["gain"] = gain
  if gain < _NOTICEABLE:
    warnings.warn(
      f"with an ordinary loss that rises by at most {config.max_loss_rise:g} the memory answers "
      f"{100 * gain:.1f} % more than the model without it: the table has settings that remember more and "
      "cost more, see --max-loss-rise",
      stacklevel=2,
    )
  if out is not None:
    model = load_pretrained(path, dtype=dtype, ttt=Setting.of(chosen).config(config.chunk_size))
    save_pretrained(model, out, tokenizer=tokenizer)
    write_json(Path(out) / "calibration.json", report)
    plot_calibration(report, Path(out) / "calibration.png")
    console.print(f"written: {out}", highlight=False)
  return report


def _remembered(result: dict[str, Any]) -> float:
  """Returns the share of right answers, of facts alone and of facts in prose alike."""
  return (result["facts"]["answers"] + result["prose"]["answers"]) / 2


def _both(model: Transformer, rows, rows_in_prose) -> dict[str, Any]:
  return {"facts": score_facts(model, rows), "prose": score_facts(model, rows_in_prose)}


def _windows(prose: Sequence[int], tokens: int, rows: int, seed: int) -> jax.Array:
  starts = np.random.default_rng(seed).integers(0, len(prose) - tokens, rows)
  return jnp.asarray([prose[start : start + tokens] for start in starts], jnp.int32)


def _fact_rows(
  config: CalibrationConfig, encode: Callable[[str], list[int]], prose: Sequence[int]
) -> tuple[list[FactRow], list[FactRow]]:
  """Returns rows of facts alone, and rows twice as long of fewer facts between prose."""
  make = partial(make_rows, "calibration", encode, rows=config.rows, seed=config.seed)
  alone = make(facts=config.facts, half=config.tokens // 2)
  return alone, make(facts=math.ceil(config.facts * 2 / 3), half=config.tokens, prose=prose)


def _print(report: dict[str, Any], results: Sequence[dict[str, Any]], console: Console) -> None:
  none, chosen = report["without_memory"], report["chosen"]
  table = Table(
    title="facts behind a cut of attention, and ordinary loss with nothing cut; * is chosen"
  )
  for name in ("layer", "scale", "ridge", "gate", "right", "right in prose", "loss", "rise", ""):
    table.add_column(name, justify="right")
  for result in ({**none, "layer": "-", "read_scale": 0.0, "ridge": 0.0, "gate": None}, *results):
    gate = result["gate"]
    table.add_row(
      str(result["layer"]),
      f"{result['read_scale']:g}",
      f"{result['ridge']:g}",
      "none" if gate is None else f"{gate[0]:g}, {gate[1]:g}",
      *(f"{result[measure]['answers']:.0%}" for measure in ("facts", "prose")),
      f"{result['loss']:.3f}",
      f"{result['loss'] - none['loss']:+.3f}",
      "*" if result is chosen else "",
    )
  console.print(table)
  console.print(f"{len(report['tried'])} evaluations, {report['seconds']:.0f} s", highlight=False)


def plot_calibration(report: dict[str, Any], path: Path) -> None:
  """Plots what each setting of `calibration.json` remembers against what it costs, and the frontier."""
  none, chosen = report["without_memory"], report["chosen"]
  settings = [result for result in report["tried"] if "loss" in result]
  figure, ((alone, prose),) = subplots(1, 2, 10.4, 4.4)
  layers = sorted({result["layer"] for result in settings})
  colors = dict(zip(layers, ("#0b4f9e", "#d1620b", "#3f8f4f", "#a05fa8", "#5c5c5c"), strict=False))
  for axes, kind, title in ((alone, "facts", "facts alone"), (prose, "prose", "facts in prose")):
    points = [(r["loss"] - none["loss"], r[kind]["answers"], r["layer"]) for r in settings]
    for layer in layers:
      x, y = zip(*[(rise, right) for rise, right, of in points if of == layer], strict=True)
      axes.scatter(x, y, s=22, color=colors.get(layer, "#5c5c5c"), label=f"layer {layer}")
    frontier, best = [(0.0, none[kind]["answers"])], none[kind]["answers"]
    for rise, right, _ in sorted(points):
      if right > best:
        frontier.append((max(rise, 0.0), right))
        best = right
    axes.step(
      *zip(*frontier, strict=True), where="post", color="#5c5c5c", linewidth=1, label="frontier"
    )
    axes.axhline(none[kind]["answers"], color="#5c5c5c", linestyle=":", label="without a memory")
    axes.axvline(
      report["config"]["max_loss_rise"], color="#b02a2a", linestyle="--", label="allowed"
    )
    if chosen is not None:
      at = chosen["loss"] - none["loss"], chosen[kind]["answers"]
      axes.scatter(*at, s=90, facecolor="none", edgecolor="black", label="chosen")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_ylim(0, 1)
    axes.set_title(f"{title}, behind a cut of attention", loc="left", fontsize=11)
    axes.set_xlabel("rise of the ordinary loss (nats per token)")
    axes.set_ylabel("right answers")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
  alone.legend(frameon=False, fontsize=8)
  figure.savefig(path)
