"""Quantised checkpoints are read exactly, whole and in every rank's slices, and what cannot be is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.kernels.quantized import QuantizedWeight
from fuseline.kernels.reference.quantized import dequantize
from fuseline.runtime.errors import FuselineError, InvalidArgumentError, ModelFormatError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import build_model, edit_config
from fuseline.tests.workers.quantization.checkpoints import Recipe, write_quantized
from fuseline.workers.loader import load_model, model_info
from fuseline.workers.models.registry import load_model_config
from fuseline.workers.quantization import pieces
from fuseline.workers.weights import DecoderWeights, check_layout

CPU = torch.device("cpu")
ALONE = ParallelConfig()
SOLO = GroupCommunicators(SoloCommunicator(), SoloCommunicator())
RECIPES = {
    "gptq": Recipe("gptq"),
    "gptq-sym": Recipe("gptq", symmetric=True),
    "gptq-v2": Recipe("gptq", version=2),
    "gptq-act-order": Recipe("gptq", act_order=True),
    "gptq-whole-row": Recipe("gptq", group=-1),
    "awq": Recipe("awq"),
    "awq-sym": Recipe("awq", symmetric=True),
    "w4a16": Recipe("compressed-tensors", symmetric=True),
    "w4a16-zeros": Recipe("compressed-tensors"),
    "w4a16-act-order": Recipe("compressed-tensors", act_order=True),
    "w8a8": Recipe("compressed-tensors", bits=8),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that every weight is read in several."""
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 64 * 32)
    yield


def load(path: Path, parallel: ParallelConfig = ALONE, rank: int = 0) -> DecoderWeights:
    return load_model(path, load_model_config(path), "float32", "float32", CPU, parallel, rank, SOLO).weights


