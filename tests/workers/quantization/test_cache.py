"""The cache of quantised weights: a second start maps what the first made, and nothing that is damaged."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fuseline.collectives.communicator import GroupCommunicators, SoloCommunicator
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.checkpoints import build_model, write_checkpoint
from fuseline.workers import loader
from fuseline.workers.models.registry import load_model_config
from fuseline.workers.quantization import cache
from fuseline.workers.quantization.cache import open_arena
from fuseline.workers.weights import DecoderWeights

SOLO = GroupCommunicators(SoloCommunicator(), SoloCommunicator())
ALONE = ParallelConfig()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELINE_WEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_FREE_BYTES", 0)
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", build_model("llama", num_hidden_layers=1))


def load(path: Path, quantization: str = "int8", parallel: ParallelConfig = ALONE, rank: int = 0) -> DecoderWeights:
    config = load_model_config(path)
    loaded = loader.load_model(
        path, config, "float32", "float32", torch.device("cpu"), parallel, rank, SOLO, quantization=quantization
    )
    return loaded.weights


def bits(weights: DecoderWeights) -> list[torch.Tensor]:
    layer = weights.layers[0]
    held = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down, weights.head)
    return [tensor for weight in held for tensor in weight.tensors().values()]  # type: ignore[union-attr]


def same(one: DecoderWeights, other: DecoderWeights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def fill(key: str, num_bytes: int, value: int) -> bool:
    """Fill an arena unless it is; whether it was."""
    with open_arena(key, num_bytes) as arena:
        tensor = arena.allocate((num_bytes,), torch.uint8)
        if not arena.filled:
            tensor.fill_(value)
        return arena.filled


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_second_start_reads_no_weight_of_a_linear_layer(
    quantization: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(model, quantization)
    monkeypatch.setattr(loader, "fill", None)  # whoever calls it fails
    assert same(load(model, quantization), first)
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.glob("*.weights")
    assert file.stat().st_mode & 0o777 == 0o600


def test_what_differs_has_a_file_of_its_own(folder: Path, model: Path) -> None:
    load(model, "int4")
    load(model, "int4_g64")
    for rank in range(2):
        load(model, "int4", ParallelConfig(2), rank)
    assert len(list(folder.glob("*.weights"))) == 4
    write_checkpoint(model, build_model("llama", seed=1, num_hidden_layers=1))
    load(model, "int4")
    assert len(list(folder.glob("*.weights"))) == 5


@pytest.mark.parametrize("damage", ["data", "header", "cut", "empty"])
def test_damage_is_noticed_and_repaired(
    damage: str, folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(model)
    (file,) = folder.glob("*.weights")
    good = file.read_bytes()
    broken = bytearray(good)
    if damage == "data":
        broken[-100] ^= 1
    elif damage == "header":
        broken[10] ^= 1
    file.unlink()  # what is mapped must not shrink
    file.write_bytes({"cut": good[:-1], "empty": b""}.get(damage, bytes(broken)))
    with caplog.at_level(logging.WARNING):
        assert same(load(model), first)
    assert "is damaged" in caplog.text
    assert file.read_bytes() == good


def test_a_failure_leaves_nothing(folder: Path) -> None:
    with pytest.raises(RuntimeError), open_arena("key", 100):
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["key.lock"]
    assert not fill("key", 100, 7)
    assert fill("key", 100, 7)


def test_a_folder_that_is_removed_meanwhile_stops_nobody(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), open_arena("key", 100) as arena:
        arena.allocate((100,), torch.uint8).fill_(7)
        shutil.rmtree(folder)
    assert "not cached" in caplog.text
    assert not fill("key", 100, 7)
    assert fill("key", 100, 7)


def test_what_a_killed_process_left_is_cleared(folder: Path) -> None:
    fill("key", 100, 7)
    (folder / "key.weights").unlink()
    (folder / ".key-left").write_bytes(b"x")
    fill("key", 100, 7)
    assert not (folder / ".key-left").exists()


def test_who_comes_second_waits_and_maps(folder: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with open_arena("key", 64) as arena:
            second = pool.submit(fill, "key", 64, 8)
            arena.allocate((64,), torch.uint8).fill_(7)
        assert second.result(timeout=60)


def test_a_changed_map_does_not_reach_the_file(folder: Path) -> None:
    fill("key", 64, 7)
    with open_arena("key", 64) as arena:
        arena.allocate((64,), torch.uint8).fill_(1)
    with open_arena("key", 64) as arena:
        assert (arena.allocate((64,), torch.uint8) == 7).all()


def test_the_oldest_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = cache.HEADER_BYTES + 64
    monkeypatch.setattr(cache, "MAX_BYTES", 2 * size)
    for age, key in enumerate(("first", "second")):
        fill(key, 64, 7)
        os.utime(folder / f"{key}.weights", (age, age))
    fill("first", 64, 7)  # used again
    fill("third", 64, 7)
    assert sorted(path.stem for path in folder.glob("*.weights")) == ["first", "third"]


@pytest.mark.parametrize("trouble", ["open", "full", "read-only", "unlockable", "too large", "off"])
def test_without_a_usable_cache_loading_goes_on(
    trouble: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if trouble == "open":
        folder.mkdir(mode=0o755)
    elif trouble == "full":
        usage = namedtuple("usage", ["free"])
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10))
    elif trouble == "read-only":
        folder.parent.joinpath("file").touch()
        monkeypatch.setenv("FUSELINE_WEIGHT_CACHE", str(folder.parent / "file" / "cache"))
    elif trouble == "unlockable":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    elif trouble == "too large":
        monkeypatch.setattr(cache, "MAX_BYTES", 100)
    else:
        monkeypatch.setenv("FUSELINE_WEIGHT_CACHE", "")
    with caplog.at_level(logging.WARNING):
        first = load(model)
    assert same(load(model), first)
    assert not list(folder.glob("*.weights"))
    assert ("not cached" in caplog.text) == (trouble in ("open", "full", "read-only", "unlockable"))
