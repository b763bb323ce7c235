"""From a model's name to a model in memory: find it, describe it, load one rank's share of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ..collectives.communicator import GroupCommunicators
from ..kernels.cpu.library import native_library
from ..runtime.config import KV_CACHE_DTYPES, ModelInfo, check_choice
from ..runtime.errors import InvalidArgumentError, ModelFormatError, NotFoundError
from ..runtime.sharding import ParallelConfig
from .checkpoint import DTYPE_BYTES, FLOATS, Checkpoint
from .models.config import DTYPES, KV_DTYPES, DecoderConfig
from .models.decoder import DecoderModel
from .models.registry import load_model_config
from .quantization.cache import FORMAT_VERSION, Arena, aligned, open_arena
from .quantization.config import ROUNDED, Quantization, resolve_quantization
from .quantization.pieces import fill
from .weights import WeightLayout, check_layout, tensor_names

DEMO_NAME = "demo"
DEMO_PATH = Path(__file__).parent / "models" / "demo"

Progress = Callable[[int, int], None]


def resolve_model(name_or_path: str) -> Path:
    """The directory of a model: "demo" for the bundled one, a directory, or the id of a Hugging Face repository.

    A repository is downloaded into Hugging Face's cache, or found there.

    Raises:
        NotFoundError: there is no such directory or repository, or it cannot be reached.
    """
    if name_or_path == DEMO_NAME:
        return DEMO_PATH
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") != 1:
        raise NotFoundError(f"{name_or_path!r} is not a directory, nor the id of a repository", model=name_or_path)
    from .hub import fetch  # its client takes a while to import, and most models are on disk

    return fetch(name_or_path)


def model_info(
    path: Path,
    dtype: str = "auto",
    max_model_len: int | None = None,
    name: str = "",
    device: str = "cpu",
    quantization: str = "auto",
    kv_cache_dtype: str = "auto",
) -> ModelInfo:
    """Describe the model in a directory; reads headers and samples, not the weights.

    Args:
        dtype: to run in; "auto" takes the checkpoint's if the device computes in it, see ``runnable_dtype``.
        device: to run on; "auto" where that is not known yet.
        max_model_len: None takes ``max_position_embeddings``.
        name: that it is served under; the directory's when empty.
        quantization: one of ``runtime.config.QUANTIZATIONS``.
        kv_cache_dtype: one of ``runtime.config.KV_CACHE_DTYPES``.

    Raises:
        NotFoundError: the directory holds no configuration or no weights.
        ModelFormatError: they are malformed or not supported.
        InvalidArgumentError: of ``dtype``, ``max_model_len``, ``quantization`` or ``kv_cache_dtype``.
    """
    config = load_model_config(path)
    held = resolve_quantization(quantization, config.quantization)
    if held is not None and device == "cuda":
        raise InvalidArgumentError(
            f"quantised weights (quantization={held.name}) are computed on a CPU only; use device=cpu",
            field="quantization",
            value=held.name,
            limit="none",
        )
    with Checkpoint(path) as checkpoint:
        fingerprint = checkpoint.fingerprint((path / "config.json").read_bytes())
        if held is not None and held.linear.method == ROUNDED:  # another model as far as its KV is concerned
            fingerprint = hashlib.sha256(f"{fingerprint} {held.name}".encode()).hexdigest()
        if dtype == "auto":
            dtype = config.dtype or _stored_dtype(checkpoint, config)
            dtype = runnable_dtype(dtype, device)
    parse_dtype(dtype)
    check_choice("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    max_model_len = config.resolve_max_model_len(max_model_len)
    return ModelInfo(
        name=name or path.resolve().name,
        fingerprint=fingerprint,
        shape=config.shape(),
        dtype=dtype,
        quantization=held.name if held is not None else "none",
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        eos_token_ids=config.eos_token_ids,
        kv_depends_on_prompt_len=config.rope.kind == "dynamic" and max_model_len > config.max_position_embeddings,
    )


def check_cut(path: Path, parallel: ParallelConfig, quantization: str = "auto") -> None:
    """Refuse a sharding that the model's shape or its quantisation does not allow, before any rank is started.

    Raises:
        ModelFormatError: naming the numbers.
    """
    config = load_model_config(path)
    check_layout(config, parallel, resolve_quantization(quantization, config.quantization))


def runnable_dtype(dtype: str, device: str) -> str:
    """What "auto" means for a checkpoint of ``dtype``: the same, unless torch would have to emulate it on this CPU.

    Without native kernels and 16-bit float instructions a matrix product takes several times as long as with float32
    copies.
    """
    emulated = (dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()) or (
        dtype == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    )
    return "float32" if device == "cpu" and emulated and native_library() is None else dtype


def load_model(
    path: Path,
    config: DecoderConfig,
    dtype: str,
    kv_dtype: str,
    device: torch.device,
    parallel: ParallelConfig,
    rank: int,
    communicators: GroupCommunicators,
    progress: Progress | None = None,
    quantization: str = "auto",
) -> DecoderModel:
    """Load what ``rank`` holds; of every tensor only the rank's own slice is read.

    On a CPU, matrices that are stored in ``dtype`` are not copied but mapped, and shared by all processes that map
    the file. It must stay as it is while the model lives.

    Args:
        dtype: "float32", "bfloat16" or "float16"; floats stored otherwise are converted.
        kv_dtype: of its KV cache, as ``ModelInfo.kv_dtype``.
        progress: called with the bytes read so far and the bytes this rank will have read.
        quantization: as for ``model_info``.

    Raises:
        ModelFormatError: the weights are missing, malformed, or not those that ``config`` describes.
    """
    held = resolve_quantization(quantization, config.quantization)
    with Checkpoint(path) as checkpoint, _quantized_memory(path, checkpoint, config, parallel, rank, held) as arena:
        _refuse_unknown(checkpoint, config, held)
        allocate = arena.allocate if arena is not None else None
        view = partial(checkpoint.view, dtype=parse_dtype(dtype)) if device.type == "cpu" else None
        layout = WeightLayout(config, parallel, rank, parse_dtype(dtype), device, held, allocate, view)
        infos = {id(piece): checkpoint.check(piece.source) for piece in layout.pieces}
        sizes = [piece.check(checkpoint) for piece in layout.quantized]
        if arena is not None and arena.filled:
            layout.quantized, sizes = [], []
        total = sum(piece.source.num_elements * DTYPE_BYTES[infos[id(piece)].dtype] for piece in layout.pieces)
        total += sum(end - start for start, end in map(checkpoint.extent, layout.viewed))
        report = _Report(total + sum(sizes), progress)
        for source in layout.viewed:
            for read in checkpoint.populate(source):
                report.add(read)
        for piece in sorted(layout.pieces, key=lambda piece: infos[id(piece)].file):
            for read in checkpoint.read(piece.source, piece.out):
                report.add(read)
        for quantized, size in zip(layout.quantized, sizes, strict=True):
            before = 0
            for done in fill(checkpoint, quantized):
                report.add(int(done * size) - before)
                before = int(done * size)
    return DecoderModel(config, parallel, rank, layout.weights, communicators.tp, KV_DTYPES[kv_dtype])


class _Report:
    """Tells of progress in bytes."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def _quantized_memory(
    path: Path,
    checkpoint: Checkpoint,
    config: DecoderConfig,
    parallel: ParallelConfig,
    rank: int,
    quantization: Quantization | None,
) -> Iterator[Arena | None]:
    """Where a rank's quantised weights lie, from the cache if they are in it; None when there are none."""
    if quantization is None:
        yield None
        return
    meta = torch.device("meta")
    layout = WeightLayout(config, parallel, rank, torch.float32, meta, quantization)
    tensors = [tensor for piece in layout.quantized for tensor in piece.out.tensors().values()]
    num_bytes = sum(aligned(tensor.numel() * tensor.itemsize) for tensor in tensors)
    fingerprint = checkpoint.fingerprint((path / "config.json").read_bytes())
    sharding = f"{parallel.tensor_parallel_size} {parallel.pipeline_parallel_size} {rank}"
    key = hashlib.sha256(f"{FORMAT_VERSION} {fingerprint} {quantization.name} {sharding}".encode()).hexdigest()
    with open_arena(key[:40], num_bytes) as arena:
        yield arena


