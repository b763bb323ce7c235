"""Fixtures that the tests of workers share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from fuseline.runtime.role import WorkerRole
from fuseline.tests.workers.worker_cases import Worker, worker


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prefill() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.PREFILL, max_num_batched_tokens=64) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Worker]:
    async with worker(WorkerRole.DECODE, handoff_timeout_s=20) as started:
        yield started
