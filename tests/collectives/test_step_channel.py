"""Two ends of a real TCP connection: order, authentication, bounds, and what happens when one end goes."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from fuseline.collectives import step_channel
from fuseline.collectives.messages import MessageCodec
from fuseline.collectives.step_channel import StepChannel, StepListener
from fuseline.runtime.errors import InvalidArgumentError, UnavailableError
from fuseline.runtime.plan import StepResult
from fuseline.tests.timing import PATIENTLY_S, PROMPTLY_S

CODEC = MessageCodec([StepResult])


def result(step_id: int, size: int = 0) -> StepResult:
    return StepResult(step_id, np.arange(size, dtype=np.int32))


def send_all(channel: StepChannel, messages: list[StepResult]) -> None:
    for message in messages:
        channel.send(message)


@pytest.fixture
def ends() -> Iterator[tuple[StepChannel, StepChannel]]:
    listener = StepListener("127.0.0.1", CODEC)
    far = StepChannel.connect(listener.address, listener.token, 1, CODEC)
    near = listener.accept({1}, PATIENTLY_S, lambda: None)[1]
    listener.close()
    yield near, far
    near.close()
    far.close()


def test_messages_arrive_whole_and_in_order_both_ways(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    big = result(1, 1_000_000)  # more than the kernel buffers
    sender = threading.Thread(target=send_all, args=(near, [result(0), big, result(2)]))
    sender.start()
    assert far.receive().step_id == 0
    np.testing.assert_array_equal(far.receive().token_ids, big.token_ids)
    assert far.receive().step_id == 2
    sender.join()
    far.send(result(3))
    assert near.receive().step_id == 3


def test_concurrent_senders_do_not_mix_frames(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    threads = [
        threading.Thread(target=send_all, args=(near, [result(i * 100 + j, 500) for j in range(50)]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    seen = [far.receive().step_id for _ in range(200)]
    for thread in threads:
        thread.join()
    assert sorted(seen) == sorted(i * 100 + j for i in range(4) for j in range(50))


def test_end_of_file_is_noticed_at_once(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    failed = []

    def wait() -> None:
        with pytest.raises(UnavailableError):
            near.receive()
        failed.append(True)

    waiter = threading.Thread(target=wait)
    waiter.start()
    far.close()
    waiter.join(PROMPTLY_S)
    assert failed
    with pytest.raises(UnavailableError):
        for _ in range(50):
            near.send(result(0, 10000))


def test_close_wakes_the_own_receiver(ends: tuple[StepChannel, StepChannel]) -> None:
    near, _ = ends
    outcome = []

    def wait() -> None:
        try:
            near.receive()
        except UnavailableError as error:
            outcome.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    near.close()
    near.close()
    waiter.join(PROMPTLY_S)
    assert len(outcome) == 1


def test_half_a_frame_is_a_lost_peer(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    far._sock.sendall(struct.pack("<I", 100) + b"abc")
    far.close()
    with pytest.raises(UnavailableError):
        near.receive()


def test_oversized_frames_close_the_channel(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    far._sock.sendall(struct.pack("<I", 2**32 - 1))
    with pytest.raises(InvalidArgumentError, match="exceeds"):
        near.receive()
    with pytest.raises(UnavailableError):
        far.receive()


def test_garbage_closes_the_channel(ends: tuple[StepChannel, StepChannel]) -> None:
    near, far = ends
    far._sock.sendall(struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1")
    with pytest.raises(InvalidArgumentError, match="malformed"):
        near.receive()
    with pytest.raises(UnavailableError):
        far.receive()


def test_what_exceeds_the_limit_is_not_sent(
    ends: tuple[StepChannel, StepChannel], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = ends
    monkeypatch.setattr(step_channel, "MAX_FRAME_BYTES", 100)
    with pytest.raises(InvalidArgumentError, match="exceeds the limit of 100"):
        near.send(result(0, 100))
    near.send(result(1))
    assert far.receive().step_id == 1


def test_strangers_do_not_get_in() -> None:
    listener = StepListener("127.0.0.1", CODEC)
    host, port = listener.address.split(":")
    channels = {}
    accepting = threading.Thread(target=lambda: channels.update(listener.accept({1, 2}, PATIENTLY_S, lambda: None)))
    accepting.start()
    strangers = [socket.create_connection((host, int(port))) for _ in range(step_channel._MAX_STRANGERS + 3)]
    strangers[-1].sendall(b"x" * 5)  # an unfinished hello
    wrong_token = StepChannel.connect(listener.address, os.urandom(32), 1, CODEC)
    wrong_rank = StepChannel.connect(listener.address, listener.token, 7, CODEC)
    good = StepChannel.connect(listener.address, listener.token, 1, CODEC)
    second = StepChannel.connect(listener.address, listener.token, 2, CODEC)
    accepting.join()
    listener.close()
    assert set(channels) == {1, 2}
    channels[1].send(result(5))
    assert good.receive().step_id == 5
    for stranger in (wrong_token, wrong_rank):
        with pytest.raises(UnavailableError):
            stranger.receive()
    for channel in (wrong_token, wrong_rank, good, second, *channels.values()):
        channel.close()
    for sock in strangers:
        sock.close()


def test_a_rank_that_never_calls_is_named() -> None:
    listener = StepListener("127.0.0.1", CODEC)
    far = StepChannel.connect(listener.address, listener.token, 1, CODEC)
    with pytest.raises(UnavailableError, match=r"ranks \[2\] did not call in"):
        listener.accept({1, 2}, 0.3, lambda: None)
    with pytest.raises(UnavailableError):  # those that did are let go
        far.receive()
    far.close()

    def died() -> None:
        raise UnavailableError("rank 1 exited with code 3")

    with pytest.raises(UnavailableError, match="code 3"):
        listener.accept({1}, 5.0, died)
    listener.close()


def test_nobody_listens() -> None:
    listener = StepListener("127.0.0.1", CODEC)
    listener.close()
    with pytest.raises(UnavailableError, match="cannot reach"):
        StepChannel.connect(listener.address, listener.token, 1, CODEC, timeout_s=1)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UnavailableError, match="cannot listen"):
        StepListener("192.0.2.1", CODEC)
