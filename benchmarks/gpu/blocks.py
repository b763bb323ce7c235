"""Microseconds of each block and of a whole layer, beside the floor that memory sets and beside other kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from fuseline.kernels import ops
from fuseline.kernels.types import AttentionSpec, Weight

from . import baselines, public
from .device import Device, Launch
from .inputs import Layer, Source, decode_step, prepared_attention, prepared_mlp, rotary
from .shapes import BLOCK_SIZE, EPS, Shape, attention_bytes, buffer_sets, floor_us, head_bytes, mlp_bytes

Tensor = torch.Tensor
BlockLaunch = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Figure:
    """One block at one shape.

    Attributes:
        context: tokens, None for blocks that do not depend on it.
        floor_us: the block's bytes at the measured copy bandwidth.
        others_us: the same work by other kernels.
    """

    shape: str
    block: str
    batch: int
    context: int | None
    us: float
    spread_us: float
    floor_us: float
    others_us: dict[str, float] = field(default_factory=dict)

    @property
    def over_floor(self) -> float:
        """1 is as fast as memory allows."""
        return self.us / self.floor_us

    @property
    def speedup(self) -> float | None:
        """Over the fastest of the others."""
        return min(self.others_us.values()) / self.us if self.others_us else None

    def record(self) -> dict[str, object]:
        """For the results file."""
        return {**asdict(self), "over_floor": self.over_floor, "speedup": self.speedup}


class Bench:
    """Measures blocks of one shape; holds weights enough that no two calls in a row find theirs in L2."""

    def __init__(
        self,
        shape: Shape,
        device: Device,
        bytes_per_s: float,
        pieces: baselines.Elementwise,
        public_extension: Any = None,
    ) -> None:
        self._shape = shape
        self._device = device
        self._bytes_per_s = bytes_per_s
        self._pipeline = baselines.Pipeline(pieces)
        self._public = public_extension
        source = Source(device.torch, 3)
        smallest = min(shape.attention_weight_bytes, shape.mlp_weight_bytes)
        self._layers = [source.layer(shape) for _ in range(buffer_sets(smallest, device.l2_bytes))]
        self._ready = [
            Layer(layer.spec, prepared_attention(layer.attention, layer.spec), prepared_mlp(layer.mlp))
            for layer in self._layers
        ]
        self._source = source
        self._norm = source.normal(shape.hidden, std=0.1, mean=1.0)

    def mlp_calls(self, batch: int) -> list[BlockLaunch]:
        """One for each set of weights."""
        residual, delta = self._stream(batch), self._stream(batch)
        return [partial(ops.mlp_block, residual, delta, layer.mlp, EPS) for layer in self._ready]

    def head_calls(self, batch: int, tables: Sequence[Weight]) -> list[Callable[[], Tensor]]:
        """Logits of every row, one for each table."""
        residual, delta = self._stream(batch), self._stream(batch)
        rows = torch.arange(batch, device=self._device.torch)
        return [partial(ops.head, residual, delta, self._norm, table, rows, EPS) for table in tables]

    def attention_calls(self, batch: int, inputs: DecodeInputs) -> list[BlockLaunch]:
        """One for each set of weights."""
        residual, delta = self._stream(batch), self._stream(batch)
        return [
            partial(ops.attention_block, residual, delta, layer.attention, layer.spec, inputs.rotary, kv, inputs.plan)
            for layer, kv in zip(self._ready, cycle(inputs.caches), strict=False)
        ]

    def inputs(self, batch: int, context: int) -> DecodeInputs:
        """For ``attention_calls``."""
        return DecodeInputs(self._shape, self._device, self._source, batch, context, len(self._layers))

    def tables(self) -> list[Tensor]:
        """Weights of heads, as many as L2 needs to forget."""
        shape = self._shape
        sets = buffer_sets(head_bytes(shape, 1, logits=False), self._device.l2_bytes)
        return [self._source.normal(shape.vocab, shape.hidden, std=shape.hidden**-0.5) for _ in range(sets)]

    def mlp(self, batch: int) -> list[Figure]:
        coarse = self._coarse_stream(batch)
        theirs = [partial(self._pipeline.mlp_block, *coarse, layer.mlp, EPS) for layer in self._layers]
        _, others = self._time_all({"torch": theirs})
        return [self._figure("mlp", batch, None, self.mlp_calls(batch), others, mlp_bytes(self._shape, batch))]

    def head(self, batch: int) -> list[Figure]:
        """Logits of every row."""
        tables, coarse = self.tables(), self._coarse_stream(batch)
        ours = self.head_calls(batch, [ops.prepare_head(table, keep=True) for table in tables])
        theirs = [partial(self._pipeline.head, *coarse, self._norm, table, EPS) for table in tables]
        _, others = self._time_all({"torch": theirs})
        return [self._figure("head", batch, None, ours, others, head_bytes(self._shape, batch, logits=True))]

    def attention(self, batch: int, context: int) -> list[Figure]:
        """The attention block alone, then a whole layer: with the MLP block behind it."""
        shape = self._shape
        inputs, coarse = self.inputs(batch, context), self._coarse_stream(batch)
        ours = self.attention_calls(batch, inputs)
        theirs: dict[str, list[BlockLaunch]] = {}
        for name, attend_over in inputs.others(self._layers[0].spec).items():
            theirs[name] = [
                partial(
                    self._pipeline.attention_block,
                    *coarse,
                    layer.attention,
                    layer.spec,
                    inputs.rotary,
                    inputs.slots,
                    attend_over(kv),
                )
                for layer, kv in zip(self._layers, cycle(inputs.caches), strict=False)
            ]
        num_bytes = attention_bytes(shape, batch, context)
        best, others = self._time_all(theirs)
        if self._public is not None and (shape.name, batch) == (public.SHAPE_NAME, 1):
            calls = public.attention_launches(self._public, shape, context, len(self._layers), self._device.torch)
            others |= self._time_all({public.NAME: calls})[1]
        attention = self._figure("attention", batch, context, ours, others, num_bytes)
        fastest = {} if best is None else {best: self._whole(theirs[best], self._pipeline.mlp_block, self._layers)}
        _, others = self._time_all(fastest)
        num_bytes += mlp_bytes(shape, batch)
        return [
            attention,
            self._figure("layer", batch, context, self._whole(ours, ops.mlp_block, self._ready), others, num_bytes),
        ]

    def _whole(
        self, attentions: Sequence[BlockLaunch], mlp: Callable[..., object], layers: Sequence[Layer]
    ) -> list[Launch]:
        """Each layer's attention block and, on what it returns, its MLP block."""

        def run(attention: BlockLaunch, layer: Layer) -> object:
            return mlp(*attention(), layer.mlp, EPS)

        return [partial(run, *pair) for pair in zip(attentions, layers, strict=True)]

    def _stream(self, batch: int) -> Tensor:
        return self._source.stream(batch, self._shape.hidden)

    def _coarse_stream(self, batch: int) -> tuple[Tensor, Tensor]:
        return self._stream(batch).bfloat16(), self._stream(batch).bfloat16()

    def _time_all(self, theirs: Mapping[str, Sequence[Launch]]) -> tuple[str | None, dict[str, float]]:
        """Microseconds of each of the others that can be run, and which is fastest."""
        others: dict[str, float] = {}
        for name, launches in theirs.items():
            try:
                others[name] = self._device.time(launches).us
            except RuntimeError as error:  # of a compiler or library that is not ours to judge
                print(f"   {name} does not run: {str(error)[:300]}", flush=True)
                self._device.check()
        return min(others, key=others.__getitem__, default=None), others

    def _figure(
        self,
        block: str,
        batch: int,
        context: int | None,
        ours: Sequence[Launch],
        others: dict[str, float],
        num_bytes: int,
    ) -> Figure:
        timing = self._device.time(ours)
        floor = floor_us(num_bytes, self._bytes_per_s)
        return Figure(self._shape.name, block, batch, context, timing.us, timing.spread_us, floor, others)


