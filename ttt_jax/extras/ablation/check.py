"""Checks before training that a grid's documents suffice for the evaluations after it."""

from collections.abc import Iterable

from ttt_jax.checkpoints.tokenizer import load_tokenizer
from ttt_jax.config import Config
from ttt_jax.data import Corpus, heldout_rows, load_corpus
from ttt_jax.errors import UserError
from ttt_jax.evaluation.heldout import evaluation_rows
from ttt_jax.extras.ablation.grid import Ablation, Variant
from ttt_jax.extras.recall.task import distances


def check_questions(ablation: Ablation, runs: Iterable[tuple[Variant, Config]]) -> None:
  """Raises UserError if the held-out documents of a run cannot answer the grid's `probe` or `recall`.

  A corpus that cannot be loaded is no error here: the run itself reports it before its first step.
  """
  corpora = {}
  for variant, config in runs:
    key = config.data, config.tokenizer
    if key not in corpora:
      corpora[key] = _corpus(config)
    if corpora[key] is None:
      continue
    try:
      _check_probe(ablation, config, corpora[key])
      _check_recall(ablation, config, corpora[key])
    except UserError as error:
      raise UserError(f"{ablation.name}, variant {variant.name!r}: {error}") from error


def _corpus(config: Config) -> Corpus | None:
  try:
    tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
    return load_corpus(config.data, seed=config.seed, tokenizer=tokenizer)
  except UserError:
    return None


def _check_probe(ablation: Ablation, config: Config, corpus: Corpus) -> None:
  probe = ablation.probe
  if probe is None:
    return
  heldout_rows(
    corpus.sources,
    seq_len=probe.tokens,
    max_documents=1,
    seed=probe.seed,
    name="the longest of probe.lengths and the probe.block behind it",
  )
  for n in probe.reset_every:
    if config.ttt.layers and n % config.ttt.chunk_size:
      raise UserError(
        f"probe.reset_every={n} is not a multiple of ttt.chunk_size={config.ttt.chunk_size}: a chunk is "
        "learned whole"
      )


def _check_recall(ablation: Ablation, config: Config, corpus: Corpus) -> None:
  if ablation.recall is None:
    return
  if corpus.tokenizer is not None:
    raise UserError(
      f"recall: data.tokenizer={config.tokenizer!r}: the recall task is written in bytes, use bytes"
    )
  for row in evaluation_rows(config, corpus):
    distances(row)
