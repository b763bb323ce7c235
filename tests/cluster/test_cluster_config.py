from collections.abc import Callable

import pytest

from fuseline.cluster.cluster_config import ClusterConfig, EngineLimits, PoolConfig, is_loopback
from fuseline.runtime.errors import InvalidArgumentError
from fuseline.runtime.role import WorkerRole


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: ClusterConfig(dtype="int3"), "dtype"),
        (lambda: ClusterConfig(device="tpu"), "device"),
        (lambda: ClusterConfig(decode=PoolConfig(0)), "decode"),
        (lambda: PoolConfig(-1), "num_replicas"),
        (lambda: PoolConfig(1025), "num_replicas"),
        (lambda: PoolConfig(num_cpus_per_rank=0), "num_cpus_per_rank"),
        (lambda: ClusterConfig(model=""), "model"),
        (lambda: ClusterConfig(host=""), "host"),
        (lambda: ClusterConfig(ray_address="ray://head:10001"), "ray_address"),
        (lambda: ClusterConfig(port=65536), "port"),
        (lambda: ClusterConfig(start_timeout_s=0), "start_timeout_s"),
        (lambda: ClusterConfig(start_timeout_s=0.01), "start_timeout_s"),
        (lambda: EngineLimits(max_model_len=0), "max_model_len"),
        (lambda: EngineLimits(num_blocks=0), "num_blocks"),
        (lambda: EngineLimits(max_num_seqs=0), "max_num_seqs"),
        (lambda: EngineLimits(max_num_seqs=64, max_num_batched_tokens=32), "max_num_batched_tokens"),
        (lambda: EngineLimits(gpu_memory_utilization=1.5), "gpu_memory_utilization"),
        (lambda: EngineLimits(gpu_memory_utilization=0.01), "gpu_memory_utilization"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(build: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        build()
    assert caught.value.details["field"] == field
    assert caught.value.details["value"] in caught.value.message or caught.value.details["value"] == ""


def test_cpu_share_follows_the_device_unless_stated() -> None:
    config = ClusterConfig(prefill=PoolConfig(num_cpus_per_rank=2))
    assert config.on("cpu").num_cpus_per_rank(WorkerRole.DECODE) == 0.25
    assert config.on("cuda").num_cpus_per_rank(WorkerRole.MIXED) == 1
    assert config.on("cuda").num_cpus_per_rank(WorkerRole.PREFILL) == 2


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("192.168.1.1", False),
        ("10.0.0.7", False),
        ("box", False),
    ],
)
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
