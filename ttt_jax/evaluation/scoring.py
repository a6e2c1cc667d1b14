"""Scores and continues batches of texts of different lengths, as an evaluation harness needs it.

`harness.py` is the adapter to the harness.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import Stream
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.names import IGNORE
from ttt_jax.nn.loss import LOGITS_AT_ONCE, in_pieces, token_losses
from ttt_jax.nn.transformer import Transformer, next_token_logits

_SMALLEST_ROW = 64
# Names of the largest number of new tokens; the first one that is set counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p", "min_p", "seed")
_TOP_K = 50  # what `transformers` 4 and 5 draw from where neither request nor model has a `top_k`
# Options of `transformers` that are not supported, and their values without effect.
_NEUTRAL = {
  "num_beams": (1,),
  "num_beam_groups": (1,),
  "num_return_sequences": (1,),
  "repetition_penalty": (1,),
  "length_penalty": (1,),
  "diversity_penalty": (0,),
  "no_repeat_ngram_size": (0,),
  "typical_p": (1,),
  "epsilon_cutoff": (0,),
  "eta_cutoff": (0,),
  "min_length": (0,),
  "min_new_tokens": (0,),
  "early_stopping": (False, True),  # only for beam search
  "use_cache": (False, True),
}


class Score(NamedTuple):
  """Holds the sum of a continuation's log-probabilities, and whether every token is the likeliest."""

  loglikelihood: float
  greedy: bool


class Window(NamedTuple):
  """Holds the tokens to read, and the number of last tokens to score."""

  tokens: list[int]
  scored: int


