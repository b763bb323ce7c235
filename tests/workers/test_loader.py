"""Loading: what each rank reads from disk, how a model is found and described."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.kernels.stacked import StackedWeight
from fuseline.kernels.types import Weight, float_weight
from fuseline.runtime.config import CacheConfig, EngineConfig
from fuseline.runtime.errors import InvalidArgumentError, ModelFormatError, NotFoundError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import build_model, edit_config, reference_logits, write_checkpoint
from fuseline.tests.workers.models.driver import Driver, Sequence, run_group
from fuseline.workers import checkpoint as checkpoint_module
from fuseline.workers import loader, mapped_file
from fuseline.workers.loader import load_model, model_info, resolve_model
from fuseline.workers.mapped_file import MappedFile
from fuseline.workers.models.decoder import DecoderModel
from fuseline.workers.models.registry import load_model_config

CPU = torch.device("cpu")
ALONE = ParallelConfig()
SOLO = GroupCommunicators(SoloCommunicator(), SoloCommunicator())


def load(path: Path, parallel: ParallelConfig = ALONE, rank: int = 0, dtype: str = "float32") -> DecoderModel:
    return load_model(path, load_model_config(path), dtype, dtype, CPU, parallel, rank, SOLO)


def held_elements(model: DecoderModel) -> int:
    """Elements of all distinct weights that a model holds."""
    weights = model.weights
    tensors: list[object] = [weights.embedding, weights.norm, weights.head]
    for layer in weights.layers:
        for block in (layer.attention, layer.mlp):
            for name in block.__slots__:
                weight = getattr(block, name)
                tensors += weight.parts if isinstance(weight, StackedWeight) else [weight]
    return sum({id(tensor): tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)}.values())


@pytest.fixture
def read_from_disk(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the elements that are asked of each tensor; asking for a whole file or tensor is an error."""
    counts: Counter[str] = Counter()

    class Slice:
        def __init__(self, name: str, inner: object) -> None:
            self.name, self.inner = name, inner

        def __getitem__(self, key: object) -> torch.Tensor:
            result: torch.Tensor = self.inner[key]  # type: ignore[index]
            counts[self.name] += result.numel()
            return result

    class File:
        def __init__(self, path: Path, framework: str) -> None:
            self.inner: Any = safe_open(path, framework)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *error: object) -> None:
            self.inner.__exit__(*error)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

    monkeypatch.setattr(checkpoint_module, "safe_open", File)
    return counts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_each_rank_reads_its_own_slices_only(
    tied: bool, shards: str, tmp_path: Path, read_from_disk: Counter[str]
) -> None:
    model = build_model("llama", num_hidden_layers=4, tie_word_embeddings=tied, mlp_bias=True, attention_bias=True)
    write_checkpoint(tmp_path, model, dtype=torch.bfloat16, max_shard_size=shards)  # converted, so not mapped
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or shards == "5GB"
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    parallel = ParallelConfig(2, 2)
    total: Counter[str] = Counter()
    for rank in range(parallel.world_size):
        read_from_disk.clear()
        loaded = load(tmp_path, parallel, rank)
        assert read_from_disk.total() == held_elements(loaded) < 0.35 * sum(sizes.values())
        layers = {int(name.split(".")[2]) for name in read_from_disk if ".layers." in name}
        assert layers == ({0, 1} if rank < 2 else {2, 3})
        total += read_from_disk
    # Norms are on both tensor ranks, a tied embedding on both stages; everything else is read once, all of it.
    for name, size in sizes.items():
        copies = 2 if "norm" in name or (tied and "embed" in name) else 1
        assert total[name] == copies * size, name


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks(
    tmp_path: Path, read_from_disk: Counter[str]
) -> None:
    write_checkpoint(tmp_path, build_model("llama"), dtype=torch.bfloat16)
    load(tmp_path, ParallelConfig(4), 3)
    assert read_from_disk["model.layers.0.self_attn.q_proj.weight"] == 16 * 64
    assert read_from_disk["model.layers.0.self_attn.k_proj.weight"] == 16 * 64
    assert read_from_disk["model.embed_tokens.weight"] == 25 * 64  # 101 rows: 26, 25, 25, 25


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("qwen2", tie_word_embeddings=True))
    weights = load(tmp_path).weights
    assert weights.head is weights.embedding


