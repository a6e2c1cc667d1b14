"""config.json of a Hugging Face directory, to our configs and back.

What `transformers` 4.57 does with a key is done here or refused by name; the defaults of absent keys are
its config classes'. `rope_parameters`, of transformers 5, is read too.
"""

import warnings
from typing import Any, NamedTuple

from ttt_jax.config import AttentionConfig, ModelConfig, RopeScaling
from ttt_jax.errors import UnsupportedError, UserError

# The architectures, by their model_type.
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
}
_QWEN = ("qwen2", "qwen3")

# Fields of RopeScaling under their names in `rope_scaling`.
_ROPE_FIELDS = {
  "factor": "factor",
  "original_max_position_embeddings": "original_max_positions",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "beta_fast": "beta_fast",
  "beta_slow": "beta_slow",
  "attention_factor": "attention_factor",
  "mscale": "mscale",
  "mscale_all_dim": "mscale_all_dim",
  "truncate": "truncate",
}
_ROPE_KINDS = {
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
  ),
}


class Architecture(NamedTuple):
  """What config.json says of a model, apart from its fast weights."""

  model: ModelConfig
  attention: AttentionConfig


def read_config(
  config: dict[str, Any], *, generation: dict[str, Any] | None = None
) -> Architecture:
  """The model that `transformers` would build from config.json; dtypes are the defaults.

  Args:
    config: config.json.
    generation: generation_config.json, whose special tokens count where it names some.

  Raises:
    NotImplementedError: an architecture, rope type or feature that is not there, by name.
    ValueError: a key that is missing or contradicts another.
  """
  kind = _model_type(config)
  _refuse_features(config, kind)
  num_layers = need_integer(config, "num_hidden_layers")
  special = {
    key: config.get(key) if (generation or {}).get(key) is None else generation[key]
    for key in ("eos_token_id", "bos_token_id")
  }
  theta, scaling = _read_rope(config)
  model = ModelConfig(
    vocab_size=need_integer(config, "vocab_size"),
    num_layers=num_layers,
    d_model=need_integer(config, "hidden_size"),
    d_ff=need_integer(config, "intermediate_size"),
    num_heads=need_integer(config, "num_attention_heads"),
    num_kv_heads=_num_kv_heads(config, kind),
    head_dim=config.get("head_dim", 128 if kind == "qwen3" else None),
    rope_theta=theta,
    rope_scaling=scaling,
    max_positions=config.get("max_position_embeddings"),
    norm_eps=_number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
    qk_norm=kind == "qwen3",
    attention_bias=_attention_bias(config, kind),
    tie_embeddings=config.get("tie_word_embeddings", False),
    bos_id=special["bos_token_id"],
    eos_ids=_token_ids(special["eos_token_id"]),
  )
  return Architecture(model, _read_windows(config, kind, num_layers))


