"""GGUF files of Llama architecture: metadata as a config.json, tensors under their Hugging Face names.

The package `gguf` parses the file and dequantises. llama.cpp rotates neighbouring channels where Llama's
published layout rotates channels half a head apart, so its files hold permuted query and key projections.
The tokenizer inside is `gguf_tokenizer.py`'s.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from ttt_jax.config import RopeScaling
from ttt_jax.errors import UnsupportedError, UserError
from ttt_jax.nn.rope import scaled_frequencies
from ttt_jax.pretrained.files import StoredTensor
from ttt_jax.pretrained.tensors import EMBEDDING, HEAD

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


def read_gguf(path: Path) -> tuple[dict[str, Any], list[ReaderTensor]]:
  """Metadata by key, and the tensors as they are stored.

  Raises:
    ValueError: the file is cut short, damaged or no GGUF.
  """
  try:
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
  except (ValueError, IndexError, KeyError, OSError) as error:
    raise UserError(
      f"{path} is cut short, damaged or no GGUF file ({error}): download it again"
    ) from error
  return fields, reader.tensors


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
  """The config.json that the metadata stands for, and the tensors, dequantised when read.

  Raises:
    ValueError: a damaged file, or metadata without a size of the model.
    NotImplementedError: an architecture or feature that is not there, by name.
  """
  fields, stored = read_gguf(path)
  architecture = fields.get("general.architecture")
  if architecture != "llama":
    raise UnsupportedError(
      f"{path}: general.architecture={architecture!r} is not supported, only 'llama'"
    )
  _refuse_features(path, fields)
  tensors = {tensor.name: tensor for tensor in stored}
  config = _config(path, fields, tensors)
  frequencies = tensors.pop(_ROPE_FREQUENCIES, None)
  if frequencies is not None:
    config["rope_scaling"] = _llama3_scaling(path, config, frequencies)
  heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
  return config, {
    _hf_name(name): _stored(tensor, heads.get(name.split(".")[-2]))
    for name, tensor in tensors.items()
  }


def special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
  """`bos_token_id` and `eos_token_id` as in config.json."""
  ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
  return {
    "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": list(dict.fromkeys(token for token in ends if token is not None)),
  }


def _refuse_features(path: Path, fields: dict[str, Any]) -> None:
  for key, supported in (
    ("expert_count", (None, 0)),
    ("rope.scaling.type", (None, "none", "linear")),
    ("attention.sliding_window", (None, 0)),
  ):
    value = fields.get(f"llama.{key}")
    if value not in supported:
      raise UnsupportedError(f"{path}: llama.{key}={value!r} is not supported")


def _config(path: Path, fields: dict[str, Any], tensors: dict[str, ReaderTensor]) -> dict[str, Any]:
  def need(key: str) -> int:
    value = fields.get(f"llama.{key}")
    if not isinstance(value, int):
      raise UserError(f"{path}: llama.{key}={value!r} must be one number")
    return value

  d, heads = need("embedding_length"), need("attention.head_count")
  head_dim = fields.get("llama.attention.key_length", d // heads)
  rotated = fields.get("llama.rope.dimension_count", head_dim)
  if rotated != head_dim:
    raise UnsupportedError(
      f"{path}: llama.rope.dimension_count={rotated} of {head_dim} channels of a head is not supported"
    )
  if "token_embd.weight" not in tensors:
    raise UserError(f"{path} has no token_embd.weight: it is not a whole model")
  scaling = None
  if fields.get("llama.rope.scaling.type") == "linear":
    scaling = {"rope_type": "linear", "factor": fields.get("llama.rope.scaling.factor", 1.0)}
  return {
    "model_type": "llama",
    "vocab_size": int(tensors["token_embd.weight"].shape[1]),
    "hidden_size": d,
    "intermediate_size": need("feed_forward_length"),
    "num_hidden_layers": need("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
    "head_dim": head_dim,
    "rms_norm_eps": fields.get("llama.attention.layer_norm_rms_epsilon", 1e-6),
    "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
    "rope_scaling": scaling,
    "max_position_embeddings": fields.get("llama.context_length"),
    "attention_bias": "blk.0.attn_q.bias" in tensors,
    "tie_word_embeddings": "output.weight" not in tensors,
    **special_tokens(fields),
  }


def _llama3_scaling(path: Path, config: dict[str, Any], tensor: ReaderTensor) -> dict[str, Any]:
  """The llama3 scaling whose frequencies are the plain ones divided by the tensor.

  The file holds the divisors, not the parameters they were made of: those of Llama 3.1 are tried.
  """
  divisors = dequantize(tensor.data, tensor.tensor_type)
  k, theta = config["head_dim"], config["rope_theta"]
  guess = RopeScaling("llama3", float(divisors.max()), original_max_positions=8192)
  plain, _ = scaled_frequencies(k, theta, RopeScaling("linear"))
  guessed, _ = scaled_frequencies(k, theta, guess)
  if divisors.shape != plain.shape or not np.allclose(plain / guessed, divisors, rtol=1e-4):
    raise UnsupportedError(
      f"{path}: {_ROPE_FREQUENCIES} is not the rope scaling of Llama 3.1 (low_freq_factor 1, "
      "high_freq_factor 4, trained on 8192 positions), the only one that can be told from its numbers: "
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
  """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; an unknown one as it is."""
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
  """Rows of a query or key projection from llama.cpp's order: (2 i, 2 i + 1) -> (i, i + K/2) of a head."""
  pairs = x.reshape(heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)
