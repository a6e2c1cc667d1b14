"""Translates config.json of a Hugging Face directory to our configs and back.

Each key has the effect that it has in `transformers` 5, or is refused by name; absent keys have the
defaults of its config classes. Where versions 4 and 5 differ, as in YaRN's trained length, 5 counts.
`hf_rope.py` translates the rotary embedding.
"""

import warnings
from typing import Any, NamedTuple

from ttt_jax.checkpoints.hf_rope import need_float, parse_rope, write_rope
from ttt_jax.config import AttentionConfig, ModelConfig
from ttt_jax.errors import UnsupportedError, UserError

# The supported architectures by model_type.
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_QWEN = ("qwen2", "qwen3")

# Keys that change what a model computes in some architecture, with the values that change nothing.
# `transformers` ignores the keys that the four architectures lack, and so computes another model; here
# other values are refused by name. Further unknown keys are ignored.
_NEUTRAL = {
  "add_cross_attention": (False,),
  "alibi": (False,),
  "attention_chunk_size": (),
  "attention_multiplier": (),
  "attention_out_bias": (False,),
  "attn_logit_softcapping": (),
  "attn_scale": (),
  "attn_temperature_tuning": (False, 0),
  "clip_qkv": (),
  "compression_config": (),
  "embedding_multiplier": (1,),
  "final_logit_softcapping": (),
  "hidden_act": ("silu", "swish"),  # two names of one function
  "hidden_activation": ("silu", "swish"),
  "is_causal": (True,),
  "is_encoder_decoder": (False,),
  "kv_lora_rank": (),
  "logit_scale": (1,),
  "logits_scaling": (1,),
  "mlp_bias": (False,),
  "n_routed_experts": (0,),
  "no_rope_layer_interval": (0,),
  "no_rope_layers": ([],),
  "norm_type": ("rms_norm", "rmsnorm"),
  "num_experts": (0, 1),
  "num_local_experts": (0, 1),
  "parallel_attn": (False,),
  "partial_rotary_factor": (1,),
  "position_embedding_type": ("rope", "rotary", "absolute"),
  "q_lora_rank": (),
  "qk_layernorm": (False,),
  "quantization_config": (),
  "query_pre_attn_scalar": (),
  "residual_multiplier": (1,),
  "rope_interleaved": (False,),
  "rotary_pct": (1,),
  "scale_depth": (),
  "scale_emb": (1,),
  "dim_model_base": (),
  "use_bidirectional_attention": (False,),
  "use_parallel_residual": (False,),
  "use_qk_norm": (False,),
}
# Keys of a window that have no effect on an architecture, in `transformers` neither.
_NO_WINDOW = {
  "llama": ("sliding_window", "layer_types", "use_sliding_window"),
  "mistral": ("use_sliding_window",),
}


class Architecture(NamedTuple):
  """Holds the sections that config.json describes, apart from fast weights."""

  model: ModelConfig
  attention: AttentionConfig