def write_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
  """The config.json that `transformers` builds this model from; `read_config` reads it back.

  Raises:
    NotImplementedError: no architecture of `transformers` has these features together.
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
    "rope_scaling": _write_rope(model.rope_scaling),
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
  """A size in config.json; ValueError if it is not there."""
  value = config.get(key)
  if value is None:
    raise UserError(f"config.json has no {key}: it is not the config of a whole model")
  if not isinstance(value, int):
    raise UserError(f"config.json: {key}={value!r} must be an integer")
  return value


def _number(value: Any, key: str) -> float:
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise UserError(f"config.json: {key}={value!r} must be a number")
  return float(value)  # JSON has 32 for 32.0


def _model_type(config: dict[str, Any]) -> str:
  named = config.get("architectures") or [ARCHITECTURES.get(config.get("model_type"))]
  for kind, architecture in ARCHITECTURES.items():
    if named == [architecture]:
      return kind
  raise UnsupportedError(
    f"config.json: architectures={config.get('architectures')}, "
    f"model_type={config.get('model_type')!r} is not supported: there are "
    + ", ".join(ARCHITECTURES.values())
  )


def _refuse_features(config: dict[str, Any], kind: str) -> None:
  """Raises NotImplementedError for what would change the numbers and is not there."""
  refused = {
    "quantization_config": (None,),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "mlp_bias": (False,),
    "partial_rotary_factor": (None, 1.0),
  }
  for key, supported in refused.items():
    value = config.get(key, supported[0])
    if value not in supported:
      raise UnsupportedError(
        f"config.json: {key}={value!r} is not supported, only {supported[0]!r}"
      )
  if kind == "llama" and (
    ignored := [k for k in ("sliding_window", "layer_types") if config.get(k)]
  ):
    warnings.warn(
      f"config.json: {', '.join(ignored)} has no effect on LlamaForCausalLM: full attention, as in "
      "transformers",
      stacklevel=4,
    )


def _num_kv_heads(config: dict[str, Any], kind: str) -> int:
  # Llama's default is one per head; the others' is a number that fits one size of the model.
  if kind == "llama" and config.get("num_key_value_heads") is None:
    return need_integer(config, "num_attention_heads")
  return need_integer(config, "num_key_value_heads")


def _attention_bias(config: dict[str, Any], kind: str) -> str | None:
  if kind == "qwen2":
    return "qkv"
  return "qkvo" if config.get("attention_bias") and kind != "mistral" else None


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
  if value is None:
    return ()
  return tuple(value) if isinstance(value, list) else (value,)


def _read_rope(config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
  """The base and the scaling; in transformers 5 both are in `rope_parameters`."""
  scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
  theta = _number(scaling.pop("rope_theta", config.get("rope_theta", 10000.0)), "rope_theta")
  if "rope_theta" in config and theta != config["rope_theta"]:
    raise UserError(
      f"config.json says rope_theta={config['rope_theta']} and rope_parameters.rope_theta={theta}: "
      "delete one"
    )
  if any(isinstance(value, dict) for value in scaling.values()):
    raise UnsupportedError(
      f"config.json: rope_parameters of {', '.join(scaling)}: one for all layers is supported"
    )
  names = [scaling.pop(key) for key in ("rope_type", "type") if key in scaling]
  kind = names[0] if names else "default"
  if scaling.pop("partial_rotary_factor", 1.0) != 1.0:
    raise UnsupportedError("config.json: partial_rotary_factor is not supported, only 1.0")
  if kind == "default":
    return theta, None
  if kind not in _ROPE_KINDS:
    raise UnsupportedError(
      f"config.json: rope_type={kind!r} is not supported: there are default, "
      + ", ".join(_ROPE_KINDS)
    )
  unknown = [key for key in scaling if key not in _ROPE_KINDS[kind]]
  if unknown:
    warnings.warn(
      f"config.json: {', '.join(unknown)} has no effect on rope_type={kind!r}, as in transformers",
      stacklevel=4,
    )
  given = {
    _ROPE_FIELDS[key]: scaling[key] for key in _ROPE_KINDS[kind] if scaling.get(key) is not None
  }
  for name, value in given.items():
    if name not in ("original_max_positions", "truncate"):
      given[name] = _number(value, name)
  if kind == "yarn":
    given.setdefault("original_max_positions", config.get("max_position_embeddings"))
  required = ("factor",) if kind == "yarn" else _ROPE_KINDS[kind]
  missing = [key for key in required if scaling.get(key) is None]
  if missing:
    raise UserError(f"config.json: rope_type={kind!r} needs {', '.join(missing)}")
  return theta, RopeScaling(kind=kind, **given)


def _write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  written = {key: getattr(scaling, _ROPE_FIELDS[key]) for key in _ROPE_KINDS[scaling.kind]}
  return {"rope_type": scaling.kind} | {k: v for k, v in written.items() if v is not None}


def _read_windows(config: dict[str, Any], kind: str, num_layers: int) -> AttentionConfig:
  if kind == "mistral":
    return AttentionConfig(window=config.get("sliding_window", 4096))
  if kind == "llama":
    return AttentionConfig()
  window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
  types = config.get("layer_types")
  if types is None:
    first = config.get("max_window_layers", 28)
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
      f"attention.mixer={attention.mixer!r} is in no architecture of transformers that is written here: "
      "only models with attention in every layer are saved or converted; a run's own checkpoints hold any"
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
