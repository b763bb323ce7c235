"""Tasks that nobody awaits, whose failure must not go unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


def watched(job: Coroutine[object, object, None], on_failure: Callable[[BaseException], None]) -> asyncio.Task[None]:
    """Run ``job`` in the running loop; ``on_failure`` is told what it raised, a cancellation apart."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    task = asyncio.create_task(job)
    task.add_done_callback(ended)
    return task
