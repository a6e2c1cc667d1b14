"""`ttt-jax generate`: continues prompts and prints the text as it is generated."""

import argparse
import sys

import numpy as np
from rich.console import Console

from ttt_jax.checkpoints.open import open_model, open_tokenizer
from ttt_jax.checkpoints.sections import Fields
from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.files import load_text
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import Generation, Stream, generate
from ttt_jax.generation.sampling import stop_tokens
from ttt_jax.generation.state import GenerationState, load_state


def run(parsed: argparse.Namespace, fields: Fields) -> None:
  """Prefills the prompts, then generates; prints text on stdout, everything else on stderr."""
  console = Console(stderr=True)
  prompts = _prompts(parsed)
  if parsed.save_state is not None and not parsed.save_state.absolute().parent.is_dir():
    raise UserError(
      f"--save-state {parsed.save_state}: the directory {parsed.save_state.parent} does not exist, make it"
    )
  tokenizer = open_tokenizer(parsed.model)
  model = Reader.of(open_model(parsed.model, dtype=parsed.dtype, fields=fields), donate=True)
  tokenizer.check_vocabulary(model.model.vocab_size)
  _say(console, _describe(model))
  state = _start(parsed, model, tokenizer, len(prompts), console)
  stream = Stream(
    model,
    [_encode(tokenizer, prompt) for prompt in prompts],
    max_new_tokens=parsed.max_new_tokens,
    temperature=parsed.temperature,
    top_k=parsed.top_k,
    top_p=parsed.top_p,
    min_p=parsed.min_p,
    seed=parsed.seed,
    stop=stop_tokens(model.model, tokenizer),
    state=state,
    update=not parsed.no_update,
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
  if parsed.save_state is not None:
    result.state.save(parsed.save_state)
    _say(console, f"state written: {parsed.save_state}")


def _prompts(parsed: argparse.Namespace) -> list[str]:
  prompts = [*parsed.prompt, *(load_text(path) for path in parsed.prompt_file)]
  if not prompts and not sys.stdin.isatty():
    prompts = [_stdin_text()]
  if not prompts:
    raise UserError(
      "there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe a text in"
    )
  return prompts


def _stdin_text() -> str:
  try:
    return sys.stdin.read().removeprefix("\ufeff")
  except UnicodeDecodeError as error:
    raise UserError(f"the piped text is not valid {sys.stdin.encoding}: {error}") from error


def _start(
  parsed: argparse.Namespace,
  model: Reader,
  tokenizer: Tokenizer,
  rows: int,
  console: Console,
) -> GenerationState | None:
  """Returns the state before the prompts: that of --load-state, or the fast weights after --learn."""
  if parsed.load_state is not None:
    return load_state(parsed.load_state, model)
  if parsed.learn is None:
    return None
  if not model.ttt.layers:
    raise UserError(f"--learn: {parsed.model} has no fast weights to learn with; see --ttt.layers")
  text = _encode(tokenizer, load_text(parsed.learn))
  result = generate(model, [text] * rows, max_new_tokens=0)
  _say(console, f"learned {parsed.learn}: {len(text)} tokens in {result.read_seconds:.1f} s")
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