class DecodeInputs:
    """Caches and metadata of one batch and context, a multiple of the block size."""

    def __init__(
        self, shape: Shape, device: Device, source: Source, batch: int, context: int, num_layers: int
    ) -> None:
        num_blocks = batch * context // BLOCK_SIZE
        cache = (2, num_blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        num_caches = min(num_layers, buffer_sets(batch * context * shape.kv_token_bytes, device.l2_bytes))
        self.caches = [source.normal(*cache) for _ in range(num_caches)]
        self.step = decode_step([context] * batch, BLOCK_SIZE, num_blocks, device.torch)
        self.rotary = rotary(self.step.positions, shape.head_dim)
        self.plan = ops.plan_attention(self.step, self.caches[0][None], [None], source.dtype)
        slots = (batch, shape.kv_heads, shape.head_dim)
        self.slots = (source.normal(*slots), source.normal(*slots))
        self._contiguous = (2, batch, shape.kv_heads, context, shape.head_dim)

    def others(self, spec: AttentionSpec) -> dict[str, Callable[[Tensor], baselines.Attend]]:
        """The other kernels: what attends over a given cache. SDPA takes its memory for contiguous sequences."""

        def by_sdpa(backend: SDPBackend, kv: Tensor) -> baselines.Attend:
            return baselines.sdpa(spec, kv.view(self._contiguous), backend)

        found: dict[str, Callable[[Tensor], baselines.Attend]] = {}
        for backend in baselines.usable_backends(spec, self.caches[0].view(self._contiguous)):
            found[f"sdpa {backend.name.lower()}"] = partial(by_sdpa, backend)
        if baselines.has_flashinfer():
            found["flashinfer"] = lambda kv: baselines.flashinfer(spec, kv, self.step)
        return found
