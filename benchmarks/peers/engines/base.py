"""What an adapter gives to the measurements, and what it gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Generation:
    """What became of some prompts.

    Attributes:
        token_ids: the new tokens of each prompt.
        times: of each of those, ``time.monotonic()`` when it was known.
    """

    token_ids: list[list[int]]
    times: list[list[float]]


class Engine(Protocol):
    """A loaded model.

    Attributes:
        version: of the peer.
    """

    version: str

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        """Greedily, all prompts as one batch, exactly so many tokens each, none of them taken from a cache."""


class Adapter(Protocol):
    """A module of this folder."""

    def prepare(self, checkpoint: Path, converted: Path, mode: str) -> None:
        """Convert a checkpoint in Hugging Face's format to the peer's own, into an empty folder."""

    def load(self, checkpoint: Path, converted: Path, mode: str, num_threads: int) -> Engine:
        """Load the model in one of the peer's modes."""


@dataclass(frozen=True)
class Shape:
    """A checkpoint's configuration, by the names of ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def read(cls, checkpoint: Path) -> Shape:
        """Of a checkpoint in Hugging Face's format."""
        config = json.loads((checkpoint / "config.json").read_text())
        return cls(**{name: config[name] for name in cls.__dataclass_fields__})


class Weights:
    """The tensors of a bfloat16 ``model.safetensors`` as numpy arrays of float32, without torch."""

    def __init__(self, checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(length))
        self._data = np.memmap(path, np.uint8, "r", offset=8 + length)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._header[name]
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        bits = self._data[begin:end].view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(entry["shape"])