def restore(weight: object) -> torch.Tensor:
    """What a weight stands for, its columns in the checkpoint's order."""
    assert isinstance(weight, QuantizedWeight)
    values = dequantize(weight)
    if weight.order is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.order.long(), values)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_of_the_hub_is_read_exactly(name: str, tmp_path: Path) -> None:
    model = build_model("qwen2", num_hidden_layers=2)
    values = write_quantized(tmp_path, model, RECIPES[name])
    assert model_info(tmp_path).quantization == RECIPES[name].method
    weights = load(tmp_path)
    for layer in weights.layers:
        prefix = f"model.layers.{layer.index}."
        qkv = torch.cat([values[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
        gate_up = torch.cat([values[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
        assert torch.equal(restore(layer.attention.qkv), qkv)
        assert torch.equal(restore(layer.attention.out), values[f"{prefix}self_attn.o_proj.weight"])
        assert torch.equal(restore(layer.mlp.gate_up), gate_up)
        assert torch.equal(restore(layer.mlp.down), values[f"{prefix}mlp.down_proj.weight"])
        assert layer.attention.qkv_bias is not None
    assert isinstance(weights.head, torch.Tensor)  # the checkpoints leave it in floats
    assert torch.equal(weights.head, values["lm_head.weight"])


@pytest.mark.parametrize("name", [name for name in RECIPES if "act-order" not in name])
def test_each_rank_reads_its_slices(name: str, tmp_path: Path) -> None:
    """Rows start anywhere, also within eight that share a word: a KV head of four channels."""
    model = build_model(
        "llama", num_hidden_layers=1, hidden_size=128, intermediate_size=128, head_dim=4, num_attention_heads=32,
        num_key_value_heads=2,
    )  # fmt: skip
    values = write_quantized(tmp_path, model, RECIPES[name])
    prefix = "model.layers.0."
    for rank in range(2):
        layer = load(tmp_path, ParallelConfig(2), rank).layers[0]
        keys = values[f"{prefix}self_attn.k_proj.weight"][4 * rank : 4 * rank + 4]
        assert torch.equal(restore(layer.attention.qkv)[64:68], keys)
        half = slice(64 * rank, 64 * rank + 64)
        assert torch.equal(restore(layer.attention.out), values[f"{prefix}self_attn.o_proj.weight"][:, half])
        assert torch.equal(restore(layer.mlp.down), values[f"{prefix}mlp.down_proj.weight"][:, half])
        assert torch.equal(restore(layer.mlp.gate_up)[64:], values[f"{prefix}mlp.up_proj.weight"][half])


@pytest.mark.parametrize(
    ("recipe", "overrides", "said"),
    [
        (RECIPES["awq"], {}, r"96 input channels of .*down_proj at 48, within a group of 32"),
        (RECIPES["gptq-act-order"], {"intermediate_size": 128}, r"act-order \(desc_act\).*tensor_parallel_size=1"),
    ],
)
def test_cuts_that_the_format_does_not_allow_are_refused_unread(
    recipe: Recipe, overrides: dict[str, int], said: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1, **overrides), recipe)
    config = load_model_config(tmp_path)
    check_layout(config, ParallelConfig(1), config.quantization)
    with pytest.raises(ModelFormatError, match=said):
        check_layout(config, ParallelConfig(2), config.quantization)


CONFIGS: list[tuple[Recipe, dict[str, object], str, str]] = [
    (RECIPES["gptq"], {"bits": 3}, "quantization_config.bits", "3"),
    (RECIPES["gptq"], {"bits": 8}, "quantization_config.bits", "8"),
    (RECIPES["gptq"], {"group_size": 48}, "quantization_config.group_size", "48"),
    (RECIPES["gptq"], {"group_size": 0}, "quantization_config.group_size", "0"),
    (RECIPES["gptq"], {"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format", "marlin"),
    (RECIPES["gptq"], {"dynamic": {"-:.*gate": {}}}, "quantization_config.dynamic.-:.*gate", "{}"),
    (RECIPES["awq"], {"version": "gemv"}, "quantization_config.version", "gemv"),
    (RECIPES["awq"], {"quant_method": "fp8"}, "quantization_config.quant_method", "fp8"),
    (RECIPES["w8a8"], {"format": "float-quantized"}, "quantization_config.format", "float-quantized"),
    (RECIPES["w8a8"], {"kv_cache_scheme": {"num_bits": 8}}, "quantization_config.kv_cache_scheme", "8"),
    (RECIPES["w8a8"], {"config_groups": {}}, "quantization_config.config_groups", "{}"),
    (RECIPES["w8a8"], {"ignore": ["re:(a+)+b"]}, "quantization_config.ignore", "(a+)+b"),
    (RECIPES["w8a8"], {"ignore": ["re:["]}, "quantization_config.ignore", "["),
]


@pytest.mark.parametrize(("recipe", "changes", "field", "value"), CONFIGS)
def test_what_cannot_run_is_refused_by_field_and_value(
    recipe: Recipe, changes: dict[str, object], field: str, value: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1), recipe)
    edit_config(tmp_path, quantization_config={**recipe.quantization_config(), **changes})
    with pytest.raises(ModelFormatError) as caught:
        model_info(tmp_path)
    assert caught.value.details["field"] == field
    assert value in caught.value.details["value"]


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(path / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")


Q, K, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
BROKEN: list[tuple[str, dict[str, torch.Tensor | None], str]] = [
    ("gptq", {f"{Q}.scales": None}, r"no tensor .*q_proj\.scales"),
    ("gptq", {f"{Q}.qweight": torch.zeros(8, 60, dtype=torch.int32)}, r"has shape \[8, 60\]"),
    ("gptq", {f"{Q}.qweight": torch.zeros(8, 64)}, r"q_proj\.qweight is F32"),
    ("gptq", {f"{DOWN}.scales": torch.full((3, 64), torch.inf, dtype=torch.float16)}, "down_proj.scales has values"),
    ("gptq", {f"{Q}.g_idx": torch.arange(64, dtype=torch.int32) % 2}, "not in order"),
    ("gptq-sym", {f"{K}.qzeros": torch.zeros(2, 4, dtype=torch.int32)}, "zero points other than 8"),
    ("gptq-act-order", {f"{K}.g_idx": torch.arange(64, dtype=torch.int32) // 32}, "otherwise than .*q_proj"),
    ("gptq-act-order", {f"{K}.g_idx": torch.zeros(64, dtype=torch.int32)}, "does not make groups of 32"),
    ("awq", {f"{Q}.bias": torch.ones(64)}, r"q_proj\.bias is not part of"),
    ("w8a8", {f"{Q}.input_scale": torch.ones(1)}, r"q_proj\.input_scale is not part of"),
]


@pytest.mark.parametrize(("name", "changes", "said"), BROKEN)
def test_broken_weights_are_refused_by_name(
    name: str, changes: dict[str, torch.Tensor | None], said: str, tmp_path: Path
) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1), RECIPES[name])
    rewrite(tmp_path, changes)
    with pytest.raises(ModelFormatError, match=said):
        load(tmp_path)


def test_biases_of_zero_that_a_quantiser_added_are_left_out(tmp_path: Path) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1), RECIPES["gptq"])
    rewrite(tmp_path, {f"{Q}.bias": torch.zeros(64, dtype=torch.float16)})
    assert load(tmp_path).layers[0].attention.qkv_bias is None


def test_modules_left_in_floats_stay_so(tmp_path: Path) -> None:
    recipe = RECIPES["w8a8"]
    values = write_quantized(tmp_path, build_model("llama", num_hidden_layers=2), recipe)
    rewrite(tmp_path, {"model.layers.1.mlp.down_proj.weight": values["model.layers.1.mlp.down_proj.weight"].half(),
                       "model.layers.1.mlp.down_proj.weight_scale": None})  # fmt: skip
    edit_config(
        tmp_path, quantization_config={**recipe.quantization_config(), "ignore": ["lm_head", "re:.*1.mlp.down"]}
    )
    weights = load(tmp_path)
    assert isinstance(weights.layers[0].mlp.down, QuantizedWeight)
    assert isinstance(weights.layers[1].mlp.down, torch.Tensor)
    edit_config(tmp_path, quantization_config={**recipe.quantization_config(), "ignore": ["lm_head", Q]})
    with pytest.raises(ModelFormatError, match="some are quantised and some are not"):
        load(tmp_path)


def test_a_config_without_the_quantisation_is_said_to_be_that(tmp_path: Path) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1), RECIPES["gptq"])
    edit_config(tmp_path, quantization_config=...)
    with pytest.raises(ModelFormatError, match=r"quantised layer, but config\.json has no quantization_config"):
        load(tmp_path)


@pytest.mark.parametrize("requested", ["none", "int8", "awq", "int3"])
def test_a_quantised_checkpoint_is_taken_as_it_is(requested: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, build_model("llama", num_hidden_layers=1), RECIPES["gptq"])
    assert model_info(tmp_path, quantization="gptq") == model_info(tmp_path)
    with pytest.raises(InvalidArgumentError) as caught:
        model_info(tmp_path, quantization=requested)
    error: FuselineError = caught.value
    assert error.details["field"] == "quantization"
    assert error.details["value"] == requested
