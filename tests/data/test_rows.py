"""Tests streams of rows: mixtures, alignment, any number of processes, restoring a state."""

import itertools
import json
from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from ttt_jax import data
from ttt_jax.config import AttendBlocks
from ttt_jax.data.interleave import Interleave
from ttt_jax.data.rows import packing_bins

LENGTHS = (1, 3, 12, 7, 8, 9, 30, 5, 16, 2)
OPTIONS = {"seq_len": 8, "batch_size": 4, "seed": 3}
BLOCKS = {"attend": AttendBlocks((2, 4)), "attend_fraction": 0.6, "chunk_size": 2}


def source(lengths, *, low=0, high=256, weight=1.0, seed=0):
  rng = np.random.default_rng(seed)
  documents = data.InMemory(
    data.Document(f"{i}.txt", rng.integers(low, high, length, dtype=np.uint8))
    for i, length in enumerate(lengths)
  )
  return data.Source("made up", documents, data.InMemory(), weight)


def mixture():
  return [source(LENGTHS), source((4, 20, 5), weight=0.5, seed=1)]


def take(rows, count):
  return list(itertools.islice(rows, count))


def assert_same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys() >= {"tokens", "labels", "segment_ids"}
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


# Interleaving.


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_each_order_has_its_share_of_every_stretch(seed):
  shares = (5.0, 2.5, 0.7, 0.01)
  interleave = Interleave(shares, None if seed is None else (seed,))
  counts = np.zeros(4, int)
  for k in range(5000):
    order, place = interleave(k)
    assert place == counts[order]  # each order is taken one after another
    counts[order] += 1
    expected = (k + 1) * np.array(shares) / sum(shares)
    assert np.abs(counts - expected).max() < len(shares)
  assert counts[3] > 0


def test_seeds_shift_the_turns():
  turns = {tuple(Interleave([1.0, 1.0], (seed,))(k)[0] for k in range(6)) for seed in range(20)}
  assert turns == {(0, 1) * 3, (1, 0) * 3}


# Mixtures.


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.05, 0.95)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_weights_are_parts_of_the_tokens(weights, batch_size):
  """Mixes a source of long documents with a source of short ones, in every row slot."""
  long = source([40, 31, 64, 50] * 5, high=100, weight=weights[0])
  short = source([2, 3, 4, 1, 5] * 9, low=100, weight=weights[1])
  with closing(
    data.training_rows([long, short], seq_len=16, batch_size=batch_size, seed=0)
  ) as rows:
    batches = take(rows, 600)
  tokens = np.stack([batch["tokens"] for batch in batches])
  valid = np.stack([batch["segment_ids"] for batch in batches]) > 0
  for slot in range(batch_size):
    part = np.mean(tokens[:, slot][valid[:, slot]] < 100)
    assert part == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_every_source_has_each_token_once_per_epoch():
  """Two streams of one row each take the epochs of both sources apart."""
  sources = [source([8] * 64), source([8] * 64, seed=1)]
  with closing(data.training_rows(sources, seq_len=8, batch_size=2, seed=0)) as rows:
    batches = take(rows, 64)
  found = Counter(row.tobytes() for batch in batches for row in batch["tokens"].astype(np.uint8))
  expected = {d.tokens.tobytes() for each in sources for d in each.train}
  assert found == dict.fromkeys(expected, 1)


def test_heldout_documents_by_weight():
  a, b = source([9, 3, 8, 12, 30, 9], high=100), source([9] * 9, low=100)
  sources = [
    data.Source("a", data.InMemory(), a.train, 2.0),
    data.Source("b", data.InMemory(), b.train, 1.0),
  ]
  rows = data.heldout_rows(sources, seq_len=8, max_documents=6, seed=0)
  assert (rows[:, 0] < 100).sum() == 4
  rows = data.heldout_rows(sources, seq_len=8, max_documents=99, seed=0)
  assert (rows[:, 0] < 100).sum() == 5
  assert len(rows) == 14


# Alignment.


@pytest.mark.parametrize("align", [1, 4])
def test_aligned_documents_begin_at_chunks(align):
  documents = source((1, 3, 13, 7, 8, 9, 30, 5, 16, 2))
  with closing(
    data.training_rows([documents], seq_len=16, batch_size=2, seed=0, align=align)
  ) as rows:
    batches = take(rows, 100)
  found, starts = set(), set()
  for batch in batches:
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
      for segment in range(1, ids.max() + 1):
        at = np.flatnonzero(ids == segment)
        assert (np.diff(at) == 1).all()
        starts.add(at[0] % 4)
        found.add(tokens[at].astype(np.uint8).tobytes())
  assert starts == ({0} if align == 4 else {0, 1, 2, 3})
  wholes = [d.tokens.tobytes() for d in documents.train]
  assert found == {whole[i : i + 16] for whole in wholes for i in range(0, len(whole), 16)}


