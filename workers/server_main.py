"""The command line of a single worker: loads, says where it listens, serves until told to stop.

When it is ready it prints one line of JSON to standard output. SIGTERM and SIGINT drain it, for a bounded time, and
it exits with 0. It exits with 1 when its engine fails, and does not outlive its parent process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence

from ..runtime.config import SchedulerConfig
from ..runtime.errors import FuselineError
from ..runtime.role import WorkerRole
from ..runtime.sharding import ParallelConfig
from .group import GroupConfig, ModelGroup
from .server import WorkerServer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m fuseline.workers.server``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    args = _parser().parse_args(argv)
    try:
        return asyncio.run(_run(args))
    except FuselineError as error:
        logger.error("%s", error)  # noqa: TRY400  # what is wrong is said; a trace would bury it
        return 1


def _parser() -> argparse.ArgumentParser:
    group, scheduler = GroupConfig("demo"), SchedulerConfig()
    parser = argparse.ArgumentParser(
        prog="python -m fuseline.workers.server", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo, a directory, or a Hugging Face repository")
    add("--role", type=WorkerRole, choices=list(WorkerRole), default=WorkerRole.MIXED, help="told to routers")
    add("--worker-id", default="", help="unique in the cluster; drawn when empty")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=0, help="0 lets the system choose")
    add("--device", default=group.device, help="auto, cpu or cuda")
    add("--dtype", default=group.dtype, help="auto takes the checkpoint's")
    add("--quantization", default=group.quantization, help="auto takes the checkpoint's")
    add("--kv-cache-dtype", default=group.kv_cache_dtype, help="int8, or auto for that of the weights")
    add("--tensor-parallel-size", type=int, default=1, help="ranks that share each layer")
    add("--pipeline-parallel-size", type=int, default=1, help="ranks that share the layers")
    add("--max-model-len", type=int, default=None, help="most tokens of a sequence; the model's own by default")
    add("--block-size", type=int, default=group.block_size, help="tokens per KV block")
    add("--num-kv-blocks", type=int, default=None, help="by default what the memory has room for")
    add("--max-num-seqs", type=int, default=scheduler.max_num_seqs, help="sequences that run at once")
    add("--max-num-batched-tokens", type=int, default=scheduler.max_num_batched_tokens, help="tokens of a step")
    add("--num-threads", type=int, default=None, help="of each rank on a CPU")
    add("--drain-timeout-s", type=float, default=60.0, help="most seconds that requests get to finish")
    return parser


def _group_config(args: argparse.Namespace) -> GroupConfig:
    return GroupConfig(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=args.max_model_len,
        parallel=ParallelConfig(args.tensor_parallel_size, args.pipeline_parallel_size),
        scheduler=SchedulerConfig(args.max_num_seqs, args.max_num_batched_tokens),
        block_size=args.block_size,
        num_kv_blocks=args.num_kv_blocks,
        num_threads=args.num_threads,
        transfers_kv=True,
    )


async def _run(args: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, told_to_stop.set)
    _end_with_parent(loop)
    stopping = asyncio.ensure_future(told_to_stop.wait())
    loading = asyncio.ensure_future(asyncio.to_thread(ModelGroup.start, _group_config(args)))
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        os._exit(0)  # nothing is served yet, and the ranks, if any, follow
    group = await loading
    try:
        worker_id = args.worker_id or f"{args.role}-{secrets.token_hex(4)}"
        server = WorkerServer(worker_id, args.role, group, args.host, args.port)
    except FuselineError:
        await asyncio.to_thread(group.close)
        raise
    await server.start()
    ready = {"worker_id": server.worker_id, "role": server.role, "address": server.address, "pids": server.pids}
    print(json.dumps(ready), flush=True)
    failing = asyncio.ensure_future(server.failed())
    await asyncio.wait({failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await server.stop(0.0 if failing.done() else args.drain_timeout_s)
    return 1 if failing.done() else 0


def _end_with_parent(loop: asyncio.AbstractEventLoop) -> None:
    """Exit at once when the parent process ends, however it does; its ranks end with it."""
    parent = os.getppid()
    if parent == 0:  # there is none, as for the first process of a container
        return
    if not hasattr(os, "pidfd_open"):
        logger.warning("this system cannot watch a parent process: end this one yourself")
        return
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)
    loop.add_reader(descriptor, os._exit, 1)
