"""Tests that config.json is read and written as `transformers` does."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ttt_jax.checkpoints.hf_config import parse_config, write_config
from ttt_jax.config import AttentionConfig, ModelConfig, RopeScaling
from ttt_jax.config.yaml import dump_config, load_config
from ttt_jax.nn.layers import rotary_angles
from ttt_jax.nn.rope import scaled_frequencies

LLAMA = {
  "architectures": ["LlamaForCausalLM"],
  "model_type": "llama",
  "vocab_size": 17,
  "hidden_size": 12,
  "intermediate_size": 20,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "max_position_embeddings": 2048,
}


def of(kind, **changes):
  names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "llama": "Llama"}
  return LLAMA | {"architectures": [f"{names[kind]}ForCausalLM"], "model_type": kind} | changes


# From `transformers` 4.57.6 with these values: the frequencies, the factor of cos and sin.
ROPE = {
  "linear": (
    16,
    10000.0,
    {"rope_type": "linear", "factor": 3.0},
    "0.333333343 0.105409257 0.0333333351 0.0105409259 0.00333333318 0.00105409266 "
    "0.000333333359 0.000105409265",
    1.0,
  ),
  "llama3": (
    24,
    500000.0,
    {
      "rope_type": "llama3",
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64,
    },
    "1.0 0.277632743 0.0187231898 0.00470075384 0.00157490105 0.000527641852 "
    "0.000176776681 5.92258002e-05 1.98425078e-05 6.64786967e-06 2.22724748e-06 7.46197941e-07",
    1.0,
  ),
  "yarn": (
    20,
    10000.0,
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "1.0 0.338391095 0.110942528 0.0347026475 0.0100475457 0.00249999994 "
    "0.000995267648 0.000396223331 0.000157739327 6.27971749e-05",
    1.138629436111989,
  ),
  "yarn with everything": (
    20,
    10000.0,
    {
      "rope_type": "yarn",
      "factor": 4.0,
      "original_max_position_embeddings": 256,
      "beta_fast": 16,
      "beta_slow": 2,
      "mscale": 1.2,
      "mscale_all_dim": 0.8,
      "truncate": False,
    },
    "1.0 0.398107171 0.106622159 0.0214870945 0.0062797158 0.00249999994 "
    "0.000995267648 0.000396223331 0.000157739327 6.27971749e-05",
    1.0499159215939338,
  ),
  "yarn with its factor": (
    32,
    1000000.0,
    {
      "rope_type": "yarn",
      "factor": 2.5,
      "original_max_position_embeddings": 32768,
      "attention_factor": 1.25,
    },
    "1.0 0.421696514 0.177827939 0.0749894157 0.0316227786 0.0133352149 "
    "0.00494860392 0.00180224411 0.000639999984 0.00021928217 7.11311732e-05 2.99957683e-05 "
    "1.26491104e-05 5.33408547e-06 2.24936525e-06 9.48549484e-07",
    1.25,
  ),
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ROPE)
def test_rope_scaling(name, key):
  head_dim, theta, scaling, frequencies, factor = ROPE[name]
  frequencies = np.array(frequencies.split(), np.float64)
  if key == "rope_scaling":
    config = of("llama", head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
  else:  # transformers 5
    config = of("llama", head_dim=head_dim, rope_parameters=scaling | {"rope_theta": theta})
  model = parse_config(config).model
  assert (model.rope_theta, model.head_size) == (theta, head_dim)
  actual, actual_factor = scaled_frequencies(head_dim, theta, model.rope_scaling)
  assert actual.dtype == np.float32
  np.testing.assert_allclose(actual, frequencies, rtol=3e-7)
  assert actual_factor == pytest.approx(factor, rel=1e-7)
  cos, sin = rotary_angles(jnp.arange(50), head_dim, theta, model.rope_scaling)
  angles = np.arange(50)[:, None] * frequencies
  np.testing.assert_allclose(cos, factor * np.cos(angles), atol=1e-5)
  np.testing.assert_allclose(sin, factor * np.sin(angles), atol=1e-5)
  assert parse_config(write_config(model, AttentionConfig())).model == model


# From `transformers` 5.24.0: ROPE_INIT_FUNCTIONS of a LlamaConfig with head_dim=20, rope_theta=10000 and
# these keys; the frequencies, the factor of cos and sin. They are not those of 4.57.
_YARN = {"rope_type": "yarn", "factor": 4.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_TRAINED = "original_max_position_embeddings"
ROPE_5 = {
  "yarn, length at the top": (
    {"rope_scaling": _YARN, "max_position_embeddings": 1024, _TRAINED: 64},
    "1 0.298580348 0.0792446584 0.0157739315 0.0062797158 0.00249999994 0.000995267648 "
    "0.000396223331 0.000157739327 6.27971749e-05",
    1.138629436111989,
  ),
  "yarn, length at the top before the inner one": (
    {"rope_scaling": _YARN | {_TRAINED: 512}, "max_position_embeddings": 1024, _TRAINED: 64},
    "1 0.298580348 0.0792446584 0.0157739315 0.0062797158 0.00249999994 0.000995267648 "
    "0.000396223331 0.000157739327 6.27971749e-05",
    1.138629436111989,
  ),
  "yarn, no length": (
    {"rope_scaling": _YARN, "max_position_embeddings": 128},
    "1 0.323462069 0.0990558267 0.0276043806 0.0062797158 0.00249999994 0.000995267648 "
    "0.000396223331 0.000157739327 6.27971749e-05",
    1.138629436111989,
  ),
  "yarn, factor of null": (
    {
      "rope_scaling": {"rope_type": "yarn", "factor": None, _TRAINED: 64},
      "max_position_embeddings": 192,
    },
    "1 0.309638888 0.0880496204 0.0210319106 0.00837295409 0.00333333341 0.00132702361 "
    "0.000528297795 0.000210319107 8.37295665e-05",
    1.109861228866811,
  ),
  "yarn, truncate of null": (
    {"rope_scaling": _YARN | {_TRAINED: 64, "truncate": None, "beta_fast": None}},
    "1 0.279622912 0.0641504377 0.0157739315 0.0062797158 0.00249999994 0.000995267648 "
    "0.000396223331 0.000157739327 6.27971749e-05",
    1.138629436111989,
  ),
  "llama3, length at the top": (
    {"rope_scaling": _LLAMA3 | {_TRAINED: 512}, "max_position_embeddings": 1024, _TRAINED: 64},
    "1 0.398107171 0.0482105464 0.00788696576 0.0031398579 0.00124999997 0.000497633824 "
    "0.000198111666 7.88696634e-05 3.13985875e-05",
    1.0,
  ),
  "llama3, no length": (
    {"rope_scaling": _LLAMA3, "max_position_embeddings": 64},
    "1 0.398107171 0.0482105464 0.00788696576 0.0031398579 0.00124999997 0.000497633824 "
    "0.000198111666 7.88696634e-05 3.13985875e-05",
    1.0,
  ),
  "the older dictionary counts": (
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 8.0}},
    "0.5 0.199053586 0.0792446584 0.031547863 0.0125594316 0.00499999989 0.0019905353 "
    "0.000792446663 0.000315478654 0.00012559435",
    1.0,
  ),
}


@pytest.mark.parametrize("name", ROPE_5)
def test_rope_scaling_of_transformers_5(name):
  keys, frequencies, factor = ROPE_5[name]
  model = parse_config(of("llama", head_dim=20, **keys)).model
  actual, actual_factor = scaled_frequencies(20, model.rope_theta, model.rope_scaling)
  np.testing.assert_allclose(actual, np.array(frequencies.split(), np.float64), rtol=3e-7)
  assert actual_factor == pytest.approx(factor, rel=1e-7)
  assert parse_config(write_config(model, AttentionConfig())).model == model


def test_rope_scaling_in_a_yaml_file(tmp_path):
  path = tmp_path / "x.yaml"
  path.write_text("model: {rope_scaling: {kind: llama3, factor: 8, original_max_positions: 64}}")
  expected = RopeScaling("llama3", 8.0, original_max_positions=64)
  config = load_config(path)
  assert config.model.rope_scaling == expected
  path.write_text(dump_config(config))
  assert load_config(path) == config
  assert load_config(path, ["--model.rope_scaling", "null"]).model.rope_scaling is None
  other = load_config(path, ["--model.rope_scaling.factor", "4"])
  assert other.model.rope_scaling == dataclasses.replace(expected, factor=4.0)
  with pytest.raises(ValueError, match=r"unknown field model\.rope_scaling\.kin .*did you mean"):
    load_config(path, ["--model.rope_scaling.kin", "yarn"])
  with pytest.raises(
    ValueError, match=r"model\.rope_scaling: .*\"factor\": Expected a float. Got value: x"
  ):
    load_config(path, ["--model.rope_scaling.factor", "x"])
  with pytest.raises(ValueError, match=r"model\.rope_scaling\.kind='ntk' is not one of 'linear'"):
    load_config(path, ["--model.rope_scaling.kind", "ntk"])


@pytest.mark.parametrize(
  ("config", "attention"),
  [
    (of("llama"), AttentionConfig()),
    (of("mistral"), AttentionConfig(window=4096)),
    (of("mistral", sliding_window=None), AttentionConfig()),
    (of("mistral", sliding_window=8), AttentionConfig(window=8)),
    (of("mistral", layer_types=["full_attention"] * 4), AttentionConfig()),
    (of("qwen2", sliding_window=8, max_window_layers=2), AttentionConfig()),
    (
      of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
      AttentionConfig(window=8, full_layers=(0, 1)),
    ),
    (of("qwen3", use_sliding_window=True, sliding_window=8), AttentionConfig()),
    (
      of(
        "qwen3",
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
      ),
      AttentionConfig(window=8, full_layers=(1, 3)),
    ),
  ],
)
def test_windows(config, attention):
  read = parse_config(config)
  assert read.attention == attention
  again = parse_config(json.loads(json.dumps(write_config(*read))))
  assert again == read


@pytest.mark.parametrize(
  ("config", "field", "value"),
  [
    (of("llama"), "attention_bias", None),
    (of("llama", attention_bias=True), "attention_bias", "qkvo"),
    (of("qwen2"), "attention_bias", "qkv"),
    (of("qwen3"), "qk_norm", True),
    (of("qwen3", head_dim=None, num_attention_heads=2), "head_size", 6),
    (of("llama", head_dim=None, num_attention_heads=2), "head_size", 6),
    (of("llama", num_key_value_heads=None), "num_kv_heads", 4),
    (of("llama"), "max_positions", 2048),
    (of("llama"), "norm_eps", 1e-6),
    (of("llama", tie_word_embeddings=True), "tie_embeddings", True),
    (of("llama"), "tie_embeddings", False),
    (of("llama", eos_token_id=3, bos_token_id=1), "eos_ids", (3,)),
    (of("llama", eos_token_id=[3, 5]), "eos_ids", (3, 5)),
    (of("llama", eos_token_id=[3, 5.0, 3]), "eos_ids", (3, 5)),
    (of("llama", bos_token_id=2.0), "bos_id", 2),
    (of("llama", tie_word_embeddings=None), "tie_embeddings", False),
    (of("llama", rope_scaling={"rope_type": None, "type": "default"}), "rope_scaling", None),
    (of("llama", rope_parameters={"partial_rotary_factor": None}), "rope_scaling", None),
    (of("llama", rope_parameters={"rope_theta": 500.0}), "rope_theta", 500.0),
    (of("llama", mlp_bias=None, logits_scaling=1.0, num_experts=0), "head_size", 6),
    (of("llama", architectures=None), "qk_norm", False),
  ],
)
def test_fields(config, field, value):
  read = parse_config(config)
  assert getattr(read.model, field) == value
  again = parse_config(write_config(*read)).model
  assert getattr(again, field) == value


def test_special_tokens_of_the_generation_config_count():
  config = of("llama", eos_token_id=3, bos_token_id=1)
  model = parse_config(config, generation={"eos_token_id": [4, 5], "bos_token_id": None}).model
  assert (model.eos_ids, model.bos_id) == ((4, 5), 1)


@pytest.mark.parametrize(
  ("config", "error", "message"),
  [
    (
      of("llama", architectures=["GPT2LMHeadModel"]),
      NotImplementedError,
      "GPT2LMHeadModel.*only Llama",
    ),
    (of("llama", architectures=None, model_type="bert"), NotImplementedError, "model_type='bert'"),
    (of("llama", hidden_act="gelu"), NotImplementedError, "hidden_act='gelu'"),
    (of("llama", mlp_bias=True), NotImplementedError, "mlp_bias=True"),
    (of("llama", partial_rotary_factor=0.5), NotImplementedError, "partial_rotary_factor=0.5"),
    (of("llama", quantization_config={"a": 1}), NotImplementedError, "quantization_config"),
    (
      of("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
      NotImplementedError,
      "rope_type='dynamic'.*only default, linear, llama3, yarn",
    ),
    (of("llama", rope_scaling={"type": "linear"}), ValueError, "'linear' needs factor"),
    (
      of("llama", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
      ValueError,
      "needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    (
      of("qwen3", rope_parameters={"full_attention": {"rope_type": "default"}}),
      NotImplementedError,
      "rope_parameters of full_attention",
    ),
    (
      of("llama", rope_theta=1.0, rope_parameters={"rope_theta": 2.0}),
      ValueError,
      "rope_theta=1.0 and rope_parameters.rope_theta=2.0",
    ),
    (of("llama", hidden_size=None), ValueError, "no hidden_size"),
    (of("llama", hidden_size="12"), ValueError, "hidden_size='12' must be an integer"),
    (of("llama", rope_theta="1e4"), ValueError, "rope_theta='1e4' must be a number"),
    (of("qwen3", num_key_value_heads=None), ValueError, "no num_key_value_heads"),
    (of("qwen3", layer_types=["full_attention"]), ValueError, "each of num_hidden_layers=4"),
    (
      of("qwen3", layer_types=["sliding_attention"] * 4),
      ValueError,
      "there is no window: use_sliding_window=None",
    ),
    (of("llama", attention_multiplier=0.1), NotImplementedError, "attention_multiplier=0.1"),
    (of("llama", logits_scaling=8.0), NotImplementedError, "logits_scaling=8.0 .* only 1"),
    (of("qwen2", final_logit_softcapping=30.0), NotImplementedError, "final_logit_softcapping"),
    (of("mistral", num_local_experts=8), NotImplementedError, "num_local_experts=8"),
    (of("llama", clip_qkv=8), NotImplementedError, "clip_qkv=8"),
    (
      of("llama", rope_parameters={"partial_rotary_factor": 0.5}),
      NotImplementedError,
      "partial_rotary_factor is not supported",
    ),
    (of("llama", model_type="qwen2"), ValueError, "says architectures=.*Llama.*model_type='qwen2'"),
    (of("llama", head_dim="6"), ValueError, "head_dim='6' must be an integer"),
    (of("llama", hidden_size=True), ValueError, "hidden_size=True must be an integer"),
    (
      of("mistral", sliding_window=None, layer_types=["sliding_attention"] * 4),
      ValueError,
      "no win",
    ),
    (of("llama", eos_token_id="</s>"), ValueError, "eos_token_id='</s>' must be the id"),
    (of("llama", eos_token_id=[1, -1]), ValueError, "-1 is no token"),
    (of("llama", num_key_value_heads=3), ValueError, r"model\.num_kv_heads=3 does not divide"),
    (of("llama", eos_token_id=17), ValueError, "17 is no token"),
  ],
)
def test_what_is_not_there_is_named(config, error, message):
  with pytest.raises(error, match=message):
    parse_config(config)


def test_alternating_windows_of_mistral():
  """Expects Ministral's windows, as `transformers` 5 does."""
  types = ["full_attention", "sliding_attention"] * 2
  attention = parse_config(of("mistral", sliding_window=8, layer_types=types)).attention
  assert attention == AttentionConfig(window=8, full_layers=(0, 2))


def test_what_has_no_effect_is_said():
  with pytest.warns(UserWarning, match="sliding_window has no effect on LlamaForCausalLM"):
    parse_config(of("llama", sliding_window=8))
  with pytest.warns(UserWarning, match="beta_fast has no effect on rope_type='linear'"):
    parse_config(of("llama", rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 1}))


@pytest.mark.parametrize(
  ("fields", "attention"),
  [
    ({}, AttentionConfig(window=4, full_layers=(1,))),
    ({"attention_bias": "qkvo"}, AttentionConfig(window=4)),
    ({"attention_bias": "qkv", "qk_norm": True}, AttentionConfig()),
  ],
)
def test_features_that_no_architecture_has_together(fields, attention):
  with pytest.raises(NotImplementedError, match="no architecture of transformers has"):
    write_config(ModelConfig(**fields), attention)