def parse_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name.

    Raises:
        InvalidArgumentError: models do not run in it.
    """
    check_choice("dtype", name, DTYPES)
    return DTYPES[name]


def _stored_dtype(checkpoint: Checkpoint, config: DecoderConfig) -> str:
    stored = checkpoint.tensors.get(config.names.embedding)
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if stored is None or stored.dtype not in names:
        raise ModelFormatError(
            f"{checkpoint.files[0]}: no tensor {config.names.embedding} of a supported dtype",
            file=checkpoint.files[0],
            tensor=config.names.embedding,
        )
    return names[stored.dtype]


def _refuse_unknown(checkpoint: Checkpoint, config: DecoderConfig, quantization: Quantization | None) -> None:
    """Weights that the configuration does not account for mean that it describes another model."""
    known = tensor_names(config, quantization) | {config.names.head}
    for name, info in checkpoint.tensors.items():
        # Old checkpoints carry the rotary frequencies, which follow from the configuration.
        if name in known or name.endswith(".rotary_emb.inv_freq") or _is_no_bias(checkpoint, name, quantization):
            continue
        why = f"is not part of a {config.architecture} as config.json describes it"
        if quantization is None and name.endswith((".qweight", ".qzeros", ".g_idx", ".weight_packed")):
            why = "is of a quantised layer, but config.json has no quantization_config"
        raise ModelFormatError(f"{info.file}: tensor {name} {why}", file=info.file, tensor=name)


def _is_no_bias(checkpoint: Checkpoint, name: str, quantization: Quantization | None) -> bool:
    """Whether this is the bias of zeros that some quantisers give to layers without one."""
    info = checkpoint.tensors[name]
    if quantization is None or not name.endswith(".bias") or len(info.shape) != 1 or info.dtype not in FLOATS:
        return False
    return not checkpoint.read_range(name, info.shape, FLOATS, (0, info.shape[0])).any()