def test_labels_end_with_their_document():
  with closing(
    data.training_rows([source(LENGTHS)], seq_len=16, batch_size=2, seed=0, align=4)
  ) as rows:
    batch = next(rows)
  tokens, ids, labels = batch["tokens"], batch["segment_ids"], batch["labels"]
  for b, t in np.ndindex(tokens.shape):
    follows = t + 1 < 16 and ids[b, t] == ids[b, t + 1] != 0
    assert labels[b, t] == (tokens[b, t + 1] if follows else data.IGNORE)


# Processes.


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[1, 2, 3], [0, 1]]])
def test_rows_do_not_depend_on_the_processes(parts):
  with closing(data.training_rows(mixture(), **OPTIONS)) as rows:
    whole = take(rows, 100)
  for slots in parts:
    with closing(data.training_rows(mixture(), slots=slots, **OPTIONS)) as rows:
      assert rows.slots == tuple(slots)
      mine = take(rows, 100)
    assert_same(mine, [{name: x[slots] for name, x in batch.items()} for batch in whole])


def test_rows_of_a_batch_differ():
  with closing(data.training_rows([source([8] * 256)], **OPTIONS)) as rows:
    batches = take(rows, 64)
  firsts = {row.tobytes() for batch in batches for row in batch["tokens"]}
  assert len(firsts) == 256


@pytest.mark.parametrize(
  ("steps", "before", "attend"),
  [*itertools.product([0, 20, 64, 130], [1, 4], [{}]), (20, 4, BLOCKS), (130, 1, BLOCKS)],
)
def test_going_on_with_any_number_of_processes(steps, before, attend):
  """Restores at, after and before the end of the 64 rows that a stream packs at a time."""
  options = OPTIONS | attend
  groups = np.split(np.arange(4), before)
  states = []
  for slots in groups:
    with closing(data.training_rows(mixture(), slots=slots.tolist(), **options)) as rows:
      take(rows, steps)
      states.append(json.loads(json.dumps(rows.get_state())))
  state = json.loads(json.dumps(data.merge_states(states)))
  with closing(data.training_rows(mixture(), **options)) as rows:
    expected = take(rows, steps + 80)[steps:]
    rows.set_state(state)  # backwards, too
    assert data.merge_states([rows.get_state()]) == state
    assert_same(take(rows, 80), expected)
  for slots in ([0, 1, 2], [3]):
    with closing(data.training_rows(mixture(), slots=slots, **options)) as rows:
      rows.set_state(state)
      assert_same(take(rows, 80), [{k: x[slots] for k, x in batch.items()} for batch in expected])


def test_a_state_of_other_data_is_refused():
  with closing(data.training_rows(mixture(), **OPTIONS)) as rows:
    state = rows.get_state()
  changed = [source((*LENGTHS, 4)), mixture()[1]]
  with (
    closing(data.training_rows(changed, **OPTIONS)) as rows,
    pytest.raises(ValueError, match=r"data has changed .* \[16, 5\] pieces .* now \[17, 5\]"),
  ):
    rows.set_state(state)


def test_memory_of_the_rows_packed_at_a_time_is_bounded():
  assert packing_bins(8) == packing_bins(4096) == packing_bins(32768) == 64
  assert packing_bins(131072) == 16
  assert packing_bins(1 << 20) == 8


# Blocks of attention.


def test_attention_starts_again_at_documents_and_after_whole_chunks():
  sources = [source([64, 40, 23, 9, 64, 64])]
  options = {"seq_len": 64, "batch_size": 2, "chunk_size": 4, "attend": AttendBlocks((8, 20))}
  with closing(data.training_rows(sources, seed=0, attend_fraction=0.5, **options)) as rows:
    batches = take(rows, 300)
  documents, blocks = (
    np.concatenate([batch[name] for batch in batches])
    for name in ("segment_ids", "attention_segment_ids")
  )
  assert ((documents == 0) == (blocks == 0)).all()
  starts = np.diff(blocks, axis=1, prepend=0) > 0
  at_documents = np.diff(documents, axis=1, prepend=0) > 0
  assert starts[at_documents].all()
  assert blocks.max(axis=1).tolist() == starts.sum(axis=1).tolist()  # 1, 2, ...
  cut = blocks.max(axis=1) > documents.max(axis=1)
  assert 0.4 < cut.mean() < 0.6
  lengths = set()
  for row in starts[cut & (documents.max(axis=1) == 1) & (documents[:, -1] == 1)]:
    places = np.flatnonzero(row)
    assert (places % 4 == 0).all()
    lengths |= set(np.diff(places).tolist())
  assert lengths == {8, 12, 16, 20}
  assert (blocks[~cut] == documents[~cut]).all()


def test_blocks_leave_the_rows_as_they_are():
  with closing(data.training_rows(mixture(), **OPTIONS)) as rows:
    plain = take(rows, 50)
  with closing(data.training_rows(mixture(), **OPTIONS, **BLOCKS)) as rows:
    cut = take(rows, 50)
  for row in cut:
    del row["attention_segment_ids"]
  assert_same(plain, cut)