def token_scores(
  model: Transformer,
  tokens: Int[Array | np.ndarray, "B T"],
  labels: Int[Array | np.ndarray, "B T"],
  segment_ids: Int[Array | np.ndarray, "B T"],
  *,
  update: bool = True,
  at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
  """Returns log softmax(logits)[label] and argmax(logits) == label; 0 and true where the label is IGNORE.

  At most `at_once` logits are in memory at a time.
  """
  x, _ = model.hidden(tokens, segment_ids, update=update)

  def of_piece(piece):
    x, labels = piece
    logits = next_token_logits(x, model.embed, model.norm, model.head)
    best = jnp.argmax(logits, axis=-1).astype(labels.dtype)
    return -token_losses(logits, labels)[0], (best == labels) | (labels == IGNORE)

  return in_pieces(of_piece, x, jnp.asarray(labels), max(1, at_once // model.model.vocab_size))


_token_scores = jax.jit(token_scores, static_argnames=("update", "at_once"))


def rolling_windows(tokens: Sequence[int], first: int, max_length: int | None) -> Iterator[Window]:
  """Yields windows that score every token once; each reads `max_length` tokens if the text has them.

  The first token is scored after the token `first`. `max_length=None` gives one window.
  """
  length = max_length or max(len(tokens), 1)
  for start in range(0, len(tokens), length):
    end = min(start + length, len(tokens))
    begin = max(0, end - length)  # the last window overlaps the one before it
    before = [first] if begin == 0 else [tokens[begin - 1]]
    yield Window([*before, *tokens[begin:end]], end - start)


class Scorer:
  """Scores and continues texts in batches of similar length.

  Args:
    model: the model, on one device.
    tokenizer: the model's tokenizer.
    batch_size: rows at a time; they do not change each other's results.
    max_length: read only this many last tokens of a text; None for all, since a model whose fast weights
      learn can read past the positions that its attention was trained on.
    max_gen_toks: the largest number of new tokens where a request has none.
    update: False keeps the fast weights as they are.
  """

  def __init__(
    self,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    update: bool = True,
  ):
    sizes = {"batch_size": batch_size, "max_gen_toks": max_gen_toks, "max_length": max_length}
    for name, size in sizes.items():
      if size is not None and (not isinstance(size, int) or size < 1):
        raise UserError(f"{name}={size!r} must be a number of at least 1")
    tokenizer.check_vocabulary(model.model.vocab_size)
    self._model, self._tokenizer, self._update = model, tokenizer, update
    self._batch_size, self._max_length, self._max_gen_toks = batch_size, max_length, max_gen_toks
    self._stop = stop_tokens(model.model, tokenizer)
    self._reader: Reader | None = None

  @property
  def prefix_id(self) -> int:
    """Returns the token before a text without context: bos, else eos, else a newline."""
    ids = (self._tokenizer.bos_id, *self._tokenizer.eos_ids)
    special = next((token for token in ids if token is not None), None)
    if special is not None:
      return special
    return self._tokenizer.encode("\n", add_special_tokens=False)[0]

  def loglikelihoods(
    self, pairs: Sequence[tuple[str, str]], show: Callable[[int], None] = lambda done: None
  ) -> list[Score]:
    """Scores every continuation after its context, which may be empty."""
    return self._score([self._pair(*pair) for pair in pairs], show)

  def rolling(
    self, texts: Sequence[str], show: Callable[[int], None] = lambda done: None
  ) -> list[float]:
    """Returns the log-likelihood of every whole text; texts past `max_length` use `rolling_windows`."""
    windows, owners = [], []
    for owner, text in enumerate(texts):
      tokens = self._tokenizer.encode(text, add_special_tokens=False)
      for window in rolling_windows(tokens, self.prefix_id, self._max_length):
        windows.append(window)
        owners.append(owner)
    sums = [0.0] * len(texts)
    scores = self._score(windows, lambda done: show(done * len(texts) // len(windows)))
    for owner, score in zip(owners, scores):
      sums[owner] += score.loglikelihood
    return sums

  def generate(
    self,
    requests: Sequence[tuple[str, dict[str, Any]]],
    show: Callable[[int], None] = lambda done: None,
  ) -> list[str]:
    """Continues every context, up to the first of its stop texts.

    Args:
      requests: contexts, each with options that mean the same as for the harness's `transformers` model:
        `until`; `max_gen_toks` or a synonym; `temperature`, which samples where it is above 0 unless
        `do_sample` is false (with `do_sample` alone it is 1); `top_k`, 50 where a request has none, and 0,
        -1 or None to draw from all tokens; `top_p`, `min_p`. Options of `transformers` pass with values
        that change nothing. No generation_config.json is read.

    Raises:
      UserError: an option is unknown, or a value is out of range.
    """
    groups: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
      groups.setdefault(json.dumps(options, sort_keys=True), []).append(index)
    prompts = [self._tokenizer.encode(context) or [self.prefix_id] for context, _ in requests]
    results, done = [""] * len(requests), 0
    for options, indices in groups.items():
      arguments = self._generate_arguments(json.loads(options))
      for batch in self._batches(indices, [len(prompt) for prompt in prompts]):
        texts = self._continue([prompts[index] for index in batch], **arguments)
        for index, text in zip(batch, texts):
          results[index] = text
        done += len(batch)
        show(done)
    return results

  def _pair(self, context: str, continuation: str) -> Window:
    """Encodes a pair; spaces at the context's end move to the continuation, as tokenizers expect."""
    stripped = context.rstrip()
    context, continuation = stripped, context[len(stripped) :] + continuation
    if context:
      before = self._tokenizer.encode(context)
      whole = self._tokenizer.encode(context + continuation)
    else:
      before = [self.prefix_id]
      whole = before + self._tokenizer.encode(continuation, add_special_tokens=False)
    if len(whole) <= len(before):
      raise UserError(f"the continuation {continuation!r} has no tokens of its own")
    scored = len(whole) - len(before)
    if self._max_length is not None:
      if scored > self._max_length:
        raise UserError(f"a continuation has {scored} tokens, max_length={self._max_length}")
      whole = whole[-(self._max_length + 1) :]
    return Window(whole, scored)

  def _score(self, windows: Sequence[Window], show: Callable[[int], None]) -> list[Score]:
    results: list[Score | None] = [None] * len(windows)
    done = 0
    for batch in self._batches(range(len(windows)), [len(window.tokens) for window in windows]):
      rows = _padded_batch([windows[index] for index in batch], self._batch_size)
      values, greedy = map(np.asarray, _token_scores(self._model, *rows, update=self._update))
      for row, index in enumerate(batch):
        results[index] = Score(float(values[row].sum(dtype=np.float64)), bool(greedy[row].all()))
      done += len(batch)
      show(done)
    return results

  def _batches(self, indices: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields batches of similar length, the longest first, so that a lack of memory shows at once."""
    ordered = sorted(indices, key=lambda index: -lengths[index])
    for start in range(0, len(ordered), self._batch_size):
      yield ordered[start : start + self._batch_size]

  def _generate_arguments(self, options: dict[str, Any]) -> dict[str, Any]:
    _check_options(options)
    until = options.get("until") or []
    lengths = [options[name] for name in _LENGTHS if options.get(name) is not None]
    return {
      "until": [until] if isinstance(until, str) else [text for text in until if text],
      "max_new_tokens": int(next(iter(lengths), self._max_gen_toks)),
      "seed": options.get("seed", 0),
      **_sampling(options),
    }

  def _continue(
    self, prompts: list[list[int]], *, until: list[str], max_new_tokens: int, **sampling: Any
  ) -> list[str]:
    if self._reader is None:
      self._reader = Reader.of(self._model)
    if self._max_length is not None:
      room = self._max_length - max_new_tokens
      if room < 1:
        raise UserError(f"max_length={self._max_length} has no room for {max_new_tokens} tokens")
      prompts = [prompt[-room:] for prompt in prompts]
    stream = Stream(
      self._reader,
      prompts,
      max_new_tokens=max_new_tokens,
      stop=self._stop,
      update=self._update,
      **sampling,
    )
    made: list[list[int]] = [[] for _ in prompts]
    for new in stream:
      for row, tokens in zip(made, new):
        row.extend(tokens)
      if all(self._ended(row, until) for row in made):
        break
    return [_before_stop(self._text(row), until) for row in made]

  def _ended(self, tokens: list[int], until: list[str]) -> bool:
    if tokens and tokens[-1] in self._stop:
      return True
    text = self._text(tokens) if until else ""
    return any(stop in text for stop in until)

  def _text(self, tokens: list[int]) -> str:
    return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _check_options(options: dict[str, Any]) -> None:
  """Raises UserError for unknown options, and for unsupported ones with a value that has an effect."""
  for name in sorted(set(options) - set(_GENERATION)):
    neutral = _NEUTRAL.get(name)
    if neutral is None or options[name] not in (None, *neutral):
      passes = "" if neutral is None else f" ({options[name]!r} given; {neutral[0]!r} passes)"
      raise UserError(f"generation option {name!r} is not one of {', '.join(_GENERATION)}{passes}")


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
  """Returns the sampling arguments of `generate`."""
  samples, temperature = options.get("do_sample"), options.get("temperature")
  if temperature is not None and not float(temperature) >= (0 if not samples else 1e-9):
    raise UserError(
      f"temperature={temperature} must be above 0, or 0 without do_sample for the likeliest token"
    )
  if samples is None:
    samples = float(temperature or 0) > 0
  if not samples:
    return {"temperature": 0.0}
  top_k = options.get("top_k", _TOP_K)
  top_p, min_p = options.get("top_p"), options.get("min_p")
  return {
    "temperature": 1.0 if temperature is None else float(temperature),
    "top_k": 1 if top_p == 0 else None if top_k in (None, 0, -1) else int(top_k),
    "top_p": None if top_p in (None, 0) else float(top_p),
    "min_p": None if min_p is None else float(min_p),
  }


def _before_stop(text: str, until: Sequence[str]) -> str:
  for stop in until:
    text = text.split(stop)[0]
  return text


def _padded_batch(windows: Sequence[Window], rows: int):
  """Returns right-padded tokens, labels and segment ids, of one of few shapes; surplus rows are padding."""
  longest = max(len(window.tokens) for window in windows) - 1
  step = max(_SMALLEST_ROW, 1 << max(0, longest.bit_length() - 3))
  shape = (rows, -(-longest // step) * step)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  labels = np.full(shape, IGNORE, np.int32)
  for row, window in enumerate(windows):
    length = len(window.tokens) - 1
    tokens[row, :length] = window.tokens[:-1]
    segments[row, :length] = 1
    labels[row, length - window.scored : length] = window.tokens[-window.scored :]
  return tokens, labels, segments
