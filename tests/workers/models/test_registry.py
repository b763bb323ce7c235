"""Reading config.json: both dialects of transformers, and what is refused by file, field and value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuseline.runtime.errors import ModelFormatError, NotFoundError
from fuseline.workers.models.config import RopeConfig
from fuseline.workers.models.registry import load_model_config

LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "eos_token_id": 128001,
}
# As published with Llama 3.1 (transformers 4), and as transformers 5 rewrites it.
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LINEAR = {"rope_type": "linear", "factor": 2}
DIALECT_4 = {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING, "torch_dtype": "bfloat16"}
DIALECT_5 = {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3_SCALING}, "dtype": "bfloat16"}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None}


def write(path: Path, config: object, generation: object = None) -> Path:
    (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_both_dialects_say_the_same(tmp_path: Path) -> None:
    four = load_model_config(write(tmp_path, {**LLAMA, **DIALECT_4}))
    five = load_model_config(write(tmp_path, {**LLAMA, **DIALECT_5}))
    assert four == five
    assert four.rope == RopeConfig("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert (four.dtype, four.head_dim, four.max_position_embeddings) == ("bfloat16", 128, 131072)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    bare = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "hidden_act")}
    config = load_model_config(write(tmp_path, {**bare, "rope_scaling": None, "head_dim": None}))
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (32, 128, None)
    assert config.rope == RopeConfig("default", 10000.0, 1.0, 131072)
    assert not (config.tie_word_embeddings or config.qkv_bias or config.mlp_bias or config.qk_norm)


def test_the_older_name_of_the_rope_type(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}))
    assert (config.rope.kind, config.rope.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 100, "use_sliding_window": False, "max_window_layers": 1}, [None] * 4),
        ({"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 3}, [None] * 3 + [100]),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 3}, [None] * 4),
        (
            {
                "sliding_window": 100,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
                "max_window_layers": 28,
            },
            [100, None, 100, None],
        ),
    ],
)
def test_which_layers_of_qwen_have_a_window(
    fields: dict[str, object], windows: list[int | None], tmp_path: Path
) -> None:
    assert load_model_config(write(tmp_path, {**QWEN2, **fields})).sliding_windows == tuple(windows)


def test_eos_ids_of_both_files_are_merged(tmp_path: Path) -> None:
    config = load_model_config(write(tmp_path, LLAMA, {"eos_token_id": [128001, 128008, 128009]}))
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert load_model_config(write(tmp_path, {**LLAMA, "eos_token_id": None}, {})).eos_token_ids == ()


@pytest.mark.parametrize(
    ("base", "changes", "field", "value"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "architectures", "GPT2LMHeadModel"),
        (LLAMA, {"architectures": None}, "architectures", "None"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures", "LlamaForCausalLM"),
        (LLAMA, {"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map", "modeling.Evil"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config.quant_method", "None"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act", "gelu"),
        (LLAMA, {"hidden_size": None}, "hidden_size", "None"),
        (LLAMA, {"vocab_size": 0}, "vocab_size", "0"),
        (LLAMA, {"num_hidden_layers": 2.5}, "num_hidden_layers", "2.5"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers", "1000000000"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers", "True"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads", "5"),
        (LLAMA, {"hidden_size": 4100}, "hidden_size", "4100"),
        (LLAMA, {"head_dim": 65}, "head_dim", "65"),
        (LLAMA, {"rms_norm_eps": float("inf")}, "rms_norm_eps", "inf"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps", "1e-5"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
        (LLAMA, {"attention_bias": "no"}, "attention_bias", "no"),
        (LLAMA, {"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "float8_e4m3fn"),
        (LLAMA, {"torch_dtype": "float16", "dtype": "bfloat16"}, "dtype", "bfloat16"),
        (LLAMA, {"eos_token_id": 128256}, "eos_token_id", "128256"),
        (LLAMA, {"eos_token_id": [1, "2"]}, "eos_token_id", "2"),
        (LLAMA, {"rope_theta": -1}, "rope_theta", "-1"),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta", "10000"),
        (
            LLAMA,
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2},
                "rope_scaling": {"type": "linear", "factor": 4},
            },
            "rope_scaling.factor",
            "4",
        ),
        (
            LLAMA,
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2},
                "rope_scaling": {"type": "dynamic", "factor": 2},
            },
            "rope_scaling",
            "dynamic",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.rope_type", "longrope"),
        (LLAMA, {"rope_scaling": {"type": "mrope"}}, "rope_scaling.type", "mrope"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor", "None"),
        (LLAMA, {"rope_scaling": [2]}, "rope_scaling", "[2]"),
        (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "factor": 0}}, "rope_parameters.factor", "0"),
        (
            LLAMA,
            {"rope_parameters": {**LLAMA3_SCALING, "high_freq_factor": 1.0}},
            "rope_parameters.high_freq_factor",
            "1.0",
        ),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "rope_parameters.full_attention",
            "1000",
        ),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor", "0.5"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}},
            "rope_parameters.rope_theta",
            "1.0",
        ),
        (QWEN2, {"num_key_value_heads": None}, "num_key_value_heads", "None"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types", "full_attention"),
        (QWEN2, {"layer_types": ["linear_attention"] * 4}, "layer_types", "linear_attention"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "sliding_window", "None"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window", "0"),
        (MISTRAL, {"sliding_window": ...}, "sliding_window", "None"),
        (MISTRAL, {"sliding_window": 64, "layer_types": ["full_attention"] * 4}, "layer_types", "full_attention"),
    ],
)
def test_what_is_refused(
    base: dict[str, object], changes: dict[str, object], field: str, value: str, tmp_path: Path
) -> None:
    config = {name: entry for name, entry in {**base, **changes}.items() if entry is not ...}
    with pytest.raises(ModelFormatError) as raised:
        load_model_config(write(tmp_path, config))
    details = raised.value.details
    assert details["file"] == str(tmp_path / "config.json")
    assert details["field"] == field
    assert value in details["value"]
    assert str(tmp_path / "config.json") in raised.value.message
    assert field in raised.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100000, '"\\ud800"', "{'a': 1}"])
def test_files_that_are_no_objects(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        load_model_config(write(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        load_model_config(tmp_path)


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelFormatError, match=r"config\.json cannot be read"):
        load_model_config(tmp_path)


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"config\.json does not exist"):
        load_model_config(tmp_path)


def test_a_generation_config_that_names_no_token(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError) as raised:
        load_model_config(write(tmp_path, LLAMA, {"eos_token_id": 10**9}))
    assert raised.value.details["file"] == str(tmp_path / "generation_config.json")
