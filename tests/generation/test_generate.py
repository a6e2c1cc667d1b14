"""Generation against the model's own full forward pass: tokens, logits, what is learned, and by whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ATTENTION, MODEL, TTT, mesh_of, random_model, relative_error

from ttt_jax.config import AttentionConfig, TTTConfig
from ttt_jax.generation import pieces
from ttt_jax.generation.decoder import Reader
from ttt_jax.generation.generate import Stream, generate
from ttt_jax.parallel.parameters import shardings

# The chunk is 4, the window 5: shorter than both, a whole number of chunks, several pieces.
LENGTHS = (3, 24, 37, 4, 9)
NEW = 18


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
  monkeypatch.setattr(pieces, "_PIECE", 16)


@pytest.fixture(scope="module")
def model():
  return learner(dataclasses.replace(TTT, inner_lr=3.0, target="hidden_states"))


def learner(ttt, **changes):
  """A model whose fast weights change what it says."""
  return random_model(dataclasses.replace(MODEL, **changes), ttt=ttt, seed=1)


def draw_prompts(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, MODEL.vocab_size, n).tolist() for n in lengths]


_logits = jax.jit(lambda model, tokens, update: model(tokens, update=update), static_argnums=2)


def read_whole(model, row, *, update=True):
  """The logits behind the last token of a row, read at once; what fills it up behind is not seen."""
  filled = np.zeros((1, 64), np.int32)
  filled[0, : len(row)] = row
  return np.asarray(_logits(model, filled, update))[0, len(row) - 1]


def write_by_rereading(model, prompt, new, *, update=True):
  row = list(prompt)
  for _ in range(new):
    row.append(int(np.argmax(read_whole(model, row, update=update))))
  return row[len(prompt) :]


def as_lists(result):
  return [row.tolist() for row in result.new_tokens]


def test_writes_what_reading_everything_again_would(model):
  prompts = draw_prompts()
  result = generate(model, prompts, max_new_tokens=NEW)
  assert as_lists(result) == [write_by_rereading(model, prompt, NEW) for prompt in prompts]
  for row, (prompt, new) in enumerate(zip(prompts, as_lists(result))):
    expected = read_whole(model, prompt + new)
    assert relative_error(result.state.logits[row], expected) < 1e-4
    assert result.tokens[row].tolist() == [*prompt, *new] + [-1] * (37 - len(prompt))
  at_rest = generate(model, prompts, max_new_tokens=NEW, update=False)
  assert as_lists(at_rest) != as_lists(result)


def test_prompts_that_are_all_shorter_than_a_chunk(model):
  """No chunk is full while they are read; the first is learned while the rows are written."""
  prompts = draw_prompts((2, 3))
  result = as_lists(generate(model, prompts, max_new_tokens=6))
  assert result == [write_by_rereading(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("prompt", [1, 4, 23])
@pytest.mark.parametrize(
  "ttt",
  [
    TTTConfig(layers=(1, 3), chunk_size=5, inner_lr=2.0, clip_norm=0.1),
    TTTConfig(layers=(0,), chunk_size=3, inner_lr=2.0, normalize_target=False, projection=False),
    TTTConfig(layers=()),
  ],
  ids=["embeddings, clip", "without projection", "no fast weight"],
)
def test_every_step_has_the_logits_of_one_forward_pass(ttt, prompt):
  model = learner(ttt)
  row = draw_prompts((prompt + 7,))[0]
  reader = Reader.of(model)
  state = generate(reader, [row[:prompt]], max_new_tokens=0).state
  for end in range(prompt + 1, len(row) + 1):
    assert relative_error(state.logits[0], read_whole(model, row[: end - 1])) < 1e-4
    state = generate(reader, [row[end - 1 : end]], max_new_tokens=0, state=state).state


def test_updates_off(model):
  prompts = draw_prompts((6, 13))
  result = generate(model, prompts, max_new_tokens=NEW, update=False)
  assert as_lists(result) == [write_by_rereading(model, p, NEW, update=False) for p in prompts]
  assert all(layer.fast is None for layer in result.state.cache.layers)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "seed": 5}])
def test_rows_do_not_see_each_other(model, how):
  prompts = draw_prompts()
  together = as_lists(generate(model, prompts, max_new_tokens=NEW, **how))
  assert together[0] == as_lists(generate(model, prompts[:1], max_new_tokens=NEW, **how))[0]
  others = [prompts[0], *draw_prompts((8, 30), seed=9)]
  assert together[0] == as_lists(generate(model, others, max_new_tokens=NEW, **how))[0]


@pytest.mark.parametrize(
  "size",
  [{"data": 2, "context": 4}, {"fsdp": 2, "context": 2, "tensor": 2}],
  ids=str,
)
def test_on_a_mesh(size):
  """Also from a state of one device, whose rows are in the middle of chunks."""
  ttt = dataclasses.replace(TTT, inner_lr=3.0, target="hidden_states")
  model = learner(ttt, vocab_size=18)
  prompts, more = draw_prompts(), draw_prompts((9, 0, 1, 21, 40), seed=2)
  first = generate(model, prompts, max_new_tokens=5)
  second = generate(model, more, max_new_tokens=NEW, state=first.state)
  mesh = mesh_of(**{"data": 1} | size)
  on_mesh = jax.device_put(model, shardings(model, mesh))
  assert as_lists(generate(on_mesh, prompts, max_new_tokens=5)) == as_lists(first)
  moved = generate(on_mesh, more, max_new_tokens=NEW, state=first.state)
  assert as_lists(moved) == as_lists(second)


@pytest.mark.parametrize("how", [{}, {"temperature": 0.8, "seed": 5}])
def test_going_on_is_as_without_a_break(model, how):
  prompts = draw_prompts()
  whole = generate(model, prompts, max_new_tokens=NEW, **how)
  first = generate(model, prompts, max_new_tokens=7, **how)
  nothing = [[]] * len(prompts)
  second = generate(model, nothing, max_new_tokens=NEW - 7, state=first.state, **how)
  joined = [a + b for a, b in zip(as_lists(first), as_lists(second))]
  assert joined == as_lists(whole)
  again = generate(model, nothing, max_new_tokens=NEW - 7, state=first.state, **how)
  assert as_lists(again) == as_lists(second)  # a state can be used twice


def test_fast_weights_carry_what_was_read_into_another_prompt():
  """With a window of one token nothing else does, so the text may as well be read in one piece."""
  ttt = dataclasses.replace(TTT, layers=(0, 1, 2), inner_lr=3.0)
  model = random_model(MODEL, AttentionConfig(window=1), ttt, seed=1)
  book, question = draw_prompts((16, 6))
  learned = generate(model, [book], max_new_tokens=0).state.fast_weights_only()
  assert not int(learned.cache.lengths[0])
  assert all(layer.attention.k.shape[1] == 0 for layer in learned.cache.layers)
  answer = generate(model, [question], max_new_tokens=0, state=learned)
  assert relative_error(answer.state.logits[0], read_whole(model, book + question)) < 1e-4
  assert relative_error(answer.state.logits[0], read_whole(model, question)) > 1e-2


def test_a_stop_token_ends_its_row_only(model):
  prompts = draw_prompts()
  free = generate(model, prompts, max_new_tokens=NEW)
  stop = as_lists(free)[0][3]
  result = generate(model, prompts, max_new_tokens=NEW, stop=(stop,))
  for row, (new, all_new) in enumerate(zip(as_lists(result), as_lists(free))):
    ends = all_new.index(stop) + 1 if stop in all_new else NEW
    assert new == all_new[:ends]
    expected = read_whole(model, prompts[row] + new)  # nothing was read behind the end
    assert relative_error(result.state.logits[row], expected) < 1e-4
  named = dataclasses.replace(Reader.of(model), model=dataclasses.replace(MODEL, eos_ids=(stop,)))
  assert as_lists(generate(named, prompts, max_new_tokens=NEW)) == as_lists(result)


def test_streaming_shows_the_tokens_as_they_are_made(model):
  prompts = draw_prompts()
  stream = Stream(model, prompts, max_new_tokens=NEW)
  parts = list(stream)
  assert len(parts) > 1
  joined = [[t for part in parts for t in part[row]] for row in range(len(prompts))]
  assert (
    joined == as_lists(generate(model, prompts, max_new_tokens=NEW)) == as_lists(stream.result())
  )


def test_caches_are_no_larger_than_they_must_be(model):
  """A window keeps as many keys; a fast weight one state and one chunk."""
  state = generate(model, draw_prompts((30, 2)), max_new_tokens=2).state
  c, f, d = TTT.chunk_size, MODEL.d_ff, MODEL.d_model
  for index, layer in enumerate(state.cache.layers):
    full = index in ATTENTION.full_layers
    assert layer.attention.k.shape[1] == (256 if full else ATTENTION.window)
    assert (layer.fast is not None) == (index in TTT.layers)
    if layer.fast is not None:
      assert layer.fast.s.shape == (2, f, d)
      assert layer.fast.z.size + layer.fast.source.size == 2 * c * (f + d)


def test_bfloat16_keeps_its_state_in_float32():
  model = learner(dataclasses.replace(TTT, inner_lr=3.0), dtype="bfloat16")
  prompts = draw_prompts()
  state = generate(model, prompts, max_new_tokens=4).state
  assert state.cache.layers[0].fast.s.dtype == jnp.float32
  assert (
    state.cache.layers[0].fast.z.dtype == state.cache.layers[0].attention.k.dtype == jnp.bfloat16
  )
  result = generate(model, prompts, max_new_tokens=4)
  for row, new in enumerate(as_lists(result)):
    assert relative_error(result.state.logits[row], read_whole(model, prompts[row] + new)) < 0.1


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"tokens": []}, "no rows"),
    ({"tokens": [[1], []]}, "prompt 1 is empty"),
    ({"tokens": [[1, 17]]}, "prompt 0 holds token 17, the model has 0 to 16"),
    ({"tokens": [[-1]]}, "token -1"),
    ({"tokens": np.zeros((2, 3), np.float32)}, "dtype float32, expected integers"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"stop": (17,)}, "stop=.*17"),
  ],
)
def test_bad_input(model, changes, message, unchecked_types):
  with pytest.raises(ValueError, match=message):
    generate(model, **{"tokens": [[1, 2]], "max_new_tokens": 3} | changes)


def test_a_state_has_rows(model):
  state = generate(model, [[1], [2]], max_new_tokens=1).state
  with pytest.raises(ValueError, match="tokens has 3 rows, the state 2"):
    generate(model, [[1], [2], [3]], max_new_tokens=1, state=state)
  with pytest.raises(ValueError, match="prompt 1 is empty"):
    generate(model, [[1], []], max_new_tokens=1, state=state.fast_weights_only())


def test_longer_than_the_model_was_trained_for_is_a_warning(model):
  short = dataclasses.replace(Reader.of(model), model=dataclasses.replace(MODEL, max_positions=20))
  with pytest.warns(UserWarning, match="21 tokens are more than the model's max_positions=20"):
    generate(short, [[1] * 19], max_new_tokens=2)
