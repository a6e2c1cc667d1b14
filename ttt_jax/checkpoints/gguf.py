"""Opens GGUF files of Llama architecture: metadata as a config.json, tensors by Hugging Face names.

The package `gguf` parses the file and dequantises. llama.cpp rotates neighbouring channels where Llama's
published layout rotates channels half a head apart, so its files hold permuted query and key projections.
`gguf_keys.py` lists the known metadata, `gguf_special.py` finds the special tokens, and `gguf_tokenizer.py`
makes the tokenizer.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from ttt_jax.checkpoints.files import StoredTensor, gguf_parts
from ttt_jax.checkpoints.gguf_keys import (
  ARCHITECTURE,
  check_heads,
  check_keys,
  need_number,
  rope_scaling,
)
from ttt_jax.checkpoints.gguf_special import special_tokens
from ttt_jax.checkpoints.tensors import EMBEDDING, HEAD
from ttt_jax.config import RopeScaling
from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.nn.rope import scaled_frequencies

_NAMES = {"token_embd": EMBEDDING, "output_norm": "model.norm.weight", "output": HEAD}
_LAYER_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"


def load_gguf(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
  """Returns metadata by key and the stored tensors, of all parts of a split file.

  Raises:
    UserError: the file is cut short, damaged or not GGUF, or one of its parts is missing.
  """
  parts = gguf_parts(path)
  if missing := [part.name for part in parts if not part.is_file()]:
    raise UserError(
      f"{path} is one of {len(parts)} parts of a model, of which {', '.join(missing[:5])}"
      f"{', ...' if len(missing) > 5 else ''} {'is' if len(missing) == 1 else 'are'} not there: download "
      "the whole model"
    )
  fields, tensors = _load_part(parts[0])
  count = fields.get("split.count", 1)
  if max(count, 1) != len(parts):
    raise UserError(
      f"{path}: split.count={count}, but its name is that of one of {len(parts)} parts: llama.cpp names "
      f"them as model-00001-of-{count:05}.gguf"
    )
  for part in parts[1:]:
    tensors += _load_part(part)[1]
  expected = fields.get("split.tensors.count", len(tensors))
  if expected != len(tensors) or len({tensor.name for tensor in tensors}) != len(tensors):
    raise UserError(
      f"{path}: the {len(parts)} parts hold {len(tensors)} tensors, and split.tensors.count is {expected}: "
      "they are parts of different models, download the model again"
    )
  return fields, tensors


def _load_part(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
  try:
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  except (ValueError, IndexError, KeyError) as error:
    raise UserError(
      f"{path} is cut short, damaged or no GGUF file ({error}): download it again"
    ) from error
  return fields, list(reader.tensors)


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """Returns the metadata as a config.json, and the tensors, which are dequantised when they are read.

  Raises:
    UserError: the file is damaged, or its metadata lacks a size of the model.
    UnsupportedError: the architecture or a feature is not supported.
  """
  fields, stored = load_gguf(path)
  architecture = fields.get("general.architecture")
  if architecture != ARCHITECTURE:
    raise UnsupportedError(
      f"{path}: general.architecture={architecture!r} is not supported, only {ARCHITECTURE!r}"
    )
  check_keys(path, fields)
  tensors = {tensor.name: tensor for tensor in stored}
  config = _config(path, fields, tensors)
  frequencies = tensors.pop(_ROPE_FREQUENCIES, None)
  if frequencies is not None:
    if config["rope_scaling"] is not None:
      raise UnsupportedError(
        f"{path} scales its rotary frequencies twice, by {_ROPE_FREQUENCIES} and by "
        f"{config['rope_scaling']}: one is supported"
      )
    config["rope_scaling"] = _llama3_scaling(path, config, frequencies)
  heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
  return config, {
    _hf_name(name): _stored(tensor, heads.get(name.split(".")[-2]))
    for name, tensor in tensors.items()
  }


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
  def optional(name: str, default: Any, kind: type = int) -> Any:
    is_given = fields.get(f"{ARCHITECTURE}.{name}") is not None
    return need_number(path, fields, name, kind) if is_given else default

  d, heads = (need_number(path, fields, x) for x in ("embedding_length", "attention.head_count"))
  head_dim = optional("attention.key_length", d // heads)
  check_heads(path, fields, head_dim)
  if "token_embd.weight" not in tensors:
    raise UserError(f"{path} has no token_embd.weight: the model is incomplete, download it again")
  biased = [f"blk.0.attn_{x}.bias" in tensors for x in ("q", "output")]
  special = special_tokens(fields)
  return {
    # A Llama config has biases on all four projections or none; biases on three are Qwen2's.
    "model_type": "qwen2" if biased == [True, False] else "llama",
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": d,
    "intermediate_size": need_number(path, fields, "feed_forward_length"),
    "num_hidden_layers": need_number(path, fields, "block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": optional("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "rms_norm_eps": need_number(path, fields, "attention.layer_norm_rms_epsilon", float),
    "rope_theta": optional("rope.freq_base", 10000.0, float),
    "rope_scaling": rope_scaling(path, fields),
    "max_position_embeddings": optional("context_length", None),
    "attention_bias": any(biased),
    "tie_word_embeddings": "output.weight" not in tensors,
    "bos_token_id": special.bos_id,
    "eos_token_id": list(special.eos_ids),
  }


def _llama3_scaling(path: Path, config: dict[str, Any], tensor: ReaderTensor) -> dict[str, Any]:
  """Returns the llama3 scaling whose frequencies are the plain frequencies divided by the tensor.

  The file holds these divisors, not the parameters behind them; the parameters of Llama 3.1 are tried.
  """
  divisors = dequantize(tensor.data, tensor.tensor_type)
  k, theta = config["head_dim"], config["rope_theta"]
  guess = RopeScaling("llama3", float(divisors.max()), original_max_positions=8192)
  plain, _ = scaled_frequencies(k, theta, RopeScaling("linear"))
  guessed, _ = scaled_frequencies(k, theta, guess)
  if divisors.shape != plain.shape or not np.allclose(plain / guessed, divisors, rtol=1e-4):
    raise UnsupportedError(
      f"{path}: {_ROPE_FREQUENCIES} is not the rope scaling of Llama 3.1 (low_freq_factor 1, "
      "high_freq_factor 4, trained on 8192 positions), the only scaling that its numbers can identify: "
      "use the Hugging Face checkpoint"
    )
  return {
    "rope_type": "llama3",
    "factor": guess.factor,
    "low_freq_factor": guess.low_freq_factor,
    "high_freq_factor": guess.high_freq_factor,
    "original_max_position_embeddings": guess.original_max_positions,
  }


def _hf_name(name: str) -> str:
  """Translates `blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; keeps unknown names."""
  parts = name.split(".")
  if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER_NAMES:
    return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
  return _NAMES.get(parts[0], name) if parts[1:] == ["weight"] else name


def _stored(tensor: ReaderTensor, permuted_heads: int | None) -> StoredTensor:
  shape = tuple(int(size) for size in reversed(tensor.shape))
  read = partial(_dequantize, tensor, shape, permuted_heads)
  return StoredTensor(shape, np.dtype(np.float32), read)


def _dequantize(
  tensor: ReaderTensor, shape: tuple[int, ...], permuted_heads: int | None
) -> np.ndarray:
  values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
  return values if permuted_heads is None else unpermute(values, permuted_heads)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
  """Moves rows 2 i, 2 i + 1 of each head of a query or key projection (llama.cpp) to i, i + K/2."""
  pairs = x.reshape(heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)