def test_progress_ends_at_the_total_and_pieces_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "READ_BYTES", 1000)
    monkeypatch.setattr(checkpoint_module, "REMAP_BYTES", 5000)
    model = build_model("qwen3")
    write_checkpoint(tmp_path, model, dtype=torch.bfloat16)
    seen: list[tuple[int, int]] = []
    config = load_model_config(tmp_path)
    loaded = load_model(
        tmp_path,
        config,
        "float32",
        "float32",
        CPU,
        ParallelConfig(),
        0,
        SOLO,
        lambda *progress: seen.append(progress),
    )
    total = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert seen[-1] == (total, total)
    steps = [after[0] - before[0] for before, after in zip([(0, 0), *seen], seen, strict=False)]
    assert min(steps) > 0
    assert max(steps) <= 1000
    assert held_elements(loaded) * 2 == total


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_stored_as_they_run_are_mapped(dtype: str, tied: bool, tmp_path: Path) -> None:
    model = build_model("llama", tie_word_embeddings=tied)
    write_checkpoint(tmp_path, model, dtype=getattr(torch, dtype), max_shard_size="5GB" if tied else "40KB")
    files = {path.stat().st_size for path in tmp_path.glob("*.safetensors")}
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    ranks = [load(tmp_path, ParallelConfig(2), rank, dtype).weights for rank in range(2)]
    for name, dim, weights in (
        ("model.embed_tokens", 0, [rank.embedding for rank in ranks]),
        ("lm_head", 0, [rank.head for rank in ranks]),
        ("model.layers.1.self_attn.o_proj", 1, [rank.layers[1].attention.out for rank in ranks]),
        ("model.layers.1.mlp.down_proj", 1, [rank.layers[1].mlp.down for rank in ranks]),
        ("model.layers.1.mlp.up_proj", 0, [part(rank.layers[1].mlp.gate_up, 1) for rank in ranks]),
        ("model.layers.1.self_attn.k_proj", 0, [part(rank.layers[1].attention.qkv, 1) for rank in ranks]),
    ):
        tensors = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        assert {tensor.untyped_storage().nbytes() for tensor in tensors} <= files  # the storage is a file
        assert torch.equal(torch.cat(tensors, dim), state[f"{name}.weight"]), name


def part(weight: Weight, index: int) -> torch.Tensor:
    assert isinstance(weight, StackedWeight)
    return weight.parts[index]


def test_mapping_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_file, "POPULATE_BYTES", 3000)
    model = build_model("qwen3")
    write_checkpoint(tmp_path, model)
    seen: list[tuple[int, int]] = []
    config = load_model_config(tmp_path)
    load_model(tmp_path, config, "float32", "float32", CPU, ALONE, 0, SOLO, lambda *progress: seen.append(progress))
    total = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert seen[-1] == (total, total)
    steps = [after[0] - before[0] for before, after in zip([(0, 0), *seen], seen, strict=False)]
    assert 0 < min(steps) <= max(steps) == 3000


def test_an_older_kernel_maps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr(mapped_file, "MADV_POPULATE_READ", 9999)
    mapped = MappedFile(path)
    assert list(mapped.populate(5, 20_000)) == [19_995]
    view = mapped.view(2, (2, 3), torch.int16)
    assert view is not None
    assert view.tolist() == [[0x302, 0x504, 0x706], [0x908, 0xB0A, 0xD0C]]
    assert mapped.view(3, (2, 3), torch.int16) is None


def test_weights_that_are_not_aligned_in_the_file_are_read(tmp_path: Path) -> None:
    model = build_model("llama")
    write_checkpoint(tmp_path, model)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    down = load(tmp_path).weights.layers[2].mlp.down
    assert isinstance(down, torch.Tensor)
    assert torch.equal(down, model.state_dict()["model.layers.2.mlp.down_proj.weight"])
    assert down.untyped_storage().nbytes() == down.nbytes


