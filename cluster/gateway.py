"""The front door of a cluster: one gRPC server with ``Inference``, ``Cluster``, health and reflection.

Knows its workers through a membership and their ``Watch`` streams only, so it serves workers that Ray placed and
workers that were started by hand alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .. import __version__
from ..proto.fuseline.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from ..runtime.config import ModelInfo
from ..runtime.errors import UnavailableError
from ..runtime.role import WorkerRole
from ..workers.grpc_options import SERVER_OPTIONS
from ..workers.tokenizer import Tokenizer
from .admission import Admission
from .dispatcher import Dispatcher
from .inference_service import InferenceService
from .membership import Membership
from .router import Router
from .tasks import watched
from .worker_pool import WorkerPool

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name
LAST_WORDS_S = 0.5  # for answers on their way; streams such as those of health watchers would not end by themselves
SPARE_RPCS = 256  # beside those of admitted requests: ones about to be refused, health watchers, operators


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What a gateway decides by.

    Attributes:
        port: 0 lets the system choose.
        block_size, enable_prefix_caching: of the workers' engines.
        max_queued_tokens: see ``Router``; prompts wait here instead.
        max_num_sequences: most sequences under way or waiting; one more is refused with a hint to retry.
    """

    host: str = "127.0.0.1"
    port: int = 0
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_queued_tokens: int = 8192
    max_num_sequences: int = 4096


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Gateway:
    """Serves users over the workers that ``membership`` names. Lives on one event loop.

    Attributes:
        inference: the service; its ``finished`` counts how sequences ended.
        pool: the workers as the gateway sees them.
    """

    def __init__(
        self,
        config: GatewayConfig,
        model: ModelInfo,
        tokenizer: Tokenizer,
        membership: Membership,
        cluster_service: cluster_pb2_grpc.ClusterServicer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs before ``start``; ``cluster_service`` is served on the same port."""
        self.pool = WorkerPool(membership)
        self._config = config
        self._cluster_service = cluster_service
        self._admission = Admission(
            model,
            tokenizer,
            block_size=config.block_size if config.enable_prefix_caching else None,
            max_num_sequences=config.max_num_sequences,
        )
        dispatcher = Dispatcher(self.pool, Router(config.block_size, config.max_queued_tokens))
        self.inference = InferenceService(model, tokenizer, self._admission, dispatcher, __version__, clock)
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._changed = asyncio.Event()
        self._health_task: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences under way or waiting."""
        return self._admission.num_sequences

    async def start(self) -> int:
        """Listen, follow the workers, and return the port.

        Raises:
            UnavailableError: the address cannot be listened on.
        """
        max_rpcs = self._config.max_num_sequences + SPARE_RPCS
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_rpcs)
        inference_pb2_grpc.add_InferenceServicer_to_server(self.inference, server)
        names = [INFERENCE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if self._cluster_service is not None:
            cluster_pb2_grpc.add_ClusterServicer_to_server(self._cluster_service, server)
            names.append(CLUSTER)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(names, server)
        address = join_address(self._config.host, self._config.port)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise UnavailableError(f"cannot listen on {address}: is it in use?", address=address) from error
        self.pool.subscribe(self._changed.set)
        self.pool.start()
        self._health_task = watched(self._tell_health(), self.pool.note_failure)
        await server.start()
        self._server = server
        return port

    async def wait_ready(self) -> None:
        """Return when a ready worker for each phase is in sight, though decode workers alone could serve."""
        ready = asyncio.Event()
        self.pool.subscribe(lambda: ready.set() if self._has_all_phases() else None)
        if not self._has_all_phases():
            await ready.wait()

    async def failed(self) -> BaseException:
        """Wait until it can no longer serve, by a bug; returns what happened."""
        return await self.pool.failed()

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, let those under way finish for at most ``grace_s``, cancel the rest.

        The server listens until then, so that a request that comes now is told why it is refused, and operators see
        how it goes. A server that stops cancels what reaches it without a word.
        """
        self._admission.close()
        await self._health.enter_graceful_shutdown()
        if self._server is not None:
            await self._admission.drained(grace_s)
            await self._server.stop(min(grace_s, LAST_WORDS_S))
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        await self.pool.close()

    def _has_all_phases(self) -> bool:
        has_ready = self.pool.has_ready
        return has_ready(WorkerRole.MIXED) or (has_ready(WorkerRole.DECODE) and has_ready(WorkerRole.PREFILL))

    async def _tell_health(self) -> None:
        """Keep the health service's answers current."""
        while True:
            self._changed.clear()
            can_decode = self.pool.has_ready(WorkerRole.DECODE, WorkerRole.MIXED)
            states = {
                "": can_decode,  # which can serve: see ``Router``
                INFERENCE: can_decode,
                "prefill": self.pool.has_ready(WorkerRole.PREFILL, WorkerRole.MIXED),
                "decode": can_decode,
            }
            if self._cluster_service is not None:
                states[CLUSTER] = True
            for name, serving in states.items():
                status = (
                    health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
                )
                await self._health.set(name, status)
            await self._changed.wait()
