"""What a cluster should be: one frozen tree, validated once when it is built."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass

from ..runtime.config import (
    DEVICES,
    GPU_MEMORY_UTILIZATION,
    KV_CACHE_DTYPES,
    QUANTIZATIONS,
    TIMEOUT_S,
    CacheConfig,
    SchedulerConfig,
    check_choice,
    check_range,
)
from ..runtime.errors import InvalidArgumentError
from ..runtime.role import WorkerRole
from ..runtime.sharding import ParallelConfig

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_REPLICAS = 1024
DEFAULT_PORT = 50051
CPUS_PER_CPU_RANK = 0.25
CPUS_PER_GPU_RANK = 1.0


def check_num_replicas(name: str, value: int, low: int) -> None:
    """Refuse a pool size that is out of range.

    Raises:
        InvalidArgumentError: naming the pool.
    """
    if not low <= value <= MAX_REPLICAS:
        raise InvalidArgumentError(
            f"{name} must have {low} to {MAX_REPLICAS} replicas, got {value}",
            field=name,
            value=value,
            limit=f"{low}..{MAX_REPLICAS}",
        )


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """One pool at start; afterwards ``num_replicas`` is the target's business, see ``reconcile.py``.

    Attributes:
        num_cpus_per_rank: what each rank takes from Ray's CPU account; None stands for 1 on a GPU, where a core
            drives the device, and 0.25 on a CPU. The quarter is a share, not a measure of need: it lets a demo with
            four replicas run on two cores, more slowly. State whole CPUs to keep cores apart; a CPU rank computes
            with ``max(1, int(num_cpus_per_rank))`` threads.
    """

    num_replicas: int = 1
    parallel: ParallelConfig = ParallelConfig()
    num_cpus_per_rank: float | None = None

    def __post_init__(self) -> None:
        check_num_replicas("num_replicas", self.num_replicas, 0)
        if self.num_cpus_per_rank is not None and not 0 < self.num_cpus_per_rank <= 1024:
            raise InvalidArgumentError(
                f"num_cpus_per_rank must be above 0 and at most 1024, got {self.num_cpus_per_rank}",
                field="num_cpus_per_rank",
                value=self.num_cpus_per_rank,
                limit="0..1024",
            )


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of every engine in the cluster. None: from the model (max_model_len) or the free memory (num_blocks).

    ``gpu_memory_utilization`` is the fraction of a GPU's memory that weights, KV and work space may take together.
    """

    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_num_queued: int = 4096
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise InvalidArgumentError(
                f"max_model_len must be at least 1, got {self.max_model_len}",
                field="max_model_len",
                value=self.max_model_len,
                limit=1,
            )
        # The group's and the engine's own checks, now rather than in a worker on another machine.
        check_range("gpu_memory_utilization", self.gpu_memory_utilization, *GPU_MEMORY_UTILIZATION)
        CacheConfig(1 if self.num_blocks is None else self.num_blocks, self.block_size)
        self.scheduler()

    def scheduler(self) -> SchedulerConfig:
        """The scheduler's part of it."""
        return SchedulerConfig(self.max_num_seqs, self.max_num_batched_tokens, self.max_num_queued)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that ``fuseline serve`` decides by.

    Attributes:
        model: "demo", a folder, or a model's name on the Hugging Face hub.
        served_name: what clients call the model; empty for ``model``.
        quantization: of the linear layers, one of ``runtime.config.QUANTIZATIONS``.
        kv_cache_dtype: one of ``runtime.config.KV_CACHE_DTYPES``.
        device: "auto" becomes "cuda" when the Ray cluster has GPUs enough for the target, else "cpu".
        prefill: with 0 replicas there is no prefill pool and decode workers compute prompts themselves.
        host, port: where the gateway listens; port 0 lets the system choose.
        ray_address: "" starts a private Ray on this machine; else an existing cluster to join ("auto", "host:port").
        bind_node_address: workers listen on their node's address instead of loopback. Needed, and only allowed by
            asking for it, when the Ray cluster has more than one node.
        allow_cross_node_tp: a tensor-parallel group may straddle nodes; slow without a fast fabric.
        start_timeout_s: most seconds from a replica's placement to its being ready, loading included.
        drain_timeout_s: most seconds that requests get to finish on a replica that is drained.

    Raises:
        InvalidArgumentError: naming field, value and limit.
    """

    model: str = "demo"
    served_name: str = ""
    dtype: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    limits: EngineLimits = EngineLimits()
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    ray_address: str = ""
    bind_node_address: bool = False
    allow_cross_node_tp: bool = False
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, DEVICES)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_num_replicas("decode", self.decode.num_replicas, 1)
        if not self.model:
            raise InvalidArgumentError("model must not be empty", field="model", value=self.model)
        if "://" in self.ray_address:
            raise InvalidArgumentError(
                "ray_address must be auto or host:port, reached from a node of that cluster;"
                f" got {self.ray_address!r}, which is for Ray's client",
                field="ray_address",
                value=self.ray_address,
            )
        if not self.host:
            raise InvalidArgumentError("host must not be empty", field="host", value=self.host)
        check_range("port", self.port, 0, 65535)
        for name in ("start_timeout_s", "drain_timeout_s"):
            check_range(name, getattr(self, name), *TIMEOUT_S)

    @property
    def name(self) -> str:
        """The served model's name."""
        return self.served_name or self.model

    def pool(self, role: WorkerRole) -> PoolConfig:
        """The pool that workers of ``role`` belong to; MIXED workers are the decode pool's."""
        return self.prefill if role is WorkerRole.PREFILL else self.decode

    def on(self, device: str) -> ClusterConfig:
        """The same with ``device`` resolved."""
        return dataclasses.replace(self, device=device)

    def num_cpus_per_rank(self, role: WorkerRole) -> float:
        """Ray's CPU account of one rank; needs a resolved device."""
        stated = self.pool(role).num_cpus_per_rank
        if stated is not None:
            return stated
        return CPUS_PER_GPU_RANK if self.device == "cuda" else CPUS_PER_CPU_RANK


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
