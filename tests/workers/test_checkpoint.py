"""Checkpoints on disk: what is refused, by file and tensor, and how they are told apart."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.runtime.errors import ModelFormatError, NotFoundError
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import build_model, edit_config, write_checkpoint
from fuseline.workers import checkpoint as checkpoint_module
from fuseline.workers.checkpoint import Checkpoint
from fuseline.workers.loader import load_model, model_info
from fuseline.workers.models.registry import load_model_config


def load(path: Path) -> None:
    solo = GroupCommunicators(SoloCommunicator(), SoloCommunicator())
    load_model(path, load_model_config(path), "float32", "float32", torch.device("cpu"), ParallelConfig(), 0, solo)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def cut_into_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 this is not it" * 10)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return edit


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        changed = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])

    return edit


def put_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "a directory": (put_a_directory, "cannot be read: Is a directory"),
    "truncated": (truncate, "truncated"),
    "header cut": (cut_into_header, "truncated"),
    "other format": (not_safetensors, "not a safetensors file"),
    "trailing bytes": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "trailing"),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop(NORM)), f"no tensor {NORM}"),
    "wrong shape": (edit_tensors(lambda t: t.update({NORM: t[NORM][:-1].clone()})), rf"{NORM} has shape \[63\]"),
    "integers": (edit_tensors(lambda t: t.update({NORM: t[NORM].to(torch.int32)})), f"{NORM} is I32"),
    "more layers than the configuration": (
        edit_tensors(lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)})),
        "tensor model.layers.3.mlp.up_proj.weight is not part",
    ),
    "a bias the configuration denies": (
        edit_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
        "tensor model.layers.0.self_attn.q_proj.bias is not part",
    ),
    "shape lies": (edit_header(lambda header: header[NORM].update(shape=[32])), f"malformed header entry.*{NORM}"),
    "negative shape": (edit_header(lambda header: header[NORM].update(shape=[-64])), f"malformed.*{NORM}"),
    "offsets lie": (edit_header(lambda h: h[NORM].update(data_offsets=[0, 10**9])), f"malformed.*{NORM}"),
    "no offsets": (edit_header(lambda header: header[NORM].pop("data_offsets")), f"malformed.*{NORM}"),
    "not an entry": (edit_header(lambda header: header.update({NORM: [1]})), f"malformed.*{NORM}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama"))
    break_it, message = DAMAGES[damage]
    break_it(tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=message) as raised:
        load(tmp_path)
    assert raised.value.details["file"] == str(tmp_path / "model.safetensors")


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    """Offsets that are inside the file, of the right size, and yet not what safetensors would write."""
    write_checkpoint(tmp_path, build_model("llama"))
    edit_header(lambda header: header[NORM].update(data_offsets=[0, 256]))(tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        load(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({NORM: "model-00009-of-00009.safetensors"}),
            r"model-00009.*not exist",
        ),
        (lambda m: m.update({NORM: "../model.safetensors"}), NORM),
        (lambda m: m.update({NORM: "/etc/passwd"}), NORM),
        (lambda m: m.update({NORM: 7}), NORM),
        (lambda m: m.update({"model.extra": m[NORM]}), "no tensor model.extra"),
        (lambda m: m.pop(NORM), f"no tensor {NORM}"),
        (lambda m: m.clear(), "weight_map"),
    ],
)
def test_a_wrong_index_is_refused(
    change: Callable[[dict[str, object]], object], message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, build_model("llama"), max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX).read_text())
    change(index["weight_map"])
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=message):
        load(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama"))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(NotFoundError, match=r"neither model.safetensors nor"):
        load(tmp_path)


def test_equal_models_have_equal_fingerprints_and_others_have_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, copy, other, norm = (tmp_path / name for name in ("one", "copy", "other", "norm"))
    write_checkpoint(one, build_model("llama", 1))
    write_checkpoint(other, build_model("llama", 2))
    shutil.copytree(one, copy)
    shutil.copytree(one, norm)
    edit_config(norm, rms_norm_eps=1e-4)
    # Hashed whole, and hashed by samples as files of many gigabytes are.
    for limit in (checkpoint_module.HASH_WHOLE_BYTES, 1000):
        monkeypatch.setattr(checkpoint_module, "HASH_WHOLE_BYTES", limit)
        prints = [model_info(path).fingerprint for path in (one, copy, other, norm)]
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3
        assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in prints)


def test_samples_reach_every_part_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse: 1 GiB of zeros on disk cost nothing, and the sample must see any stretch of 1 MiB change."""
    path = tmp_path / "model.safetensors"
    size = 2**30
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    prints = set()
    for offset in (None, 8 + len(header) + 4096, 300 * 2**20 + 17, size - 2**20):
        if offset is not None:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(b"\1" * 2**20)
        with Checkpoint(tmp_path) as checkpoint:
            prints.add(checkpoint.fingerprint(b"{}"))
    assert len(prints) == 4
