"""Float checkpoints rounded while they load: the weights, their memory, and what the model then computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.kernels.quantized import QuantizedWeight
from fuseline.kernels.reference.quantized import dequantize, unpack
from fuseline.runtime.config import QUANTIZATIONS
from fuseline.runtime.errors import InvalidArgumentError, ModelFormatError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import build_model, write_checkpoint
from fuseline.tests.workers.models.driver import Sequence, run_group
from fuseline.workers.loader import load_model, model_info
from fuseline.workers.models.registry import load_model_config
from fuseline.workers.quantization import pieces
from fuseline.workers.quantization.config import METHODS, ROUNDINGS
from fuseline.workers.weights import DecoderWeights

SOLO = GroupCommunicators(SoloCommunicator(), SoloCommunicator())
CPU = torch.device("cpu")


def load(path: Path, quantization: str, tp: int = 1, rank: int = 0) -> DecoderWeights:
    config = load_model_config(path)
    parallel = ParallelConfig(tp)
    return load_model(
        path, config, "float32", "float32", CPU, parallel, rank, SOLO, quantization=quantization
    ).weights


def test_the_names_are_those_that_the_command_line_knows() -> None:
    assert ("auto", "none", *ROUNDINGS, *METHODS) == QUANTIZATIONS


@pytest.mark.parametrize("quantization", list(ROUNDINGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_layer_is_rounded_and_the_head_to_8_bits(
    quantization: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 64 * 32)
    model = build_model("qwen3", num_hidden_layers=2, tie_word_embeddings=True)
    write_checkpoint(tmp_path, model, dtype=dtype)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    weights = load(tmp_path, quantization)
    form = ROUNDINGS[quantization]
    for layer in weights.layers:
        prefix = f"model.layers.{layer.index}."
        qkv = torch.cat([state[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
        for held, exact in (
            (layer.attention.qkv, qkv),
            (layer.attention.out, state[f"{prefix}self_attn.o_proj.weight"]),
            (layer.mlp.down, state[f"{prefix}mlp.down_proj.weight"]),
        ):
            assert isinstance(held, QuantizedWeight)
            assert (held.bits, held.group) == (form.bits, max(form.group, 0))
            error = (dequantize(held) - exact).norm() / exact.norm()
            assert error < (0.01 if form.bits == 8 else 0.12)
    # A tied table stays as it is for looking tokens up; the head is a rounded copy of its own.
    assert isinstance(weights.embedding, torch.Tensor)
    assert torch.equal(weights.embedding, state["model.embed_tokens.weight"])
    assert isinstance(weights.head, QuantizedWeight)
    assert weights.head.bits == 8
    assert (dequantize(weights.head) - weights.embedding).norm() / weights.embedding.norm() < 0.01


def test_ranks_round_their_own_slices(tmp_path: Path) -> None:
    """int4 groups start with a rank's first channel, and int8 scales are of its channels: no rank reads another's."""
    write_checkpoint(tmp_path, build_model("llama", num_hidden_layers=1))  # 96 channels, 48 a rank
    whole = load(tmp_path, "int4").layers[0]
    for rank in range(2):
        layer = load(tmp_path, "int4", 2, rank).layers[0]
        assert isinstance(layer.mlp.gate_up, QuantizedWeight)
        assert isinstance(whole.mlp.gate_up, QuantizedWeight)
        rows = slice(48 * rank, 48 * rank + 48)
        assert torch.equal(unpack(layer.mlp.gate_up)[:48], unpack(whole.mlp.gate_up)[rows])
        assert isinstance(layer.mlp.down, QuantizedWeight)
        assert layer.mlp.down.shape == (64, 48)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.inf
    write_checkpoint(tmp_path, model)
    for quantization in ROUNDINGS:
        with pytest.raises(ModelFormatError, match=r"up_proj\.weight has values that are not finite"):
            load(tmp_path, quantization)


def test_models_that_are_rounded_otherwise_are_other_models(demo_path: Path) -> None:
    infos = [model_info(demo_path, quantization=name) for name in ("auto", "int8", "int4", "int4_g128")]
    assert [info.quantization for info in infos] == ["none", "int8", "int4", "int4_g128"]
    assert len({info.fingerprint for info in infos}) == 4  # so that none takes KV from another
    assert model_info(demo_path, quantization="none") == infos[0]
    for requested, device in (("gptq", "cpu"), ("int8", "cuda"), ("fp8", "cpu")):
        with pytest.raises(InvalidArgumentError) as caught:
            model_info(demo_path, device=device, quantization=requested)
        assert caught.value.details["field"] == "quantization"
        assert caught.value.details["value"] == requested


@pytest.mark.parametrize("parallel", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.05), ("int4", 0.35)])
def test_logits_stay_near_those_of_floats(
    quantization: str, bound: float, parallel: tuple[int, int], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, build_model("qwen2", tie_word_embeddings=True, num_hidden_layers=2))
    tokens = torch.randint(0, 101, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    results = []
    for name in ("none", quantization):
        tp, pp = parallel if name != "none" else (1, 1)
        with run_group(tmp_path, tp=tp, pp=pp, quantization=name) as driver:
            (logits,) = driver.step([(Sequence(tokens, len(tokens)), len(tokens))])
            results.append(logits)
    exact, rounded = results
    assert 0 < ((rounded - exact).norm() / exact.norm()) < bound
