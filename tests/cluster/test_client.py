"""The synchronous client against a real gateway; the asyncio one is what the gateway's own tests use."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from fuseline import AsyncClient, Client, SamplingParams
from fuseline.cluster.cluster_service import ClusterService
from fuseline.proto.fuseline.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from fuseline.runtime.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from fuseline.runtime.request import FinishReason
from fuseline.runtime.role import WorkerRole
from fuseline.tests.cluster.live_cluster import LiveCluster, live_cluster
from fuseline.tests.cluster.memory_cluster import Cluster, reached, running
from fuseline.tests.cluster.scripted_worker import until
from fuseline.tests.timing import PATIENTLY_S, PROMPTLY_S

PROMPT = "def read(path):\n"
GREEDY = SamplingParams(temperature=0, max_tokens=12)
FOREVER = SamplingParams(max_tokens=1900, ignore_eos=True)


@asynccontextmanager
async def operated(stopped: asyncio.Event) -> AsyncIterator[LiveCluster]:
    """A gateway with a Cluster service; the replicas that it tells of live in memory, the one that serves is real."""
    async with running(Cluster()) as controller:
        await reached(controller)
        async with live_cluster(prefill=0, cluster_service=ClusterService(controller, stop=stopped.set)) as live:
            yield live


@pytest.fixture
async def cluster() -> AsyncIterator[LiveCluster]:
    async with operated(asyncio.Event()) as live:
        yield live


def test_importing_the_clients_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import fuseline; fuseline.Client, fuseline.AsyncClient;"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'tokenizers'};"
        "print(*heavy & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


async def test_it_streams_completes_and_describes(cluster: LiveCluster) -> None:
    def use() -> None:
        with Client(cluster.address) as client:
            with client.generate(PROMPT, GREEDY) as stream:
                chunks = list(stream)
            whole = client.complete(PROMPT, GREEDY)
            assert "".join(chunk.text for chunk in chunks) == whole.text
            assert chunks[-1].finish_reason is whole.completions[0].finish_reason is FinishReason.LENGTH
            info = client.model_info()
            assert info.name == "demo"
            ids = client.complete([1, 2, 3], GREEDY, request_id="mine")
            assert (ids.request_id, ids.completions[0].summary.num_prompt_tokens) == ("mine", 3)

    await asyncio.to_thread(use)


async def test_leaving_a_stream_cancels_the_request(cluster: LiveCluster) -> None:
    def use() -> None:
        with Client(cluster.address) as client:
            for chunk in (stream := client.generate(PROMPT, FOREVER)):
                assert chunk.finish_reason is None
                break
            stream.close()
            with client.generate(PROMPT, FOREVER) as other:
                next(other)
            closing = client.generate(PROMPT, FOREVER)
            next(closing)
        # Closing the client ends what is still open.

    await asyncio.to_thread(use)
    await until(lambda: cluster.gateway.num_sequences == 0)
    await cluster.empties()
    assert cluster.gateway.inference.finished == Counter({FinishReason.ABORT: 3})


async def test_errors_are_the_classes_of_fuseline(cluster: LiveCluster) -> None:
    def use() -> None:
        with Client(cluster.address) as client:
            with pytest.raises(InvalidArgumentError, match="no tokens") as info:
                client.complete("")
            assert info.value.details["field"] == "prompt"
            with pytest.raises(NotFoundError):
                client.complete(PROMPT, model="another")
            with pytest.raises(DeadlineExceededError, match=r"timeout|deadline"):
                client.complete(PROMPT, FOREVER, timeout=0.2)
            for bad in (-1, 2**31, 2**70):
                with pytest.raises(
                    InvalidArgumentError, match=rf"prompt\[1\] is {bad}, but token ids go from 0"
                ) as info:
                    client.generate([1, bad])
                assert info.value.details == {"field": "prompt", "value": str(bad), "limit": str(2**31 - 1)}
            with pytest.raises(InvalidArgumentError, match="prompt has token id 4096, the vocabulary has 4096"):
                client.complete([4096])
            with pytest.raises(InvalidArgumentError, match="sampling_params must be SamplingParams, got dict"):
                client.generate(PROMPT, {"n": 2})  # type: ignore[arg-type]
            with pytest.raises(InvalidArgumentError, match="prompt"):
                client.generate("\udc80")
            with pytest.raises(ResourceExhaustedError):
                client.generate("x" * 2**24).__next__()

    await asyncio.to_thread(use)


async def test_an_operator_sees_and_scales_and_stops() -> None:
    stopped = asyncio.Event()
    async with operated(stopped) as cluster:

        def use() -> None:
            with Client(cluster.address) as client:
                status = client.status()
                assert [(pool.role, pool.num_replicas) for pool in status.target] == [
                    (WorkerRole.PREFILL, 1),
                    (WorkerRole.DECODE, 1),
                ]
                assert {replica.state for replica in status.replicas} == {"ready"}
                scaled = client.scale(decode=2, wait=True, timeout=PATIENTLY_S)
                assert sum(replica.role is WorkerRole.DECODE for replica in scaled.replicas) == 2
                assert client.scale({"prefill": 2}).target[0].num_replicas == 2
                with pytest.raises(InvalidArgumentError, match="no pool 'encode'"):
                    client.scale(encode=2)
                with pytest.raises(InvalidArgumentError, match="decode"):
                    client.scale(decode=-1)
                with pytest.raises(InvalidArgumentError):
                    client.scale(decode=0)
                client.stop()

        await asyncio.to_thread(use)
        async with AsyncClient(cluster.address) as client:
            assert (await client.status()).model == "demo"
            assert (await client.scale(decode=1)).target[1].num_replicas == 1
        await asyncio.wait_for(stopped.wait(), PROMPTLY_S)


def test_nobody_there_is_said_in_few_words() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"no answer from 127\.0\.0\.1:1: Connection refused"):
            client.complete(PROMPT)
        with pytest.raises(UnavailableError, match="no answer"):
            client.status()


class Cancelling(inference_pb2_grpc.InferenceServicer, cluster_pb2_grpc.ClusterServicer):
    """Answers as a server does that stops: cancelled, after ``num_tokens``. With ``waits``, it never answers."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.waits = False

    async def Generate(self, request: object, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        for token in range(self.num_tokens):
            yield inference_pb2.GenerateResponse(token_ids=[token])
        await self._end(context)

    async def GetModelInfo(self, request: object, context: Any) -> inference_pb2.GetModelInfoResponse:
        await self._end(context)
        raise AssertionError

    async def GetStatus(self, request: object, context: Any) -> cluster_pb2.ClusterStatus:
        await self._end(context)
        raise AssertionError

    async def _end(self, context: Any) -> None:
        if self.waits:
            await asyncio.Event().wait()
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@pytest.fixture
async def cancelling() -> AsyncIterator[tuple[Cancelling, str]]:
    servicer, server = Cancelling(), grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    cluster_pb2_grpc.add_ClusterServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, f"127.0.0.1:{port}"
    await server.stop(None)


async def test_what_a_server_cancels_is_unavailable(cancelling: tuple[Cancelling, str]) -> None:
    servicer, address = cancelling

    def use() -> None:
        with Client(address) as client:
            for call in (client.model_info, client.status, lambda: client.complete(PROMPT)):
                with pytest.raises(UnavailableError, match=f"no answer from {address}: CANCELLED"):
                    call()
            servicer.num_tokens = 3
            with pytest.raises(UnavailableError, match=f"the connection to {address} was lost after 3 tokens"):
                client.complete(PROMPT)

    await asyncio.to_thread(use)
    async with AsyncClient(address) as client:
        with pytest.raises(UnavailableError, match=f"the connection to {address} was lost after 3 tokens"):
            await client.complete(PROMPT)
        servicer.num_tokens = 0
        for call in (client.model_info, client.status, lambda: client.complete(PROMPT)):
            with pytest.raises(UnavailableError, match="no answer"):
                await call()


async def test_what_the_client_cancels_is_cancelled(cancelling: tuple[Cancelling, str]) -> None:
    servicer, address = cancelling
    servicer.num_tokens, servicer.waits = 1, True

    def use() -> None:
        client = Client(address)
        left, open_ = client.generate(PROMPT), client.generate(PROMPT)
        next(left), next(open_)
        left.close()
        client.close()
        for stream in (left, open_):
            with pytest.raises(CancelledError):
                next(stream)
        for call in (client.status, lambda: client.complete(PROMPT)):
            with pytest.raises(UnavailableError, match="the client is closed"):
                call()

    await asyncio.to_thread(use)
    client = AsyncClient(address)
    left, open_ = client.generate(PROMPT), client.generate(PROMPT)
    await anext(left), await anext(open_)
    told = asyncio.create_task(client.model_info())
    waiting = [asyncio.create_task(anext(stream)) for stream in (left, open_)]
    interrupted = asyncio.create_task(client.complete(PROMPT))
    await asyncio.sleep(0)
    interrupted.cancel()
    await left.aclose()
    with pytest.raises(CancelledError):
        await waiting[0]
    await client.close()
    for job in (waiting[1], told):
        with pytest.raises(CancelledError):
            await job
    with pytest.raises(asyncio.CancelledError):
        await interrupted
    for stream in (left, open_):
        with pytest.raises(CancelledError):
            await anext(stream)
    with pytest.raises(UnavailableError, match="the client is closed"):
        await client.status()
    with pytest.raises(UnavailableError, match="the client is closed"):
        client.generate(PROMPT)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:99999", "host:0", "a b:1", "host:port", "http://host:1"]
)
def test_an_address_is_checked_at_once(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match="host:port"):
        Client(address)
