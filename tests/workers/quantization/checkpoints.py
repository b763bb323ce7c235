"""Writes quantised checkpoints as the tools of the hub do, element by element from the formats' descriptions.

Nothing here is shared with the code under test. Each writer also returns what the weights stand for, as float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from fuseline.tests.checkpoints import write_checkpoint

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Array = NDArray[Any]


@dataclass
class Rounded:
    """A layer [out, in]: integers 0..15, scales and zero points by group, each input channel's group."""

    q: Array
    scales: Array  # float16 [out, groups]
    zeros: Array  # [out, groups]
    g_idx: Array  # [in]

    def values(self) -> torch.Tensor:
        steps = self.q.astype(np.float32) - self.zeros[:, self.g_idx].astype(np.float32)
        return torch.from_numpy(steps * self.scales.astype(np.float32)[:, self.g_idx])


def round_groups(weight: Array, group: int, symmetric: bool, shuffle: Array | None = None) -> Rounded:
    rows, cols = weight.shape
    size = cols if group == -1 else group
    g_idx = np.arange(cols) // size
    if shuffle is not None:
        g_idx = g_idx[shuffle]
    groups = int(g_idx.max()) + 1
    scales, zeros = np.zeros((rows, groups), np.float16), np.zeros((rows, groups), np.int64)
    q = np.zeros((rows, cols), np.int64)
    for g in range(groups):
        columns = weight[:, g_idx == g]
        low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
        if symmetric:
            scale = (np.abs(columns).max(1) / 7.5).astype(np.float16)
            zero = np.full(rows, 8)
        else:
            scale = ((high - low) / 15).astype(np.float16)
            zero = np.clip(np.rint(-low / scale), 1, 15).astype(np.int64)
        scales[:, g], zeros[:, g] = scale, zero
        q[:, g_idx == g] = np.clip(np.rint(columns / scale[:, None].astype(np.float32)) + zero[:, None], 0, 15)
    return Rounded(q, scales, zeros, g_idx)


def pack_rows(values: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """[8 * n, m] to int32 [n, m]; nibble i of a word is row ``order[i]`` of its eight."""
    padded = np.zeros((-(-values.shape[0] // 8) * 8, values.shape[1]), np.uint32)
    padded[: values.shape[0]] = values
    packed = np.zeros((padded.shape[0] // 8, values.shape[1]), np.uint32)
    for row in range(packed.shape[0]):
        for nibble, source in enumerate(order):
            packed[row] |= padded[row * 8 + source] << np.uint32(4 * nibble)
    return packed.view(np.int32)


def gptq_tensors(layer: Rounded, version: int = 1) -> dict[str, Array]:
    stored = layer.zeros.T - (1 if version == 1 else 0)
    return {
        "qweight": pack_rows(layer.q.T),
        "qzeros": pack_rows(stored.T).T,
        "scales": layer.scales.T,
        "g_idx": layer.g_idx.astype(np.int32),
    }


def awq_tensors(layer: Rounded) -> dict[str, Array]:
    return {
        "qweight": pack_rows(layer.q, AWQ_ORDER).T,
        "qzeros": pack_rows(layer.zeros, AWQ_ORDER).T,
        "scales": layer.scales.T,
    }


def compressed_tensors(layer: Rounded, symmetric: bool, act_order: bool) -> dict[str, Array]:
    result = {
        "weight_packed": pack_rows(layer.q.T).T,
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.q.shape, np.int64),
    }
    if not symmetric:
        result["weight_zero_point"] = pack_rows(layer.zeros)
    if act_order:
        result["weight_g_idx"] = layer.g_idx.astype(np.int32)
    return result


@dataclass
class Recipe:
    """How to quantise; ``config`` is added to the quantization_config."""

    method: str
    group: int = 32
    symmetric: bool = False
    act_order: bool = False
    version: int = 1
    bits: int = 4
    config: dict[str, object] = field(default_factory=dict)

    def quantization_config(self) -> dict[str, object]:
        if self.method == "gptq":
            base: dict[str, object] = {"bits": 4, "group_size": self.group, "desc_act": self.act_order}
            base |= {"sym": self.symmetric, "damp_percent": 0.1, "true_sequential": True, "dynamic": None}
            if self.version == 2:
                base["checkpoint_format"] = "gptq_v2"
        elif self.method == "awq":
            base = {"bits": 4, "group_size": self.group, "zero_point": not self.symmetric, "version": "gemm"}
            base["modules_to_not_convert"] = None
        else:
            base = self._compressed()
        return {"quant_method": self.method, **base, **self.config}

    def _compressed(self) -> dict[str, object]:
        weights: dict[str, object] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.bits == 8 or self.symmetric,
        }
        weights |= {"strategy": "channel" if self.bits == 8 else "group"}
        weights |= {"group_size": None if self.bits == 8 else self.group}
        weights |= {"actorder": "group" if self.act_order else None}
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "output_activations": None}
        group["input_activations"] = inputs if self.bits == 8 else None
        return {
            "config_groups": {"group_0": group},
            "format": "int-quantized" if self.bits == 8 else "pack-quantized",
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quantization_status": "compressed",
        }


def write_quantized(path: Path, model: Any, recipe: Recipe, seed: int = 0) -> dict[str, torch.Tensor]:
    """Save ``model`` in float16 with its projections quantised; returns what every weight then is, as float32.

    With act-order the input channels of a projection are shuffled, in the same way where they are shared.
    """
    write_checkpoint(path, model, dtype=torch.float16)
    tensors = load_file(path / "model.safetensors")
    values = {name: tensor.float() for name, tensor in tensors.items()}
    for name in list(tensors):
        module, _, kind = name.rpartition(".")
        if kind != "weight" or not module.endswith(PROJECTIONS):
            continue
        weight = tensors.pop(name).float().numpy()
        if recipe.bits == 8:
            scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
            q = np.clip(np.rint(weight / scale), -128, 127).astype(np.int8)
            parts: dict[str, Array] = {"weight": q, "weight_scale": scale}
            values[name] = torch.from_numpy(q.astype(np.float32) * scale)
        else:
            shuffle = np.random.default_rng(seed).permutation(weight.shape[1]) if recipe.act_order else None
            layer = round_groups(weight, recipe.group, recipe.symmetric, shuffle)
            values[name] = layer.values()
            if recipe.method == "gptq":
                parts = gptq_tensors(layer, recipe.version)
            elif recipe.method == "awq":
                parts = awq_tensors(layer)
            else:
                parts = compressed_tensors(layer, recipe.symmetric, recipe.act_order)
        for part, array in parts.items():
            tensors[f"{module}.{part}"] = torch.from_numpy(np.ascontiguousarray(array))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = recipe.quantization_config()
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return values