def parse_config(
  config: dict[str, Any], *, generation: dict[str, Any] | None = None
) -> Architecture:
  """Returns the model that `transformers` would build from config.json; dtypes are the defaults.

  Args:
    config: config.json.
    generation: generation_config.json, whose special tokens override those of config.json.

  Raises:
    UnsupportedError: the architecture, the rope type or a feature is not supported.
    UserError: a key is missing or contradicts another.
  """
  kind = _model_type(config)
  _refuse_features(config, kind)
  num_layers = need_integer(config, "num_hidden_layers")
  theta, scaling = parse_rope(config)
  model = ModelConfig(
    vocab_size=need_integer(config, "vocab_size"),
    num_layers=num_layers,
    d_model=need_integer(config, "hidden_size"),
    d_ff=need_integer(config, "intermediate_size"),
    num_heads=need_integer(config, "num_attention_heads"),
    num_kv_heads=_num_kv_heads(config, kind),
    head_dim=_optional_integer(config, "head_dim", 128 if kind == "qwen3" else None),
    rope_theta=theta,
    rope_scaling=scaling,
    max_positions=_optional_integer(config, "max_position_embeddings"),
    norm_eps=need_float(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
    qk_norm=kind == "qwen3",
    attention_bias=_attention_bias(config, kind),
    tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    bos_id=next(iter(special_token_ids(config, generation, "bos_token_id")), None),
    eos_ids=special_token_ids(config, generation, "eos_token_id"),
  )
  return Architecture(model, _parse_windows(config, kind, num_layers))


def write_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
  """Returns the config.json from which `transformers` and `parse_config` build this model.

  Raises:
    UnsupportedError: no architecture of `transformers` has these features together.
  """
  kind = _architecture_for(model, attention)
  config = {
    "architectures": [ARCHITECTURES[kind]],
    "model_type": kind,
    "torch_dtype": model.param_dtype,
    "vocab_size": model.vocab_size,
    "hidden_size": model.d_model,
    "intermediate_size": model.d_ff,
    "num_hidden_layers": model.num_layers,
    "num_attention_heads": model.num_heads,
    "num_key_value_heads": model.num_kv_heads,
    "head_dim": model.head_size,
    "hidden_act": "silu",
    "rms_norm_eps": model.norm_eps,
    "rope_theta": model.rope_theta,
    "rope_scaling": write_rope(model.rope_scaling),
    "tie_word_embeddings": model.tie_embeddings,
    "bos_token_id": model.bos_id,
    "eos_token_id": list(model.eos_ids)
    if len(model.eos_ids) > 1
    else next(iter(model.eos_ids), None),
    "attention_dropout": 0.0,
    "use_cache": True,
  }
  if model.max_positions is not None:
    config["max_position_embeddings"] = model.max_positions
  if kind == "llama":
    config["mlp_bias"] = False
  if kind in ("llama", "qwen3"):
    config["attention_bias"] = model.attention_bias is not None
  if kind == "mistral":
    config["sliding_window"] = attention.window
  if kind in _QWEN:
    sliding = [layer for layer in range(model.num_layers) if _is_windowed(attention, layer)]
    config["use_sliding_window"] = bool(sliding)
    config["sliding_window"] = attention.window if sliding else None
    config["max_window_layers"] = sliding[0] if sliding else model.num_layers
    config["layer_types"] = [
      "sliding_attention" if layer in sliding else "full_attention"
      for layer in range(model.num_layers)
    ]
  return config


def need_integer(config: dict[str, Any], key: str) -> int:
  """Returns an integer of config.json; raises UserError if it is missing."""
  value = config.get(key)
  if value is None:
    raise UserError(f"config.json has no {key}: give the config of a complete model")
  if isinstance(value, bool) or not isinstance(value, int):
    raise UserError(f"config.json: {key}={value!r} must be an integer")
  return value


def _optional_integer(config: dict[str, Any], key: str, default: int | None = None) -> int | None:
  if config.get(key, default) is None:
    return None
  return need_integer({key: default} | config, key)


def _model_type(config: dict[str, Any]) -> str:
  model_type = config.get("model_type")
  named = config.get("architectures") or [ARCHITECTURES.get(model_type)]
  for kind, architecture in ARCHITECTURES.items():
    if named == [architecture]:
      if model_type in ARCHITECTURES and model_type != kind:
        raise UserError(
          f"config.json says architectures={named} and model_type={model_type!r}: transformers goes by "
          "model_type; correct one of the two"
        )
      return kind
  raise UnsupportedError(
    f"config.json: architectures={config.get('architectures')}, "
    f"model_type={model_type!r} is not supported, only " + ", ".join(ARCHITECTURES.values())
  )


def _refuse_features(config: dict[str, Any], kind: str) -> None:
  """Raises UnsupportedError for features that would change the numbers and are not supported."""
  for key, neutral in _NEUTRAL.items():
    value = config.get(key)
    if value is not None and value not in neutral:
      raise UnsupportedError(
        f"config.json: {key}={value!r} is not supported, only {(*neutral, None)[0]!r}"
      )
  ignored = [key for key in _NO_WINDOW.get(kind, ()) if config.get(key)]
  if ignored:
    effect = "full attention" if kind == "llama" else "sliding_window in every layer"
    warnings.warn(
      f"config.json: {', '.join(ignored)} has no effect on {ARCHITECTURES[kind]}: {effect}, as in "
      "transformers",
      stacklevel=4,
    )


def _num_kv_heads(config: dict[str, Any], kind: str) -> int:
  # Llama's default is num_attention_heads; the default of the others fits only one size of the model.
  if kind == "llama" and config.get("num_key_value_heads") is None:
    return need_integer(config, "num_attention_heads")
  return need_integer(config, "num_key_value_heads")


def _attention_bias(config: dict[str, Any], kind: str) -> str | None:
  if kind == "qwen2":
    return "qkv"
  return "qkvo" if config.get("attention_bias") and kind != "mistral" else None


def special_token_ids(
  config: dict[str, Any], generation: dict[str, Any] | None, key: str
) -> tuple[int, ...]:
  """Returns the ids of a key like `eos_token_id`, from generation_config.json if it has the key.

  Raises:
    UserError: a value is not an id, or is beyond the model's vocabulary.
  """
  name, value = "generation_config.json", (generation or {}).get(key)
  if value is None:
    name, value = "config.json", config.get(key)
  if value is None:
    return ()
  ids = []
  for token in value if isinstance(value, list) else [value]:
    if isinstance(token, bool) or not isinstance(token, int | float) or token != int(token):
      raise UserError(f"{name}: {key}={value!r} must be the id of a token, or a list of ids")
    ids.append(int(token))  # JSON has 2.0 for 2
  size = config.get("vocab_size")
  if isinstance(size, int) and (beyond := [x for x in ids if not 0 <= x < size]):
    raise UserError(
      f"{name}: {key}={value!r}: {beyond[0]} is no token, vocab_size={size}: delete it, or give the id "
      "that the tokenizer has"
    )
  return tuple(dict.fromkeys(ids))


def _parse_windows(config: dict[str, Any], kind: str, num_layers: int) -> AttentionConfig:
  if kind == "llama":
    return AttentionConfig()
  # Mistral always uses its window; with layer_types transformers treats the model as Ministral.
  uses = kind == "mistral" or config.get("use_sliding_window")
  window = _optional_integer(config, "sliding_window", 4096) if uses else None
  types = config.get("layer_types")
  if types is None:
    first = 0 if kind == "mistral" else config.get("max_window_layers", 28)
    types = [
      "full_attention" if window is None or layer < first else "sliding_attention"
      for layer in range(num_layers)
    ]
  if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
    raise UserError(
      f"config.json: layer_types={types} must name full_attention or sliding_attention for each of "
      f"num_hidden_layers={num_layers} layers"
    )
  if "sliding_attention" not in types:
    return AttentionConfig()
  if window is None:
    raise UserError(
      "config.json: layer_types has sliding_attention, but there is no window: use_sliding_window="
      f"{config.get('use_sliding_window')}, sliding_window={config.get('sliding_window')}"
    )
  full = tuple(layer for layer, name in enumerate(types) if name == "full_attention")
  return AttentionConfig(window=window, full_layers=full)


def _is_windowed(attention: AttentionConfig, layer: int) -> bool:
  return attention.window is not None and layer not in attention.full_layers


def _architecture_for(model: ModelConfig, attention: AttentionConfig) -> str:
  if attention.mixer != "attention":
    raise UnsupportedError(
      f"attention.mixer={attention.mixer!r} cannot be saved in a format of transformers: only models with "
      "attention in every layer can be saved or converted; a run's own checkpoints hold any mixer"
    )
  windowed = [_is_windowed(attention, layer) for layer in range(model.num_layers)]
  if model.qk_norm and model.attention_bias != "qkv":
    return "qwen3"
  if not model.qk_norm and model.attention_bias == "qkv":
    return "qwen2"
  if not model.qk_norm and not any(windowed):
    return "llama"
  if not model.qk_norm and all(windowed) and model.attention_bias is None:
    return "mistral"
  raise UnsupportedError(
    f"no architecture of transformers has model.qk_norm={model.qk_norm}, "
    f"model.attention_bias={model.attention_bias!r}, attention.window={attention.window} and "
    f"attention.full_layers={list(attention.full_layers)} together: Qwen3 has qk_norm and any windows, "
    "Qwen2 attention_bias='qkv' and any windows, Mistral a window in every layer, Llama none"
  )
