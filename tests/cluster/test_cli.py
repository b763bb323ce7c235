"""The command line: what it understands, what it refuses in one line, and what it does to a running cluster."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fuseline import __version__
from fuseline.cluster import cli, serving
from fuseline.cluster.cluster_config import ClusterConfig, EngineLimits, PoolConfig
from fuseline.cluster.cluster_service import ClusterService
from fuseline.cluster.commands import app
from fuseline.cluster.messages import Loading
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.runtime.sharding import ParallelConfig
from fuseline.tests.cluster.live_cluster import LiveCluster, gateway_over, live_cluster
from fuseline.tests.cluster.memory_cluster import Cluster, reached, running, until

PROMPT = "def read(path):\n"


Told = tuple[int | None, str, str]  # exit code, standard output, standard error
Run = Callable[..., Told]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run_line(*arguments: str) -> Told:
        return app.run(arguments), *capsys.readouterr()

    return run_line


def test_it_says_what_there_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in (("--help",), ()):
        code, out, err = run(*line)
        assert (code, err) == (0, "")
        assert all(command in out for command in ("serve", "generate", "scale", "status", "stop"))
    monkeypatch.setenv("COLUMNS", "80")
    told = run("serve", "--help")[1]
    assert all(f"{flag} " in told for flag in ("--prefill-pipeline-parallel-size", "--num-gpu-blocks-override"))
    assert run("--version") == (0, f"fuseline {__version__}\n", "")


def test_ctrl_c_before_there_is_anything_to_stop_shows_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("serve demo --decode 0", 2, "decode must have 1 to 1024 replicas, got 0"),
        ("serve demo --prefill -1", 2, "prefill must have 0 to 1024 replicas, got -1"),
        ("serve demo --grpc-port 0 -tp 3", 1, "num_attention_heads=4 is not divisible by tensor_parallel_size=3"),
        ("serve demo --tensor-parallel-size 0", 2, "tensor_parallel_size must be between 1 and 64, got 0"),
        ("serve demo --decode-tensor-parallel-size 0", 2, "tensor_parallel_size must be between"),
        ("serve demo --dtype float8", 2, "dtype must be one of"),
        ("serve demo --kv-cache-dtype int4", 2, "kv_cache_dtype must be one of auto, int8; got 'int4'"),
        ("serve demo --grpc-port 70000", 2, "port must be between 0 and 65535, got 70000"),
        ("serve demo --block-size 0", 2, "block_size must be between"),
        ("serve demo --prefil 2", 2, "No such option: --prefil"),
        ("serve /no/such/model", 1, "'/no/such/model' is not a directory"),
        (
            "serve demo --grpc-port 0 --ray-address 127.0.0.1:1",
            1,
            "no Ray cluster answers at 127.0.0.1:1: Connection",
        ),
        ("serve", 2, "Missing argument"),
        ("serv demo", 2, "No such command 'serv'"),
        ("generate x --temperature -1", 2, "temperature must be in [0.0, 100.0], got -1.0"),
        ("generate x --max-tokens many", 2, "Invalid value for '--max-tokens'"),
        ("generate x --priority 99999999999", 2, "priority cannot be sent: Value out of range"),
        ("generate x --address nowhere", 2, "address must be host:port, got 'nowhere'"),
        ("generate x --address 127.0.0.1:1", 1, "no answer from 127.0.0.1:1: Connection refused"),
        ("status --address 127.0.0.1:1", 1, "no answer from 127.0.0.1:1: Connection refused"),
        ("stop --address 127.0.0.1:1", 1, "no answer from"),
        ("scale decode --address 127.0.0.1:1", 2, "a pool's size is written as decode=3, got 'decode'"),
        ("scale decode=-1 --address 127.0.0.1:1", 2, "a pool's size is written as decode=3"),
        ("scale decode=1 decode=2 --address 127.0.0.1:1", 2, "decode is given twice"),
        ("scale encode=1 --address 127.0.0.1:1", 2, "there is no pool 'encode'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run: Run, line: str, code: int, message: str) -> None:
    exit_code, out, err = run(*line.split())
    assert (exit_code, out) == (code, "")
    assert err.startswith(f"fuseline: {message}")
    assert err.count("\n") == 1


def test_serve_understands_its_flags(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ClusterConfig] = []
    monkeypatch.setattr(serving, "run_cluster", lambda config, say: asked.append(config))
    assert run("serve", "demo")[0] == 0
    line = (
        "serve demo --prefill 2 --decode 3 -tp 2 -pp 2 --decode-tensor-parallel-size 4 --dtype float32 --device cpu"
        " --max-model-len 512 --block-size 32 --max-num-seqs 8 --max-num-batched-tokens 256 --host 0.0.0.0"
        " --grpc-port 1234 --ray-address auto --no-enable-prefix-caching --num-gpu-blocks-override 100"
        " --served-model-name mine --start-timeout 9 --drain-timeout 8 --num-cpus-per-rank 0.5 --bind-node-address"
        " --allow-cross-node-tp --gpu-memory-utilization 0.5 --prefill-pipeline-parallel-size 1"
        " --kv-cache-dtype int8"
    )
    assert run(*line.split()) == (0, "", "")
    assert asked == [
        ClusterConfig(),
        ClusterConfig(
            model="demo",
            served_name="mine",
            dtype="float32",
            kv_cache_dtype="int8",
            device="cpu",
            prefill=PoolConfig(2, ParallelConfig(2, 1), 0.5),
            decode=PoolConfig(3, ParallelConfig(4, 2), 0.5),
            limits=EngineLimits(512, 32, 100, False, 8, 256, gpu_memory_utilization=0.5),
            host="0.0.0.0",  # noqa: S104
            port=1234,
            ray_address="auto",
            bind_node_address=True,
            allow_cross_node_tp=True,
            start_timeout_s=9,
            drain_timeout_s=8,
        ),
    ]


def test_a_port_in_use_is_found_before_anything_is_started(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("serve", "demo", "--grpc-port", str(port))
        unknown = run("serve", "/no/such/model", "--grpc-port", str(port))
    assert (code, out) == (1, "")
    assert err == f"fuseline: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert unknown[2].startswith("fuseline: '/no/such/model' is not a directory")


@pytest.fixture
async def cluster() -> AsyncIterator[LiveCluster]:
    async with running(Cluster()) as controller:
        await reached(controller)
        service = ClusterService(controller, stop=lambda: None)
        async with live_cluster(prefill=0, cluster_service=service) as live:
            yield live


async def fuseline(cluster: LiveCluster, *arguments: str, given: str = "") -> Told:
    """The installed command, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("fuseline"),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"FUSELINE_ADDRESS": cluster.address, "COLUMNS": "40"},
    )
    out, err = await process.communicate(given.encode())
    return process.returncode, out.decode(), err.decode()


