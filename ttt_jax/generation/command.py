"""`ttt-jax generate`: continues prompts and prints the text as it is generated."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ttt_jax.checkpoints.open import open_model, open_tokenizer
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.files import load_text
from ttt_jax.generation import state as states
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import Generation, Stream, generate
from ttt_jax.generation.sampling import stop_tokens


@dataclass(frozen=True)
class Sampling:
  """Says how many tokens are drawn and how, as the arguments of `generate` of these names."""

  max_new_tokens: int
  temperature: float
  top_k: int | None
  top_p: float | None
  min_p: float | None
  seed: int


def run(
  source: str,
  prompts: list[str],
  sampling: Sampling,
  *,
  fields: Fields,
  dtype: str | None,
  update: bool,
  learn: Path | None,
  load_state: Path | None,
  save_state: Path | None,
) -> None:
  """Prefills the prompts, then generates; prints text on stdout, everything else on stderr.

  Args:
    source: the model, as `open_model` takes it with `fields` and `dtype`.
    update: whether fast weights learn.
    learn: a text to read first, of which only what the fast weights learned is kept.
    load_state, save_state: files of the states before the prompts and after the last token.
  """
  console = Console(stderr=True)
  if save_state is not None and not save_state.absolute().parent.is_dir():
    raise UserError(
      f"--save-state {save_state}: the directory {save_state.parent} does not exist, make it"
    )
  if load_state is not None and learn is not None:
    raise UserError(
      f"--load-state {load_state} and --learn {learn} both say what comes before the prompts: leave one out"
    )
  tokenizer = open_tokenizer(source)
  model = Reader.of(open_model(source, dtype=dtype, fields=fields), donate=True)
  tokenizer.check_vocabulary(model.model.vocab_size)
  _say(console, _describe(model))
  state = None
  if load_state is not None:
    state = states.load_state(load_state, model)
  elif learn is not None:
    if not model.ttt.layers:
      raise UserError(f"--learn: {source} has no fast weights to learn with; see --ttt.layers")
    state = _learned(learn, model, tokenizer, len(prompts), console)
  stream = Stream(
    model,
    [_encode(tokenizer, prompt) for prompt in prompts],
    **dataclasses.asdict(sampling),
    stop=stop_tokens(model.model, tokenizer),
    state=state,
    update=update,
  )
  if len(prompts) == 1:
    _print_stream(stream, tokenizer)
    result = stream.result()
  else:
    for _ in stream:
      pass
    result = stream.result()
    for index, new in enumerate(result.new_tokens):
      print(f"=== {index + 1} of {len(prompts)}\n{_text(tokenizer, new)}")
  _say(console, _speed(result))
  if save_state is not None:
    result.state.save(save_state)
    _say(console, f"state written: {save_state}")


def _learned(
  path: Path, model: Reader, tokenizer: Tokenizer, rows: int, console: Console
) -> states.GenerationState:
  """Returns the fast weights of every row after it has read the text of a file."""
  text = _encode(tokenizer, load_text(path))
  result = generate(model, [text] * rows, max_new_tokens=0)
  _say(console, f"learned {path}: {len(text)} tokens in {result.read_seconds:.1f} s")
  return result.state.fast_weights_only()


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
  return tokenizer.encode(text) if text else []


def _text(tokenizer: Tokenizer, tokens: np.ndarray | list[int]) -> str:
  return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)


def _print_stream(stream: Stream, tokenizer: Tokenizer) -> None:
  """Prints text as soon as later tokens cannot change it: a character may take several tokens."""
  tokens, shown = [], ""
  for (made,) in stream:
    tokens.extend(made)
    text = _text(tokenizer, tokens)
    if text.startswith(shown) and not text.endswith("\ufffd"):
      print(text[len(shown) :], end="", flush=True)
      shown = text
  text = _text(tokenizer, tokens)
  print(text[len(shown) :] if text.startswith(shown) else f"\n{text}", flush=True)


def _describe(model: Reader) -> str:
  config = model.model
  fast = (
    f"fast weights in layers {list(model.ttt.layers)}" if model.ttt.layers else "no fast weights"
  )
  return f"{config.num_layers} layers of {config.d_model}, {config.dtype}, {fast}"


def _speed(result: Generation) -> str:
  read = int(result.prompt_lengths.sum())
  written = int((result.lengths - result.prompt_lengths).sum())
  parts = [f"read {read} tokens in {result.read_seconds:.2f} s"]
  if written:
    rate = written / result.write_seconds
    parts.append(f"wrote {written} in {result.write_seconds:.2f} s, {rate:.1f} tokens/s")
  return ", ".join(parts)


def _say(console: Console, text: str) -> None:
  console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