@pytest.mark.parametrize("run", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_converted_to_the_dtype_they_run_in(stored: str, run: str, tmp_path: Path) -> None:
    model = build_model("llama")
    write_checkpoint(tmp_path, model, dtype=getattr(torch, stored))
    loaded = load(tmp_path, dtype=run)
    assert loaded.new_kv_cache(1, 4).dtype == getattr(torch, run)
    state = model.state_dict()
    assert loaded.weights.head is not None
    assert torch.equal(float_weight(loaded.weights.head), state["lm_head.weight"].to(getattr(torch, run)))
    down = float_weight(loaded.weights.layers[2].mlp.down)
    assert torch.equal(down, state["model.layers.2.mlp.down_proj.weight"].to(getattr(torch, run)))


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = build_model("llama")
    model.state_dict()["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    write_checkpoint(tmp_path, model, dtype=torch.bfloat16)
    with pytest.raises(ModelFormatError, match=r"model.layers.1.mlp.up_proj.weight has values"):
        load(tmp_path, dtype="float16")


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    model = build_model("llama")
    write_checkpoint(tmp_path, model)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, file, {"format": "pt"})
    with run_group(tmp_path) as driver:
        (logits,) = whole(driver, [5, 6, 7])
    assert (logits - reference_logits(model, [5, 6, 7])).abs().max() < 1e-4


def whole(driver: Driver, token_ids: list[int]) -> list[torch.Tensor]:
    return driver.step([(Sequence(token_ids, len(token_ids)), len(token_ids))])


# How a model is described.


def test_model_info(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("qwen3", eos_token_id=[2, 5]), dtype=torch.bfloat16)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    info = model_info(tmp_path, device="cuda")
    assert (info.name, info.dtype, info.max_model_len) == (tmp_path.name, "bfloat16", 256)
    assert info.eos_token_ids == (2, 5, 7)
    assert (info.shape.num_layers, info.shape.num_kv_heads, info.shape.vocab_size) == (3, 2, 101)
    other = model_info(tmp_path, "float16", 100, "served-as")
    assert (other.name, other.dtype, other.max_model_len) == ("served-as", "float16", 100)
    for arguments, field in ((("int8",), "dtype"), (("auto", 257), "max_model_len"), (("auto", 0), "max_model_len")):
        with pytest.raises(InvalidArgumentError) as raised:
            model_info(tmp_path, *arguments)
        assert raised.value.details["field"] == field


def test_prefixes_are_not_shared_where_rope_depends_on_the_length_of_the_prompt(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}
    write_checkpoint(tmp_path, build_model("llama", rope_parameters=rope))
    within, beyond = model_info(tmp_path), model_info(tmp_path, max_model_len=512)
    EngineConfig(within, CacheConfig(num_blocks=8))
    EngineConfig(beyond, CacheConfig(num_blocks=8, enable_prefix_caching=False))
    with pytest.raises(InvalidArgumentError, match="prefix caching must be off"):
        EngineConfig(beyond, CacheConfig(num_blocks=8))
    with pytest.raises(InvalidArgumentError, match="between 1 and 512"):
        model_info(tmp_path, max_model_len=513)


def test_the_dtype_is_that_of_the_weights_when_the_configuration_does_not_say(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama"), dtype=torch.float16)
    edit_config(tmp_path, dtype=...)
    assert model_info(tmp_path, device="cuda").dtype == "float16"


def test_a_cpu_that_would_emulate_16_bit_runs_in_float32_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, build_model("llama"), dtype=torch.bfloat16)
    library = ctypes.CDLL(None)
    for instructions, kernels, dtype in (
        (False, None, "float32"),
        (True, None, "bfloat16"),
        (False, library, "bfloat16"),
    ):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=instructions: answer)
        monkeypatch.setattr(loader, "native_library", lambda answer=kernels: answer)
        assert model_info(tmp_path, device="cpu").dtype == dtype
        assert model_info(tmp_path, "bfloat16", device="cpu").dtype == "bfloat16"
        assert model_info(tmp_path, device="cuda").dtype == "bfloat16"


# How a model is found.


def test_names_of_models(demo_path: Path, tmp_path: Path) -> None:
    assert resolve_model("demo").samefile(demo_path)
    assert resolve_model(str(tmp_path)) == tmp_path
    for name in ("nothing-here", "./nothing/here", str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(NotFoundError, match="is not a directory"):
            resolve_model(name)
