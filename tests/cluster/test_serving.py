"""`fuseline serve` as a user starts and stops it: in a process of its own, with Ray."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fuseline.cluster import serving
from fuseline.runtime.errors import InternalError
from fuseline.tests.cluster.memory_cluster import Cluster, reached, running
from fuseline.tests.cluster.scripted_worker import until
from fuseline.tests.timing import PATIENTLY_S, PROMPTLY_S
from fuseline.workers.loader import model_info

pytestmark = pytest.mark.ray
MARK = "FUSELINE_TEST"
REPOSITORY = Path(__file__).parents[2]
SERVE = (Path(sys.executable).with_name("fuseline"), "serve", "demo", "--grpc-port", "0")


def marked(mark: str) -> dict[int, str]:
    """Command lines of the living processes that have inherited the mark, by process id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


@asynccontextmanager
async def command(*arguments: str | Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A command whose processes are all found by their mark, and are gone in the end."""
    mark = uuid.uuid4().hex
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {MARK: mark},
        start_new_session=True,
    )
    try:
        yield process, mark
        await until(lambda: not marked(mark), PATIENTLY_S)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def lines_until(process: asyncio.subprocess.Process, wanted: str) -> str:
    """What the process prints, up to a line that begins with ``wanted``."""
    assert process.stdout is not None
    told = ""
    async for line in process.stdout:
        told += line.decode()
        if line.decode().startswith(wanted):
            return told
    raise AssertionError(f"it ended without {wanted!r}: {told}")


@pytest.fixture(autouse=True)
def temporary_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the commands put temporary files; nothing of Ray is left in the end. (Its sockets want a short path.)"""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert [entry.name for entry in Path(folder).iterdir() if "ray" in entry.name] == []


async def test_a_signal_to_all_processes_at_once_ends_it_soon() -> None:
    async with command(*SERVE) as (process, _):
        await lines_until(process, "loading")
        os.killpg(process.pid, signal.SIGTERM)
        async with asyncio.timeout(35):  # some 6 s, and would be 40 if it waited for a controller that is gone
            out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        assert out.decode().endswith("stopped\n")


async def test_it_ends_when_its_ray_is_lost() -> None:
    async with command(*SERVE) as (process, mark):
        await lines_until(process, "loading")
        os.kill(next(pid for pid, line in marked(mark).items() if "/gcs_server" in line), signal.SIGKILL)
        out, _ = await process.communicate()
        assert process.returncode == 1
        assert "fuseline: Ray has ended: one of its servers is gone\n" in out.decode()


def test_it_tells_how_the_model_is_held(demo_path: Path) -> None:
    plain, rounded = model_info(demo_path), model_info(demo_path, quantization="int8")
    assert serving._numbers(plain) == "weights bfloat16; KV cache bfloat16; at most 2048 tokens a sequence"
    assert serving._numbers(rounded).startswith("weights bfloat16, linear layers int8; KV cache bfloat16;")


class Broken:
    """A Ray that lives, and a gateway that fails."""

    async def lost(self) -> None:
        await asyncio.Event().wait()

    async def failed(self) -> BaseException:
        return KeyError("a bug")


async def test_it_ends_when_its_gateway_fails_unless_it_was_told_to() -> None:
    broken: Any = Broken()
    stopping = serving._Stopping()
    with pytest.raises(InternalError, match="the gateway has failed: KeyError"):
        await serving._ended(broken, broken, stopping)
    stopping.ask()
    await serving._ended(broken, broken, stopping)


async def test_a_lost_replica_is_told_of_while_it_serves() -> None:
    cluster, said = Cluster(), asyncio.Queue[str]()
    async with running(cluster) as controller:
        _, decode = await reached(controller)
        telling = asyncio.create_task(serving._tell_losses(controller, said.put_nowait))
        cluster.on_start = lambda worker: None
        cluster.kill(decode)
        async with asyncio.timeout(PROMPTLY_S):
            line = await said.get()
        telling.cancel()
    assert re.fullmatch(rf"decode-0-\w+: replaces one that failed: process of {decode} died", line)


async def test_ctrl_c_while_ray_starts_is_answered_at_once(temporary_files: Path) -> None:
    async with command(*SERVE) as (process, mark):
        await lines_until(process, "starting Ray")
        await until(lambda: any("/gcs_server" in line for line in marked(mark).values()), PATIENTLY_S)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PROMPTLY_S):
            await lines_until(process, "interrupted")
        await process.communicate()


async def test_a_second_ctrl_c_ends_it_at_once_and_leaves_nothing() -> None:
    async with command(*SERVE) as (process, mark):
        await lines_until(process, "loading")
        assert any("raylet" in line for line in marked(mark).values())
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PROMPTLY_S):
            assert await process.wait() == 130


async def test_the_demo_shows_what_it_promises() -> None:
    async with command(sys.executable, REPOSITORY / "examples" / "demo.py") as (process, _):
        out, _ = await process.communicate()
        told = out.decode()
        assert process.returncode == 0, told
    assert "$ fuseline scale decode=2" in told
    table = told.partition("Requests, in order of completion")[2]
    assert len(set(re.findall(r"decode-\S+", table))) == 2
    assert "nothing is left behind" in told