async def test_generate_prints_the_text_and_tells_the_rest_apart(cluster: LiveCluster) -> None:
    params = SamplingParams(seed=4, max_tokens=12, n=2)
    expected = await cluster.client.complete(PROMPT, params)
    options = ("--seed", "4", "--max-tokens", "12")
    streamed, whole, both, too_long = await asyncio.gather(
        fuseline(cluster, "generate", PROMPT, *options, "--stats"),
        fuseline(cluster, "generate", "-", *options, "--no-stream", given=PROMPT),
        fuseline(cluster, "generate", PROMPT, *options, "-n", "2"),
        fuseline(cluster, "generate", "x" * 10_000, *options),
    )
    first, second = (completion.text for completion in expected.completions)
    assert streamed[:2] == (0, f"{first}\n")
    assert "12 tokens (length), TTFT" in streamed[2]
    assert whole == (0, f"{first}\n", "")
    assert both == (0, f"--- 0\n{first}\n--- 1\n{second}\n", "")
    assert too_long[:2] == (2, "")
    assert too_long[2].startswith("fuseline: the prompt has")


async def test_status_shows_how_much_of_the_weights_is_read() -> None:
    loading = Cluster(on_start=lambda worker: worker.read(Loading(10**9, 4 * 10**9)))
    async with running(loading) as controller:
        await until(controller, lambda status: all(row.loading.total_bytes for row in status.replicas))
        async with gateway_over([], ClusterService(controller, stop=lambda: None)) as cluster:
            table, told = await asyncio.gather(fuseline(cluster, "status"), fuseline(cluster, "status", "--json"))
    assert table[1].count("starting") == 2
    assert table[1].count(": 1.0 of 4.0 GB of weights read, 25 %\n") == 2
    assert {replica["loaded_bytes"] for replica in json.loads(told[1])["replicas"]} == {10**9}


async def test_an_operator_gets_by_on_the_shell(cluster: LiveCluster) -> None:
    assert await fuseline(cluster, "scale", "decode=2", "prefill=2", "--wait") == (
        0,
        "target: prefill=2, decode=2\n",
        "",
    )
    table, told, refused, stopped = await asyncio.gather(
        fuseline(cluster, "status"),
        fuseline(cluster, "status", "--json"),
        fuseline(cluster, "scale", "decode=0"),
        fuseline(cluster, "stop"),
    )
    assert table[0] == 0
    assert table[1].count("ready") == 4
    status = json.loads(told[1])
    assert [(pool["role"], pool["num_replicas"]) for pool in status["target"]] == [("prefill", 2), ("decode", 2)]
    assert refused == (2, "", "fuseline: decode must have 1 to 1024 replicas, got 0\n")
    assert stopped == (0, "stopping\n", "")
