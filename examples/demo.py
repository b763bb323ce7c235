"""What `make demo` shows: a cluster on this machine, three requests streaming at a time, the decode pool growing.

Does what a user would: starts `fuseline serve demo --prefill 1 --decode 1`, talks gRPC to it through `AsyncClient`,
sets the decode pool to 2 while requests run, and stops the cluster with Ctrl-C. Exits with 0 only if all of it
worked, the new worker served requests, and no process was left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fuseline import AsyncClient, SamplingParams
from fuseline.cluster.generation import GenerateSummary
from fuseline.runtime.errors import FuselineError, UnavailableError

PROMPTS = (
    'def read_json(path):\n    """Read a JSON file and return its content."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n",
    "import os\n\ndef find_files(root, suffix):\n    for name in os.listdir(root):\n",
    "def parse_args(argv=None):\n    parser = argparse.ArgumentParser()\n",
    "class Server(threading.Thread):\n    def __init__(self, host, port):\n",
    "def test_roundtrip(self):\n    data = b'abc'\n",
    "try:\n    import json\nexcept ImportError:\n",
    "class Node:\n    def __init__(self, value, children=()):\n        self.value = value\n",
    "def is_prime(n):\n    if n < 2:\n        return False\n",
    "with open(filename, encoding='utf-8') as file:\n    for line in file:\n",
    "def main():\n    logging.basicConfig(level=logging.INFO)\n",
    "class Queue:\n    def put(self, item, block=True, timeout=None):\n",
    "def flatten(items):\n    result = []\n    for item in items:\n        if isinstance(item, list):\n",
    "@property\ndef name(self):\n    return self._name\n\n@name.setter\n",
    "def quote(string, safe='/'):\n    if not string:\n",
    "class ParseError(ValueError):\n    def __init__(self, message, lineno):\n",
    "def copy_tree(source, target):\n    os.makedirs(target, exist_ok=True)\n",
    "async def fetch(reader, writer):\n    while True:\n        line = await reader.readline()\n",
    "def __eq__(self, other):\n    if not isinstance(other, type(self)):\n",
    "while self._running:\n    try:\n        event = self._queue.get(timeout=1)\n",
    "def median(data):\n    data = sorted(data)\n    n = len(data)\n",
    "lock = threading.Lock()\n\ndef worker(queue):\n    while True:\n",
    "def wrap(text, width=70):\n    lines = []\n    for word in text.split():\n",
)
COMMAND = ("serve", "demo", "--prefill", "1", "--decode", "1", "--grpc-port", "0", "--max-num-seqs", "8")
NUM_LANES = 3
PANEL_LINES = 14
MAX_TOKENS = 96
NUM_FOR_NEWCOMER = 4  # requests that the new worker has to serve before the demo ends
START_LIMIT_S = 300.0
RUN_LIMIT_S = 300.0
STOP_LIMIT_S = 90.0
MARK = "FUSELINE_DEMO"  # in the environment of every process that the demo starts, at whatever remove

console = Console()
if not console.is_terminal:
    console = Console(width=160)


@dataclass
class Served:
    """A finished request."""

    number: int
    prompt: str
    text: str
    summary: GenerateSummary


@dataclass
class Lane:
    """One of the panels: it streams one request after the other."""

    title: str = ""
    prompt: str = ""
    text: str = ""

    def panel(self) -> Panel:
        body = Text(self.prompt, style="dim")
        body.append(self.text, style="green")
        lines = body.split("\n", allow_blank=True)[-PANEL_LINES:]
        return Panel(Text("\n").join(lines), title=self.title, title_align="left", height=PANEL_LINES + 2)


@dataclass
class Screen:
    """What has happened so far; shown live on a terminal, else told line by line."""

    lanes: list[Lane] = field(default_factory=lambda: [Lane() for _ in range(NUM_LANES)])
    served: list[Served] = field(default_factory=list)
    headline: str = ""
    first_wave: asyncio.Event = field(default_factory=asyncio.Event)  # as many requests are done as there are lanes

    @property
    def num_for_newcomer(self) -> int:
        """Requests served by a decode worker other than the first one."""
        return sum(done.summary.decode_worker != self.served[0].summary.decode_worker for done in self.served)

    def tell(self, text: str) -> None:
        self.headline = text
        if not console.is_terminal:
            console.print(text, highlight=False)

    def finish(self, done: Served) -> None:
        self.served.append(done)
        if len(self.served) == NUM_LANES:
            self.first_wave.set()
        if not console.is_terminal:
            console.print(f"  {' | '.join(_row(done))}", highlight=False, markup=False)
            if len(self.served) <= NUM_LANES:
                console.print(
                    indent(done.prompt + done.text, "    > ", lambda _: True), highlight=False, markup=False
                )

    def __rich__(self) -> RenderableType:
        panels = Table.grid(expand=True)
        for _ in self.lanes:
            panels.add_column(ratio=1)
        panels.add_row(*(lane.panel() for lane in self.lanes))
        done = f"{len(self.served)} requests done, {self.num_for_newcomer} of them by the new decode worker"
        return Group(Text(self.headline, style="bold"), panels, Text(done, style="dim"))


