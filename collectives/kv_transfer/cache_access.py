"""Reading pieces out of a paged KV cache and writing them in.

Two implementations of one protocol: numpy views for a cache in host memory, which copy each byte once and leave the
interpreter lock while they do; torch indexing through a pinned buffer for a cache on a device. The second runs on a
CPU too, where tests hold it against the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.errors import InvalidArgumentError
from ...runtime.sharding import KvRange
from ..segment import Bytes

BlockIds = NDArray[np.int64]


class Ready(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has got there."""


class CacheAccess(Protocol):
    """One rank's KV cache as bytes. Layers and heads are those of the whole model; they must be in ``kv_range``.

    Attributes:
        head_bytes: of one token of one head: a row, see ``kernels.kv_rows``.
        dtype: of the elements, by torch's name without ``torch.``.
    """

    kv_range: KvRange
    num_blocks: int
    block_size: int
    head_bytes: int
    dtype: str

    def mark_written(self) -> Ready | None:
        """What ``gather`` must be preceded by waiting for, to see all that the calling thread has queued so far."""

    def gather(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, out: Bytes
    ) -> None:
        """Copy K, then V, of the token range into ``out``, each ``[head, token, row_width]``; complete on return."""

    def scatter(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, data: Bytes
    ) -> None:
        """The reverse: overwrite the cache with ``data``; complete on return."""


def cache_access(kv_cache: Tensor, kv_range: KvRange) -> CacheAccess:
    """The way to get at a cache ``[num_layers, 2, num_blocks, num_kv_heads, block_size, row_width]``.

    Raises:
        InvalidArgumentError: the tensor has another form, is not contiguous, or does not hold that range.
    """
    shape = tuple(kv_cache.shape)
    if kv_cache.dim() != 6 or kv_cache.shape[1] != 2 or not kv_cache.is_contiguous():
        raise InvalidArgumentError(
            f"a KV cache is contiguous [layers, 2, blocks, heads, block_size, row_width], not {shape}", shape=shape
        )
    if (shape[0], shape[3]) != (kv_range.num_layers, kv_range.num_heads):
        raise InvalidArgumentError(f"a KV cache of shape {shape} does not hold {kv_range}", shape=shape)
    if kv_cache.device.type == "cpu":
        return HostCacheAccess(kv_cache, kv_range)
    return DeviceCacheAccess(kv_cache, kv_range)


class _Geometry:
    """The numbers that both implementations have in common."""

    def __init__(self, kv_cache: Tensor, kv_range: KvRange) -> None:
        self.kv_range = kv_range
        self.num_blocks, self.block_size = kv_cache.shape[2], kv_cache.shape[4]
        self.head_bytes = kv_cache.shape[5] * kv_cache.element_size()
        self.dtype = str(kv_cache.dtype).removeprefix("torch.")

    def _local(self, layer: int, heads: tuple[int, int]) -> tuple[int, slice]:
        first = self.kv_range.head_start
        return layer - self.kv_range.layer_start, slice(heads[0] - first, heads[1] - first)


