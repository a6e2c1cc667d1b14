"""Registers models of this library with the lm-evaluation-harness (package `lm_eval`), as `ttt_jax`.

In Python, `lm_eval.simple_evaluate(model=TTTHarness(model, tokenizer), tasks=[...])`. The harness's command
line does not look for models in other packages; this module registers its own and calls it:

  python -m ttt_jax.evaluation.harness run --model ttt_jax --model_args pretrained=models/mine --tasks ...
"""

from collections.abc import Callable, Sequence
from typing import Any

from ttt_jax.checkpoints.open import open_model, open_tokenizer
from ttt_jax.checkpoints.tokenizer import Tokenizer
from ttt_jax.errors import UserError
from ttt_jax.evaluation.scoring import Scorer
from ttt_jax.nn.transformer import Transformer
from ttt_jax.progress import Progress

try:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    "the harness adapter needs the package lm_eval: pip install 'ttt_jax[eval]'", name=error.name
  ) from error


@register_model("ttt_jax")
class TTTHarness(LM):
  """The model's fast weights learn along every text that it scores or continues.

  Every request starts from the trained weights: nothing is kept from one request to the next. Generation
  arguments mean the same as for the harness's Hugging Face model (`Scorer.generate`).

  Args:
    model, tokenizer: the results of `load_pretrained` and `load_tokenizer`; omit both to give `pretrained`.
    pretrained: a Hugging Face directory, a `.gguf` file, or a run directory.
    dtype: the dtype of weights and computation of `pretrained`.
    batch_size, max_length, max_gen_toks, update: see `Scorer`.
    max_batch_size, device: ignored; the command line passes them. The device is JAX's default device.
  """

  def __init__(
    self,
    model: Transformer | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    pretrained: str | None = None,
    dtype: str | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
    max_gen_toks: int = 256,
    update: bool = True,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    if (model is None) != (tokenizer is None) or (model is None) == (pretrained is None):
      raise UserError("give a model and its tokenizer, or pretrained=PATH")
    if model is None:
      tokenizer, model = open_tokenizer(pretrained), open_model(pretrained, dtype=dtype)
    if isinstance(batch_size, str):
      if not batch_size.isdecimal():
        raise UserError(
          f"batch_size={batch_size!r} must be a number: ttt_jax does not search for one"
        )
      batch_size = int(batch_size)
    self._scorer = Scorer(
      model,
      tokenizer,
      batch_size=batch_size,
      max_length=max_length,
      max_gen_toks=max_gen_toks,
      update=update,
    )

  def loglikelihood(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[tuple[float, bool]]:
    scores = self._ask("loglikelihood", requests, self._scorer.loglikelihoods)
    return [tuple(score) for score in scores]

  def loglikelihood_rolling(
    self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    def rolling(arguments, show):
      return self._scorer.rolling([text for (text,) in arguments], show)

    return self._ask("loglikelihood_rolling", requests, rolling)

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    return self._ask("generate_until", requests, self._scorer.generate)

  def _ask(self, kind: str, requests: Sequence[Instance], answer: Callable) -> list[Any]:
    """Answers all requests, and adds the answers to the harness's cache."""
    arguments = [request.args for request in requests]
    with Progress(kind, len(requests)) as progress:
      results = answer(arguments, lambda done: progress.update(done, ""))
    for request, result in zip(arguments, results):
      self.cache_hook.add_partial(kind, request, result)
    return results


if __name__ == "__main__":
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()
