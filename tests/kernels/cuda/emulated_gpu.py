"""The operators with the emulator in the place of a GPU: checks of arguments, planning, launches and kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuseline.benchmarks.gpu import correctness
from fuseline.benchmarks.gpu.shapes import Shape
from fuseline.kernels.cuda import attention, fused, head, launcher, mlp
from fuseline.kernels.cuda.attention import AttentionTensors
from fuseline.kernels.cuda.launch import Scratch
from fuseline.kernels.cuda.launcher import CAPABILITY, default_launcher
from fuseline.kernels.cuda.library import CudaLibrary
from fuseline.tests.kernels.cuda.emulation import CUDA, Emulation, build_kernels

Tensor = torch.Tensor
CLUSTERS_AT_ONCE = 2  # of this GPU: a real one's hundreds of CTAs would take minutes
LEAST = Shape("least", 64, 2, 1, 64, 96, 90, 1)
OUTPUT_NAMES = ("first output", "second output")


class EmulatedLibrary(CudaLibrary):
    """All kernels, built for the emulator.

    Attributes:
        emulation: of the launches that come next.
        batches: of all launches so far.
        shapes: of all launches so far: cluster size, clusters, stages.
    """

    emulation: Emulation

    def __init__(self) -> None:
        super().__init__(build_kernels("emulated", *sorted(CUDA.glob("*.cu"))))
        self.batches: list[int] = []
        self.shapes: set[tuple[int, int, int]] = set()

    def begin(self, seed: int) -> None:
        """Queue what follows for a new emulation."""
        self.emulation = Emulation(self.path, seed)

    def call(self, name: str, *arguments: Any) -> int:
        result = super().call(name, *arguments)
        if name.endswith("_limits"):
            limits = arguments[1]._obj
            limits.max_clusters = min(limits.max_clusters, CLUSTERS_AT_ONCE)
        return result

    def launch(self, name: str, *arguments: Any) -> None:
        args = arguments[0]._obj
        self.batches.append(args.batch)
        self.shapes.add((args.launch.cluster, args.launch.num_clusters, args.launch.stages))
        super().launch(name, *arguments)


class EmulatedScratch(Scratch):
    """Tells the emulator of the memory that a call gets, which need not be what its launches ask for."""

    def __init__(self, library: EmulatedLibrary) -> None:
        super().__init__()
        self._library = library

    def get(self, key: tuple[object, ...], num_bytes: int, device: torch.device) -> Tensor:
        piece = super().get(key, num_bytes, device)
        self._library.emulation.memory("workspace", piece.data_ptr(), piece.nbytes, writable=True)
        return piece


class EmulatedOperators:
    """Stands in for ``torch.ops.fuseline``; every call is run before it returns."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self._library = library
        self._num_calls = 0

    def mlp_block(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._run(mlp.mlp_block, arguments, arguments)
        return result

    def attention_block(self, residual: Tensor, delta: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        *given, scale, eps, window = rest
        tensors = AttentionTensors(*given)
        result: tuple[Tensor, Tensor] = self._run(
            attention.attention_block,
            (residual, delta, tensors, scale, eps, window),
            (residual, delta, *given),
            tensors.kv,
        )
        return result

    def head_logits(self, *arguments: Any) -> Tensor:
        result: Tensor = self._run(head.head_logits, arguments, arguments)
        return result

    def head_candidates(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._run(head.head_candidates, arguments, arguments)
        return result

    def _run(
        self, block: Callable[..., Any], arguments: Sequence[Any], inputs: Sequence[Any], changed: Any = None
    ) -> Any:
        self._num_calls += 1
        self._library.begin(self._num_calls)
        emulation = self._library.emulation
        for place, tensor in enumerate(inputs):
            if isinstance(tensor, Tensor):
                size = tensor.nbytes
                emulation.memory(f"argument {place}", tensor.data_ptr(), size, writable=tensor is changed)
        results = block(default_launcher(), *arguments)
        outputs = (results,) if isinstance(results, Tensor) else results
        for name, tensor in zip(OUTPUT_NAMES, outputs, strict=False):
            emulation.memory(name, tensor.data_ptr(), tensor.nbytes, writable=True, written=False)
        emulation.run()
        return results


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedLibrary]:
    """``kernels.ops`` packs weights for the kernels and runs these, on CPU tensors.

    Only the driver is replaced: streams, the current device, its capability.
    """
    library = EmulatedLibrary()
    monkeypatch.setattr(launcher, "load_library", lambda: library)
    monkeypatch.setattr(launcher, "Scratch", partial(EmulatedScratch, library))
    monkeypatch.setattr(correctness, "load_library", lambda: library)
    monkeypatch.setattr(fused, "_usable", lambda device: True)
    monkeypatch.setattr(fused, "OPERATORS", EmulatedOperators(library))
    answers = {
        "get_device_capability": CAPABILITY,
        "current_device": None,  # the index of torch's CPU device
        "current_stream": SimpleNamespace(cuda_stream=0),
        "is_current_stream_capturing": False,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    default_launcher.cache_clear()
    yield library
    default_launcher.cache_clear()