@asynccontextmanager
async def serving(mark: str) -> AsyncIterator[str]:
    """`fuseline serve` in a process of its own, as from a shell; gives its address, and stops it like Ctrl-C does."""
    console.print(f"$ fuseline {' '.join(COMMAND)}", style="bold", highlight=False)
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("fuseline"),
        *COMMAND,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {MARK: mark},
        start_new_session=True,
    )
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    reading = asyncio.create_task(_read(process, address))
    try:
        async with asyncio.timeout(START_LIMIT_S):
            told = await address
        yield told
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
        await reading


async def _read(process: asyncio.subprocess.Process, address: asyncio.Future[str]) -> None:
    """Pass on what the server prints, and find in it where it listens."""
    if process.stdout is None:
        return
    async for line in process.stdout:
        text = line.decode(errors="replace").rstrip()
        console.print(f"  {text}", style="dim", highlight=False, markup=False)
        if text.startswith("ready") and not address.done():
            address.set_result(next(word for word in text.split() if ":" in word and word[-1].isdigit()))
    if not address.done():
        address.set_exception(UnavailableError("the server ended before it was ready"))


async def run_lane(lane: Lane, index: int, client: AsyncClient, screen: Screen, enough: asyncio.Event) -> None:
    """Stream one request after the other until the new worker has served some."""
    number = index
    while not enough.is_set():
        lane.prompt, lane.text = PROMPTS[number % len(PROMPTS)], ""
        lane.title = f"request {number}"
        params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.7, top_p=0.9, seed=number)
        async with client.generate(lane.prompt, params, timeout=RUN_LIMIT_S) as stream:
            async for chunk in stream:
                lane.text += chunk.text
                if chunk.summary is not None:
                    screen.finish(Served(number, lane.prompt, lane.text, chunk.summary))
        if screen.num_for_newcomer >= NUM_FOR_NEWCOMER:
            enough.set()
        number += NUM_LANES


async def scale_up(client: AsyncClient, screen: Screen) -> None:
    """Ask for a second decode worker once the first requests are through, and tell when it is there."""
    await screen.first_wave.wait()
    screen.tell("$ fuseline scale decode=2   (requests go on)")
    started_at = time.monotonic()
    await client.scale(decode=2, wait=True, timeout=START_LIMIT_S)
    screen.tell(
        f"the second decode worker is ready after {time.monotonic() - started_at:.1f} s; it gets requests now"
    )


async def stream_requests(address: str, screen: Screen) -> None:
    """The lanes, and the scaling that happens beside them."""
    enough = asyncio.Event()
    async with AsyncClient(address) as client, asyncio.timeout(RUN_LIMIT_S), asyncio.TaskGroup() as group:
        screen.tell(f"{NUM_LANES} requests at a time over one prefill and one decode worker")
        group.create_task(scale_up(client, screen))
        for index, lane in enumerate(screen.lanes):
            group.create_task(run_lane(lane, index, client, screen, enough))


def print_table(served: list[Served]) -> None:
    """Who served what, and how fast."""
    table = Table(
        title="Requests, in order of completion",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        width=min(console.width, 110),
    )
    for column in ("#", "prompt", "prefill", "decode", "tokens", "TTFT", "TPOT"):
        is_text = column in ("prompt", "prefill", "decode")
        table.add_column(
            column,
            justify="left" if is_text else "right",
            no_wrap=True,
            min_width={"#": 3, "prompt": 8, "prefill": 14, "decode": 14, "tokens": 6}.get(column, 8),
            ratio=1 if column == "prompt" else None,
        )
    for done in served:
        table.add_row(*_row(done))
    console.print(table)


def _row(done: Served) -> tuple[str, ...]:
    summary = done.summary
    return (
        str(done.number),
        done.prompt.splitlines()[0],
        summary.prefill_worker or "by decode",
        summary.decode_worker,
        str(summary.num_output_tokens),
        f"{summary.ttft_s * 1e3:.0f} ms",
        f"{summary.tpot_s * 1e3:.1f} ms",
    )


def _first(error: Exception) -> Exception:
    """What went wrong first, of all that went wrong side by side."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def leftovers(mark: str) -> list[int]:
    """Processes that the demo started and that still live; none where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # another user's, or gone
        if f"{MARK}={mark}".encode() in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


async def demonstrate(mark: str) -> None:
    """The whole of it.

    Raises:
        FuselineError, TimeoutError: something did not work.
    """
    screen = Screen()
    async with serving(mark) as address:
        if console.is_terminal:
            with Live(screen, console=console, refresh_per_second=12):
                await stream_requests(address, screen)
        else:
            await stream_requests(address, screen)
        print_table(screen.served)


def main() -> int:
    mark = uuid.uuid4().hex
    try:
        asyncio.run(demonstrate(mark))
    except KeyboardInterrupt:
        return 130
    except (FuselineError, TimeoutError, ExceptionGroup) as error:
        console.print(f"the demo failed: {_first(error)!r}", style="red", highlight=False, markup=False)
        return 1
    left = leftovers(mark)
    if left:
        console.print(f"processes left behind: {left}", style="red")
        return 1
    console.print("all processes have ended; nothing is left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
