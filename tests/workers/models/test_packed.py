"""A decoder whose weights are packed for the GPU's blocks computes what it computes from rows, to the bit.

The blocks' reference twins stand in for the kernels, so that all but the kernels themselves runs here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.kernels.cuda import fused
from fuseline.kernels.packed import PackedWeight
from fuseline.tests.checkpoints import build_model, write_checkpoint
from fuseline.tests.workers.models.driver import run_group
from fuseline.tests.workers.models.test_families import tokens
from fuseline.workers.checkpoint import Checkpoint
from fuseline.workers.models import program


@pytest.mark.parametrize(
    ("tied", "kv_dtype", "per_layer"), [(False, "bfloat16", 4), (True, "bfloat16", 4), (False, "int8", 2)]
)
def test_packed_weights_give_the_same_bits(
    tied: bool, kv_dtype: str, per_layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer and shorter than a block takes, and single tokens. Over int8 attention keeps its rows."""
    monkeypatch.setattr(program, "native_library", lambda: None)
    write_checkpoint(
        tmp_path,
        build_model("llama", 3, tie_word_embeddings=tied, head_dim=64),
        dtype=torch.bfloat16,
    )
    prompts = [tokens(i, length) for i, length in enumerate((210, 20, 1))]
    results, packed = [], []
    pack = PackedWeight.of

    def counted(weight: torch.Tensor, group_rows: int = 16, *, keep: bool = False) -> PackedWeight:
        packed.append((tuple(weight.shape), keep))
        return pack(weight, group_rows, keep=keep)

    monkeypatch.setattr(PackedWeight, "of", counted)
    monkeypatch.setattr(Checkpoint, "view", lambda self, wanted, dtype: None)  # read, as for a GPU, not mapped
    for usable in (False, True):
        monkeypatch.setattr(fused, "_usable", lambda device, usable=usable: usable)
        with run_group(tmp_path, dtype="bfloat16", block_size=16, kv_dtype=kv_dtype) as driver:
            results.append(driver.greedy(prompts, 6))
    assert results[0] == results[1]
    assert sum(keep for _, keep in packed) == tied
    assert len(packed) == 3 * per_layer + 1
