"""Log-likelihoods and continuations of many texts against a model's own logits, one text at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from extras.rulers import word_pieces
from helpers import MODEL, TTT, random_model

from ttt_jax.checkpoints.tokenizer import byte_tokenizer
from ttt_jax.config import AttentionConfig
from ttt_jax.evaluation.scoring import Score, Scorer, rolling_windows, token_scores
from ttt_jax.generation.generate import generate
from ttt_jax.names import IGNORE

LEARNS = dataclasses.replace(TTT, layers=(0,), inner_lr=3.0, target="hidden_states")
SMALL = dataclasses.replace(MODEL, vocab_size=256, num_layers=1)
PAIRS = [
  ("to read", " is to learn"),
  ("", "nothing before"),
  ("blanks at the end  ", "go with what follows"),
  ("a longer context, of more than a few chunks of four tokens each, ", "x"),
  ("a longer context, of more than a few chunks of four tokens each, ", "another one"),
]


@pytest.fixture(scope="module")
def model():
  return random_model(SMALL, AttentionConfig(window=24), LEARNS, seed=1)


_logits = jax.jit(lambda model, tokens, update: model(tokens, update=update), static_argnums=2)


def log_probabilities(model, tokens, *, update=True):
  """Row t: of every successor of the tokens up to t; what fills the row up behind is not seen."""
  filled = np.zeros((1, 128), np.int32)
  filled[0, : len(tokens)] = tokens
  return np.asarray(jax.nn.log_softmax(_logits(model, filled, update)))[0, : len(tokens)]


def directly(model, context, continuation, *, update=True):
  bare = context.rstrip()  # blanks belong to the continuation
  read = list(bare.encode()) or [ord("\n")]
  scored = list((context[len(bare) :] + continuation).encode())
  rows = log_probabilities(model, read + scored, update=update)[len(read) - 1 : -1]
  return sum(rows[i, t] for i, t in enumerate(scored)), [*rows.argmax(-1)] == scored


def test_loglikelihoods(model):
  shown = []
  scores = Scorer(model, byte_tokenizer(), batch_size=2).loglikelihoods(PAIRS, shown.append)
  for (context, continuation), score in zip(PAIRS, scores):
    expected, greedy = directly(model, context, continuation)
    assert score.loglikelihood == pytest.approx(expected, rel=1e-5)
    assert score.greedy == greedy
  assert shown[-1] == len(PAIRS)


def test_what_the_model_would_write_is_greedy(model):
  (made,) = generate(model, [list(b"to read")], max_new_tokens=5, stop=()).new_tokens
  tokenizer = byte_tokenizer()
  tokenizer.encode = lambda text, **_: [ord(letter) for letter in text]  # also of no UTF-8
  scorer = Scorer(model, tokenizer, batch_size=2)
  text = "".join(map(chr, made))
  other = text[:-1] + chr((ord(text[-1]) + 1) % 256)
  pair = scorer._pair("to read", text)
  assert [score.greedy for score in scorer._score([pair], print)] == [pair.scored == 5]
  assert not scorer._score([scorer._pair("to read", other)], print)[0].greedy


def test_updates_off(model):
  frozen = Scorer(model, byte_tokenizer(), batch_size=2, update=False).loglikelihoods(PAIRS[-1:])[0]
  expected, _ = directly(model, *PAIRS[-1], update=False)
  assert frozen.loglikelihood == pytest.approx(expected, rel=1e-5)
  assert frozen != Scorer(model, byte_tokenizer(), batch_size=2).loglikelihoods(PAIRS[-1:])[0]


def test_few_logits_at_a_time_are_the_same(model):
  rng = np.random.default_rng(0)
  tokens, labels = rng.integers(0, 256, (2, 2, 13)).astype(np.int32)
  labels[0, 3:5] = IGNORE
  segments = np.ones_like(tokens)
  segments[1, 9:] = 0
  scores = jax.jit(token_scores, static_argnames="at_once")
  many = scores(model, tokens, labels, segments)
  few = scores(model, tokens, labels, segments, at_once=5 * 256)
  for a, b in zip(many, few):
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert np.all(np.asarray(many[0])[0, 3:5] == 0)
  assert np.all(np.asarray(many[1])[0, 3:5])


def test_only_the_last_tokens_are_read(model):
  scorer = Scorer(model, byte_tokenizer(), batch_size=2, max_length=12)
  context, continuation = PAIRS[-1][0].rstrip(), " another one"
  (score,) = scorer.loglikelihoods([(context, continuation)])
  kept = (context + continuation)[-13:]
  assert score.loglikelihood == pytest.approx(directly(model, kept[:1], kept[1:])[0], rel=1e-5)
  with pytest.raises(ValueError, match="continuation has 14 tokens, max_length=12"):
    scorer.loglikelihoods([("x", "a longer story")])


def test_rolling(model):
  texts = ["the-whole-of-a-text,-of-any-length", "short", ""]
  whole = Scorer(model, byte_tokenizer(), batch_size=2).rolling(texts)
  assert whole[:2] == pytest.approx([directly(model, "", text)[0] for text in texts[:2]], rel=1e-5)
  assert whole[2] == 0
  cut = Scorer(model, byte_tokenizer(), batch_size=2, max_length=15).rolling(texts[:1])[0]
  text = texts[0]
  parts = [("", text[:15]), (text[14], text[15:30]), (text[18:30], text[30:])]
  # The last one reads 15 tokens, as the harness has it.
  assert cut == pytest.approx(sum(directly(model, *part)[0] for part in parts), rel=1e-5)


@pytest.mark.parametrize("length", [1, 4, 7, 30, None])
def test_windows_score_every_token_once(length):
  tokens = [*range(10, 33)]
  predicted = []
  for window in rolling_windows(tokens, 5, length):
    assert len(window.tokens) - 1 <= (length or 23)
    assert (
      window.tokens
      == ([5, *tokens])[tokens.index(window.tokens[-1]) + 2 - len(window.tokens) :][
        : len(window.tokens)
      ]
    )
    predicted.extend(window.tokens[-window.scored :])
  assert predicted == tokens


def test_continuations(model):
  requests = [
    ("to read", {"max_gen_toks": 12, "until": []}),
    ("a text", {"max_gen_toks": 7}),
    ("a longer text that is longer", {"max_gen_toks": 12, "until": []}),
    (
      "to read",
      {"max_gen_toks": 12, "until": [], "do_sample": True, "temperature": 1.0, "seed": 3},
    ),
  ]
  texts = Scorer(model, byte_tokenizer(), batch_size=2).generate(requests)

  def alone(context, new, **how):
    (made,) = generate(model, [list(context.encode())], max_new_tokens=new, **how).new_tokens
    return byte_tokenizer().decode(made.tolist())

  assert texts[:3] == [alone("to read", 12), alone("a text", 7), alone(requests[2][0], 12)]
  assert texts[3] == alone("to read", 12, temperature=1.0, top_k=50, seed=3)
  assert texts[3] != texts[0]
  # It ends where a stop text begins, and no sooner.
  stop = texts[0][5:7]
  for until in (stop, ["not there", stop, ""]):
    (cut,) = Scorer(model, byte_tokenizer()).generate(
      [("to read", {"max_gen_toks": 12, "until": until})]
    )
    assert cut == texts[0][: texts[0].index(stop)]


# Options of the harness, and the arguments of `generate` that they mean, beside five new tokens.
ARGUMENTS = [
  ({"max_new_tokens": 5}, {}),
  ({"max_tokens": 5}, {}),
  ({"max_completion_tokens": 5}, {}),
  ({"max_gen_toks": 5, "max_new_tokens": 9, "max_tokens": 11}, {}),
  ({"max_gen_toks": None, "max_new_tokens": 5}, {}),
  ({"max_gen_toks": 5, "num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}, {}),
  ({"max_gen_toks": 5, "do_sample": False, "temperature": 3.0, "top_k": 2, "min_p": 0.5}, {}),
  ({"max_gen_toks": 5, "temperature": 0.0, "top_k": 0}, {}),
  (
    {"max_gen_toks": 5, "temperature": 3.0, "seed": 2},
    {"temperature": 3.0, "top_k": 50, "seed": 2},
  ),
  (
    {"max_gen_toks": 5, "do_sample": True, "temperature": 3.0, "top_k": None, "seed": 2},
    {"temperature": 3.0, "seed": 2},
  ),
  (
    {"max_gen_toks": 5, "temperature": 3.0, "top_k": 0, "top_p": 1, "seed": 2},
    {"temperature": 3.0, "seed": 2},
  ),
  (
    {"max_gen_toks": 5, "temperature": 3.0, "top_k": -1, "seed": 2},
    {"temperature": 3.0, "seed": 2},
  ),
  (
    {"max_gen_toks": 5, "temperature": 3.0, "top_k": 40, "min_p": 0.3, "seed": 2},
    {"temperature": 3.0, "top_k": 40, "min_p": 0.3, "seed": 2},
  ),
  (
    {"max_gen_toks": 5, "do_sample": True, "seed": 2},
    {"temperature": 1.0, "top_k": 50, "seed": 2},
  ),
  ({"max_gen_toks": 5, "do_sample": True, "temperature": 9.0, "top_p": 0}, {}),
]


@pytest.mark.parametrize(("options", "how"), ARGUMENTS)
def test_arguments_of_the_harness(model, options, how):
  """As the Hugging Face model of lm_eval 0.4.13 takes them, with transformers 4.57 or 5.24."""
  (text,) = Scorer(model, byte_tokenizer()).generate([("to read", options | {"until": []})])
  (made,) = generate(model, [list(b"to read")], max_new_tokens=5, **how).new_tokens
  assert text == byte_tokenizer().decode(made.tolist())


@pytest.mark.parametrize(("options", "how"), ARGUMENTS)
def test_the_harness_itself_agrees(options, how):
  utils = pytest.importorskip("lm_eval.models.utils")
  theirs = utils.normalize_gen_kwargs(options)
  assert theirs["max_gen_toks"] == 5
  assert theirs["do_sample"] == (bool(how) or options.get("top_p") == 0)


def test_stops_early(model, monkeypatch):
  """No more tokens are made once every row has met its stop text."""
  from ttt_jax.evaluation import scoring

  made = []

  class Counted(scoring.Stream):
    def __next__(self):
      tokens = super().__next__()
      made.append(len(tokens[0]))
      return tokens

  monkeypatch.setattr(scoring, "Stream", Counted)
  scorer = Scorer(model, byte_tokenizer())
  (text,) = scorer.generate([("to read", {"max_gen_toks": 64, "until": []})])
  whole = sum(made)
  made.clear()
  scorer.generate([("to read", {"max_gen_toks": 64, "until": [text[0]]})])
  assert sum(made) < whole / 2


def test_a_token_that_ends_the_texts_of_the_tokenizer_ends_one(model):
  """A model trained from scratch has no such token of its own."""
  assert not model.model.eos_ids
  (made,) = generate(model, [list(b"to read")], max_new_tokens=12).new_tokens
  tokenizer = byte_tokenizer()
  tokenizer.eos_ids = (int(made[7]),)
  (text,) = Scorer(model, tokenizer).generate([("to read", {"max_gen_toks": 12})])
  end = made.tolist().index(made[7]) + 1
  assert text == byte_tokenizer().decode(made[:end].tolist())


def test_a_pair_is_one_text_in_tokens(model):
  scorer = Scorer(
    random_model(dataclasses.replace(SMALL, vocab_size=400), AttentionConfig(), LEARNS),
    word_pieces(),
  )
  tokenizer = word_pieces()
  window = scorer._pair("The grass is ", "green.")
  assert window.tokens == tokenizer.encode("The grass is green.")
  assert tokenizer.decode(window.tokens[-window.scored :]) == " green."


def test_bad_input(model):
  for name, value in (
    ("batch_size", 0),
    ("max_length", -1),
    ("max_gen_toks", 0),
  ):
    with pytest.raises(ValueError, match=f"{name}="):
      Scorer(model, byte_tokenizer(), **{name: value})
  scorer = Scorer(model, byte_tokenizer(), max_length=20)
  with pytest.raises(
    ValueError, match=r"option 'num_beams' is not one of until.*4 given; 1 passes"
  ):
    scorer.generate([("x", {"num_beams": 4})])
  with pytest.raises(ValueError, match="option 'magic' is not one of until"):
    scorer.generate([("x", {"magic": 1})])
  for options in ({"do_sample": True, "temperature": 0.0}, {"temperature": -1.0}):
    with pytest.raises(ValueError, match="must be above 0, or 0 without do_sample"):
      scorer.generate([("x", options)])
  with pytest.raises(ValueError, match=r"min_p=1\.5 must be in \[0, 1\]"):
    scorer.generate([("x", {"max_gen_toks": 5, "temperature": 1.0, "min_p": 1.5})])
  with pytest.raises(ValueError, match="max_length=20 has no room for 20 tokens"):
    scorer.generate([("x", {"max_gen_toks": 20})])
  with pytest.raises(ValueError, match="has no tokens of its own"):
    scorer.loglikelihoods([("x", "")])
  with pytest.raises(ValueError, match="do not belong together"):
    Scorer(random_model(), byte_tokenizer())
  assert Score(-1.0, True) == (-1.0, True)
