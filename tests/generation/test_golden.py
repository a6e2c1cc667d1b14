"""Texts that the published implementation wrote, and what its fast weights had learned by then."""

from pathlib import Path

import numpy as np
import pytest
from helpers import relative_error

import ttt_jax
from ttt_jax.generation.generate import generate

CASES = sorted((Path(__file__).parents[1] / "golden" / "model").iterdir())


@pytest.mark.filterwarnings("ignore:.*ttt_layers names")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generation(case):
  """Alone, and with other prompts beside it."""
  model = ttt_jax.load_pretrained(case / "checkpoint", dtype="float32")
  golden = np.load(case / "generation.npz")
  prompt, sequence = golden["prompt"].tolist(), golden["sequence"].tolist()
  new = len(sequence) - len(prompt)
  rng = np.random.default_rng(0)
  others = [rng.integers(0, model.model.vocab_size, n).tolist() for n in (3, 40)]
  for prompts in ([prompt], [others[0], prompt, others[1]]):
    row = prompts.index(prompt)
    # The published cache has not read the last token.
    first = generate(model, prompts, max_new_tokens=new - 1, stop=())
    assert relative_error(first.state.logits[row], golden["step_logits"][-1]) < 5e-5
    last = generate(model, [[]] * len(prompts), max_new_tokens=1, stop=(), state=first.state)
    written = [*first.new_tokens[row].tolist(), *last.new_tokens[row].tolist()]
    assert prompt + written == sequence
    _check_cache(model, first.state.cache, row, golden)


def _check_cache(model, cache, row, golden):
  layers = {int(name.split(".")[1]) for name in golden.files if name.startswith("cache.")}
  assert layers == set(model.ttt.layers)
  for layer in layers:
    group, place, repeat = model.layers()[layer]
    slow = model.groups[group][place].mlp.down[...][repeat]
    fast = cache.layers[layer].fast
    learned = np.asarray(slow + fast.s[row]).T
    assert relative_error(learned, golden[f"cache.{layer}.down"]) < 1e-5
    pending = golden[f"cache.{layer}.pending_t"]
    assert len(pending) == int(cache.lengths[row]) % model.ttt.chunk_size
    np.testing.assert_allclose(fast.source[row, : len(pending)], pending, atol=1e-5)
