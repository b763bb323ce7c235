"""The progress bars: of loading, and of a generation, which moves with every token and tells how fast they come.

What draws them is imported only where there is someone to see it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def loading_bar(model: str) -> Iterator[Callable[[int, int], None] | None]:
    """On a terminal, a bar to be told of bytes done and bytes in all; None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class GenerationBar:
    """Full when every sequence has had all the tokens that it may have, or has ended before.

    Args:
        budgets: the most tokens of each sequence.
        show: None does so on a terminal; when nothing is shown, nothing is done.
    """

    def __init__(
        self, budgets: Sequence[int], show: bool | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_sequences = len(budgets)
        self._num_ended = 0
        self._num_tokens = 0
        self._clock = clock
        self._started_at = clock()
        self._progress: Progress | None = None
        if show or (show is None and sys.stderr.isatty()):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.fields[told]}")
            columns = (TextColumn("generating"), BarColumn(), TaskProgressColumn(), text, TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task("", total=sum(budgets), told=self._told())

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, num_tokens: int, num_ended: int, num_unused: int) -> None:
        """So many tokens have come, and so many sequences ended, which together leave ``num_unused`` of theirs."""
        self._num_tokens += num_tokens
        self._num_ended += num_ended
        if self._progress is not None:
            self._progress.update(self._task, advance=num_tokens + num_unused, told=self._told())

    def _told(self) -> str:
        elapsed_s = self._clock() - self._started_at
        rate = self._num_tokens / elapsed_s if elapsed_s > 0 else 0.0
        return f"{self._num_ended}/{self._num_sequences} sequences, {self._num_tokens} tokens, {rate:.1f} tokens/s"