class HostCacheAccess(_Geometry):
    """See ``CacheAccess``; for a cache in host memory. Whole blocks go in one call of numpy, whatever their ids."""

    def __init__(self, kv_cache: Tensor, kv_range: KvRange) -> None:
        super().__init__(kv_cache, kv_range)
        self._bytes = kv_cache.view(torch.uint8).flatten(4).numpy()  # [layer, 2, block, head, token in block * bytes]
        # Of a layer seen as rows [(2, block, head), bytes]: the row of block 0, for K and V and each head.
        kv, head = np.arange(2)[:, None, None], np.arange(kv_range.num_heads)[:, None]
        self._first_rows = kv * self.num_blocks * kv_range.num_heads + head

    def mark_written(self) -> Ready | None:
        """See ``CacheAccess``; on a CPU nothing is queued."""
        return None

    def gather(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, out: Bytes
    ) -> None:
        """See ``CacheAccess``."""
        local_layer, local_heads = self._local(layer, heads)
        cache = self._bytes[local_layer]
        for blocks, within, piece in self._parts(heads, tokens, block_ids, out):
            if within.start is None and piece.size == out.size:
                # All of the piece is whole blocks: numpy can gather into it without a copy in between.
                rows = self._first_rows[:, local_heads] + blocks * cache.shape[2]  # [2, head, block]
                row_bytes = cache.shape[3]
                into = out.reshape(-1, row_bytes)
                np.take(cache.reshape(-1, row_bytes), rows.reshape(-1), axis=0, out=into, mode="clip")
            else:
                piece[...] = cache[:, blocks, local_heads, within]

    def scatter(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, data: Bytes
    ) -> None:
        """See ``CacheAccess``."""
        local_layer, local_heads = self._local(layer, heads)
        cache = self._bytes[local_layer]
        for blocks, within, piece in self._parts(heads, tokens, block_ids, data):
            cache[:, blocks, local_heads, within] = piece

    def _parts(
        self, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, flat: Bytes
    ) -> Iterator[tuple[BlockIds, slice, Bytes]]:
        """At most three parts of a piece: what it holds of a first block, of whole blocks, and of a last block.

        Each is the blocks' ids, the bytes within each block, and a view of the piece ``[2, block, head, bytes]``.
        """
        size, width = self.block_size, self.head_bytes
        start, end = tokens
        piece = flat.reshape(2, heads[1] - heads[0], (end - start) * width)
        while start < end:
            block, offset = divmod(start, size)
            count = (end - start) // size
            if offset or not count:
                stop = min(end, start - offset + size)
                within, count = slice(offset * width, (offset + stop - start) * width), 1
            else:
                stop, within = start + count * size, slice(None)
            view = piece[:, :, (start - tokens[0]) * width : (stop - tokens[0]) * width]
            view = view.reshape(2, heads[1] - heads[0], count, -1).swapaxes(1, 2)  # cuts one axis: still a view
            yield block_ids[block : block + count], within, view
            start = stop


class DeviceCacheAccess(_Geometry):
    """See ``CacheAccess``; for a cache on a device, on a stream of its own. Each call waits for its own copies."""

    def __init__(self, kv_cache: Tensor, kv_range: KvRange) -> None:
        super().__init__(kv_cache, kv_range)
        self._device = kv_cache.device
        # [layer, block, token in block, 2, head, bytes]: tokens can be indexed by (block, offset)
        self._bytes = kv_cache.view(torch.uint8).permute(0, 2, 4, 1, 3, 5)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def mark_written(self) -> Ready | None:
        """See ``CacheAccess``."""
        return None if self._stream is None else torch.cuda.current_stream(self._device).record_event()

    def gather(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, out: Bytes
    ) -> None:
        """See ``CacheAccess``."""
        local_layer, local_heads = self._local(layer, heads)
        with torch.cuda.stream(self._stream):
            blocks, offsets = self._slots(tokens, block_ids)
            rows = self._bytes[local_layer][blocks, offsets, :, local_heads]  # [token, 2, head, bytes]
            staged = self._staging(len(out))
            staged.copy_(rows.permute(1, 2, 0, 3).reshape(-1), non_blocking=True)
            self._wait()
        np.copyto(out, staged.numpy())

    def scatter(
        self, layer: int, heads: tuple[int, int], tokens: tuple[int, int], block_ids: BlockIds, data: Bytes
    ) -> None:
        """See ``CacheAccess``."""
        local_layer, local_heads = self._local(layer, heads)
        staged = self._staging(len(data))
        np.copyto(staged.numpy(), data)
        with torch.cuda.stream(self._stream):
            blocks, offsets = self._slots(tokens, block_ids)
            rows = staged.to(self._device, non_blocking=True).view(2, heads[1] - heads[0], len(blocks), -1)
            self._bytes[local_layer][blocks, offsets, :, local_heads] = rows.permute(2, 0, 1, 3)
            self._wait()

    def _slots(self, tokens: tuple[int, int], block_ids: BlockIds) -> tuple[Tensor, Tensor]:
        positions = np.arange(*tokens)
        blocks = torch.from_numpy(block_ids[positions // self.block_size])
        return blocks.to(self._device), torch.from_numpy(positions % self.block_size).to(self._device)

    def _staging(self, num_bytes: int) -> Tensor:
        # torch keeps freed pinned memory for the next call of the size, so this allocates once per size.
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
