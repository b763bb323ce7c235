"""A checkpoint on disk: one safetensors file, or several with an index. Reads slices, or maps them where they lie.

Headers are read and checked here before a file is mapped: a truncated file that is mapped would kill the process on
first touch instead of raising.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..runtime.errors import ModelFormatError, NotFoundError
from .mapped_file import MappedFile
from .models.config_fields import ConfigFields

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 * 2**20
# At most this much is read at once, so that loading needs little memory beside the weights themselves.
READ_BYTES = 32 * 2**20
REMAP_BYTES = 256 * 2**20
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "I32": 4, "I64": 8}
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOATS = tuple(TORCH_DTYPES)

# A file up to this size is hashed whole; of a larger one, HASH_SAMPLES pieces of HASH_PIECE_BYTES at equal distances.
HASH_WHOLE_BYTES = 64 * 2**20
HASH_SAMPLES = 4096
HASH_PIECE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor: where it is, and safetensors' name of its dtype.

    Attributes:
        offset: of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """Indices ``[start, end)`` along dimension ``dim`` of a tensor whose whole shape is ``shape``."""

    name: str
    shape: tuple[int, ...]
    dim: int
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        """How many elements the slice has."""
        return math.prod(self.shape) // self.shape[self.dim] * (self.end - self.start)


class Checkpoint:
    """The tensors of a model directory. Reading goes file by file quickest.

    Raises (on construction):
        NotFoundError: the directory holds no safetensors weights.
        ModelFormatError: a header or the index is malformed, a file is truncated or missing.
    """

    def __init__(self, path: Path) -> None:
        self._current: tuple[Path, Any] | None = None  # safetensors' handles are untyped
        self._mapped_bytes = 0
        self._files: dict[Path, MappedFile] = {}
        self.tensors: dict[str, TensorInfo] = {}
        single = path / SINGLE_FILE
        if single.exists():
            self.files: tuple[Path, ...] = (single,)
            self.tensors = read_header(single)
        else:
            self.files = self._read_index(path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def check(self, wanted: TensorSlice) -> TensorInfo:
        """What the header says of the float tensor a slice is of.

        Raises:
            ModelFormatError: as ``check_tensor`` does.
        """
        return self.check_tensor(wanted.name, wanted.shape, FLOATS)

    def view(self, wanted: TensorSlice, dtype: torch.dtype) -> torch.Tensor | None:
        """A slice where it lies, or None if it is stored in another dtype or where elements are not aligned.

        The mapping lives as long as its views, and is shared with other processes that map the file. Never write to a
        view. The rows of a slice of columns lie apart.

        Raises:
            ModelFormatError: as ``check`` does.
        """
        info = self.check(wanted)
        if TORCH_DTYPES[info.dtype] != dtype:
            return None
        whole = self._map(info.file).view(info.offset, info.shape, dtype)
        return None if whole is None else whole.narrow(wanted.dim, wanted.start, wanted.end - wanted.start)

    def extent(self, wanted: TensorSlice) -> tuple[int, int]:
        """Where in its file the bytes of a slice begin and end; of columns, those of the whole tensor."""
        info = self.check(wanted)
        if wanted.dim == 1 or not wanted.num_elements:
            return info.offset, info.offset + info.num_bytes
        row_bytes = info.num_bytes // info.shape[0]
        return info.offset + wanted.start * row_bytes, info.offset + wanted.end * row_bytes

    def populate(self, wanted: TensorSlice) -> Iterator[int]:
        """Bring the extent of a slice that was viewed into memory, in pieces; yields the bytes of each."""
        return self._map(self.check(wanted).file).populate(*self.extent(wanted))

    def _map(self, path: Path) -> MappedFile:
        if path not in self._files:
            self._files[path] = MappedFile(path)
        return self._files[path]

    def check_tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> TensorInfo:
        """What the header says of a tensor.

        Raises:
            ModelFormatError: the tensor is missing, or has another shape or none of these dtypes.
        """
        info = self.tensors.get(name)
        if info is None:
            raise ModelFormatError(
                f"{', '.join(file.name for file in self.files)} in {self.files[0].parent}: no tensor {name}",
                file=self.files[0],
                tensor=name,
            )
        if info.shape != shape:
            raise ModelFormatError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, the configuration demands {list(shape)}",
                file=info.file,
                tensor=name,
            )
        if info.dtype not in dtypes:
            raise ModelFormatError(
                f"{info.file}: tensor {name} is {info.dtype}, supported are {', '.join(dtypes)}",
                file=info.file,
                tensor=name,
            )
        return info

    def read_range(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], *ranges: tuple[int, int]
    ) -> torch.Tensor:
        """A copy of a part of a tensor, as it is stored; one range ``[start, end)`` for each dimension.

        Raises:
            ModelFormatError: as ``check_tensor`` does.
        """
        info = self.check_tensor(name, shape, dtypes)
        source = self._open(info.file).get_slice(name)
        piece: torch.Tensor = source[tuple(slice(*span) for span in ranges)]
        self._mapped_bytes += piece.nbytes
        return piece

    def read(self, wanted: TensorSlice, out: torch.Tensor) -> Iterator[int]:
        """Copy a slice into ``out``, converting to its dtype, in pieces; yields the bytes read of each.

        Raises:
            ModelFormatError: as ``check`` does, or a value does not fit the dtype of ``out``.
        """
        info = self.check(wanted)
        row_bytes = max(1, wanted.num_elements // max(1, out.shape[0])) * DTYPE_BYTES[info.dtype]
        rows = max(1, READ_BYTES // row_bytes)
        for row in range(0, out.shape[0], rows):
            end = min(row + rows, out.shape[0])
            source = self._open(info.file).get_slice(wanted.name)
            if wanted.dim == 0:
                piece = source[wanted.start + row : wanted.start + end]
            else:
                piece = source[row:end, wanted.start : wanted.end]
            out[row:end].copy_(piece)
            if out.dtype == torch.float16 and not torch.isfinite(out[row:end]).all():
                raise ModelFormatError(
                    f"{info.file}: tensor {wanted.name} has values that float16 cannot hold",
                    file=info.file,
                    tensor=wanted.name,
                )
            self._mapped_bytes += (end - row) * row_bytes
            yield (end - row) * row_bytes

    def fingerprint(self, config: bytes) -> str:
        """Hex SHA-256 over ``config``, the files' sizes and headers, and their content.

        Files up to ``HASH_WHOLE_BYTES`` are hashed whole; of larger ones ``HASH_SAMPLES`` evenly spaced pieces, which
        is 16 MiB a file. Weights trained further differ nearly everywhere and so in the sample; a change of a few
        elements in a large file, made by hand, may go unseen.
        """
        digest = hashlib.sha256(hashlib.sha256(config).digest())
        for file in self.files:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                if size <= HASH_WHOLE_BYTES:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                    continue
                length = stream.read(8)
                digest.update(stream.read(struct.unpack("<Q", length)[0]))
                for sample in range(HASH_SAMPLES):
                    stream.seek((size - HASH_PIECE_BYTES) * sample // (HASH_SAMPLES - 1))
                    digest.update(stream.read(HASH_PIECE_BYTES))
        return digest.hexdigest()

    def _open(self, path: Path) -> Any:
        """The handle of a file. One is open at a time and not for long, since the pages of a mapped file that were
        read count as the process's memory.
        """
        if self._current is None or self._current[0] != path or self._mapped_bytes > REMAP_BYTES:
            self._close()
            try:
                file: Any = safe_open(path, framework="pt")
                self._current = path, file.__enter__()
            except SafetensorError as error:
                raise ModelFormatError(f"{path} is not a safetensors file: {error}", file=path) from error
        return self._current[1]

    def _close(self) -> None:
        if self._current is not None:
            self._current[1].__exit__(None, None, None)
            self._current, self._mapped_bytes = None, 0

    def _read_index(self, path: Path) -> tuple[Path, ...]:
        index_path = path / INDEX_FILE
        if not index_path.exists():
            raise NotFoundError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}", path=path)
        index = ConfigFields.read(index_path)
        weight_map = index.nested("weight_map")
        if weight_map is None:
            raise index.error("weight_map", "an object that names each tensor's file")
        headers: dict[str, dict[str, TensorInfo]] = {}
        for tensor in weight_map.names():
            name = weight_map.text(tensor)
            if name != PurePosixPath(name).name or not name.endswith(".safetensors"):
                raise weight_map.error(tensor, "the name of a safetensors file beside the index")
            if name not in headers:
                if not (path / name).exists():
                    raise ModelFormatError(
                        f"{index_path} names {name} for tensor {tensor}, which does not exist",
                        file=path / name,
                        tensor=tensor,
                    )
                headers[name] = read_header(path / name)
            if tensor not in headers[name]:
                raise ModelFormatError(
                    f"{path / name}: no tensor {tensor}, though {INDEX_FILE} says so", file=path / name, tensor=tensor
                )
            self.tensors[tensor] = headers[name][tensor]
        if not headers:
            raise index.error("weight_map", "an object that names each tensor's file")
        return tuple(path / name for name in sorted(headers))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, from its header; reads nothing else.

    Raises:
        ModelFormatError: the header is malformed, the file is shorter or longer than it says, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES + 1
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise ModelFormatError(
                    f"{path} is truncated or not a safetensors file: no room for its header", file=path
                )
            header = json.loads(stream.read(length))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path}: the header is not JSON: {error}", file=path) from error
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}", file=path) from error
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: the header is not a JSON object", file=path)
    tensors: dict[str, TensorInfo] = {}
    data_bytes = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensors[name], end = _parse_entry(path, name, entry, 8 + length)
        data_bytes = max(data_bytes, end)
    if 8 + length + data_bytes != size:
        raise ModelFormatError(
            f"{path} is truncated or has trailing bytes: the header accounts for {8 + length + data_bytes} bytes, "
            f"the file has {size}",
            file=path,
        )
    return tensors


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> tuple[TensorInfo, int]:
    """A tensor's description, and where its bytes end, counted from the start of all data."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            expected = math.prod(shape) * DTYPE_BYTES.get(dtype, 0)
            if 0 <= start <= end and (dtype not in DTYPE_BYTES or end - start == expected):
                return TensorInfo(path, dtype, tuple(shape), data_start + start), end
    raise ModelFormatError(f"{path}: malformed header entry for tensor {name}: {entry!r}", file=path, tensor=name)
