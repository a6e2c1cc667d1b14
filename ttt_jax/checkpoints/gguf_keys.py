"""Lists the known metadata of a Llama's GGUF file, and the values that would change the numbers.

Keys in the architecture's namespace are of three kinds: `gguf.py` uses them, they describe the file, or
they belong to other models and are refused unless they switch a feature off. Unknown keys are refused too,
since llama.cpp adds keys with every new kind of model.
"""

import math
from pathlib import Path
from typing import Any

from ttt_jax.errors import UnsupportedError, UserError

ARCHITECTURE = "llama"

_USED = {
  "attention.head_count",
  "attention.head_count_kv",
  "attention.key_length",
  "attention.layer_norm_rms_epsilon",
  "attention.scale",
  "attention.value_length",
  "block_count",
  "context_length",
  "embedding_length",
  "feed_forward_length",
  "rope.dimension_count",
  "rope.freq_base",
  "rope.scale_linear",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.type",
}
_DESCRIPTIONS = {"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"}
# The values that switch a feature off; the first is llama.cpp's default without the key.
_SWITCHED_OFF = {
  "attention.causal": (True,),
  "attention.clamp_kqv": (0,),
  "attention.max_alibi_bias": (0,),
  "attention.output_scale": (0, 1),
  "attention.sliding_window": (0,),
  "attention.temperature_length": (0,),
  "attention.temperature_scale": (0,),
  "attention.value_scale": (0, 1),
  "attn_logit_softcapping": (0,),
  "embedding_scale": (0, 1),
  "expert_count": (0,),
  "expert_feed_forward_length": (0,),
  "expert_group_count": (0,),
  "expert_group_used_count": (0,),
  "expert_shared_count": (0,),
  "expert_shared_feed_forward_length": (0,),
  "expert_used_count": (0,),
  "final_logit_softcapping": (0,),
  "interleave_moe_layer_step": (0,),
  "leading_dense_block_count": (0,),
  "logit_scale": (0, 1),
  "nextn_predict_layers": (0,),
  "pooling_type": (0,),
  "residual_scale": (0, 1),
  "rope.scaling.attn_factor": (1,),
  "rope.scaling.yarn_attn_factor": (1,),
  "rope.scaling.yarn_beta_fast": (32,),
  "rope.scaling.yarn_beta_slow": (1,),
  "rope.scaling.yarn_ext_factor": (-1,),
  "rope.scaling.yarn_log_multiplier": (0,),
  "router_logit_softcapping": (0,),
  "swin_norm": (False,),
  "use_parallel_residual": (False,),
}


def check_keys(path: Path, fields: dict[str, Any]) -> None:
  """Raises UnsupportedError for an unknown key, or for a value that would change the numbers."""
  prefix = f"{ARCHITECTURE}."
  for key, value in fields.items():
    name = key.removeprefix(prefix)
    if name == key or name in _USED | _DESCRIPTIONS:
      continue
    if name not in _SWITCHED_OFF:
      raise UnsupportedError(
        f"{path}: {key}={value!r} is unknown to ttt_jax and may change what the model computes: use the "
        "Hugging Face checkpoint, or delete the key if it has no effect"
      )
    if value not in _SWITCHED_OFF[name]:
      raise UnsupportedError(
        f"{path}: {key}={value!r} is not supported, only {_SWITCHED_OFF[name][0]!r}"
      )


def need_number(path: Path, fields: dict[str, Any], name: str, kind: type = int) -> Any:
  """Returns a number of the architecture; in a list per layer, all layers must have the same number.

  Raises:
    UserError: the key is missing or its value is not a number.
    UnsupportedError: the layers differ.
  """
  key = f"{ARCHITECTURE}.{name}"
  value = fields.get(key)
  if isinstance(value, list) and value:
    if len(set(value)) > 1:
      raise UnsupportedError(f"{path}: {key}={value} differs between layers: it must be one number")
    value = value[0]
  if isinstance(value, bool) or not isinstance(value, int | kind):
    raise UserError(f"{path}: {key}={value!r} must be one number")
  return value


def check_heads(path: Path, fields: dict[str, Any], head_dim: int) -> None:
  """Raises UnsupportedError unless heads are rotated whole and scaled by 1/sqrt(head_dim)."""
  for name in ("rope.dimension_count", "attention.value_length"):
    size = fields.get(f"{ARCHITECTURE}.{name}", head_dim)
    if size != head_dim:
      raise UnsupportedError(
        f"{path}: {ARCHITECTURE}.{name}={size} is not supported, only all {head_dim} channels of a head"
      )
  scale = fields.get(f"{ARCHITECTURE}.attention.scale", 0.0)
  if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
    raise UnsupportedError(
      f"{path}: {ARCHITECTURE}.attention.scale={scale} is not supported, only 1/sqrt({head_dim})"
    )


def rope_scaling(path: Path, fields: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the rope scaling as in config.json, by llama.cpp's rules; None means no scaling.

  The default type is linear, a factor of 0 means no scaling, and `rope.scale_linear` is its old name.
  """

  def value(name: str, default: Any = None) -> Any:
    return fields.get(f"{ARCHITECTURE}.rope.{name}", default)

  kind = value("scaling.type", "linear")
  if kind not in ("none", "linear", "yarn"):
    raise UnsupportedError(
      f"{path}: {ARCHITECTURE}.rope.scaling.type={kind!r} is not supported, only 'none', 'linear' "
      "and 'yarn'"
    )
  factor = value("scaling.factor", value("scale_linear", 0.0))
  if kind == "none" or factor in (0, 1):
    return None
  scaling = {"rope_type": kind, "factor": factor}
  if kind == "yarn":
    trained = value("scaling.original_context_length", 0)
    trained = trained or need_number(path, fields, "context_length")
    scaling["original_max_position_embeddings"] = trained
  return scaling
