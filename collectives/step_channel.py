"""The line between a group's first rank and another one: authenticated, framed messages over TCP.

The first rank listens, the others connect and prove with a random token, as their first bytes, that they were
started by it. Then both ends exchange frames: a length (u32, little-endian) and that many bytes of one message.
Losing the other end is noticed at once (end of file, or keepalive where a whole host is gone) and always the same
``UnavailableError``.
"""

from __future__ import annotations

import hmac
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from ..runtime.errors import InvalidArgumentError, UnavailableError
from .messages import MessageCodec

MAX_FRAME_BYTES = 256 * 1024 * 1024  # a plan that admits the longest sequence there may be fits
TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<{TOKEN_BYTES}sI")
_LENGTH = struct.Struct("<I")
_MAX_STRANGERS = 64  # connections that have not proved themselves yet
_POLL_S = 0.1
_SEND_TIMEOUT_S = 30


class StepChannel:
    """One end of the line. ``send`` may be called from any thread, ``receive`` from one thread at a time."""

    def __init__(self, sock: socket.socket, codec: MessageCodec, peer: str) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        # A kernel-side timeout, since Python's own would apply to receive as well.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_TIMEOUT_S, 0))
        self._sock = sock
        self._codec = codec
        self._peer = peer
        self._send_lock = threading.Lock()

    @classmethod
    def connect(
        cls, address: str, token: bytes, rank: int, codec: MessageCodec, timeout_s: float = 30.0
    ) -> StepChannel:
        """Connect to the group's first rank and introduce this one.

        Raises:
            UnavailableError: nobody listens at ``address`` within ``timeout_s``.
        """
        host, _, port = address.rpartition(":")
        try:
            sock = socket.create_connection((host, int(port)), timeout=timeout_s)
            sock.sendall(_HELLO.pack(token, rank))
        except (OSError, ValueError) as error:
            raise UnavailableError(f"cannot reach the group's first rank at {address}: {error}") from error
        return cls(sock, codec, "the group's first rank")

    @property
    def local_host(self) -> str:
        """The address of this end, by which the other end reaches this host."""
        host: str = self._sock.getsockname()[0]
        return host

    def send(self, message: object) -> None:
        """Send one message.

        Raises:
            InvalidArgumentError: the message is not of this channel, or exceeds ``MAX_FRAME_BYTES``.
            UnavailableError: the other end is gone, or has not read for 30 s; the channel is closed.
        """
        body = self._codec.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise InvalidArgumentError(
                f"a frame of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}", limit=MAX_FRAME_BYTES
            )
        try:
            with self._send_lock:
                self._sock.sendall(_LENGTH.pack(len(body)) + body)
        except OSError as error:
            self.close()
            raise UnavailableError(f"{self._peer} is gone: {error}") from error

    def receive(self) -> Any:
        """Wait for the next message; ``close``, from any thread, ends the wait.

        Raises:
            UnavailableError: the other end is gone, or this end was closed.
            InvalidArgumentError: what came is not a message; the channel is closed.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        try:
            if length > MAX_FRAME_BYTES:
                raise InvalidArgumentError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            return self._codec.decode(self._read(length))
        except InvalidArgumentError:
            self.close()
            raise

    def _read(self, num_bytes: int) -> bytes:
        buffer = bytearray(num_bytes)
        view, done = memoryview(buffer), 0
        while done < num_bytes:
            try:
                got = self._sock.recv_into(view[done:])
            except OSError as error:
                raise UnavailableError(f"{self._peer} is gone: {error}") from error
            if got == 0:
                raise UnavailableError(f"{self._peer} closed the connection")
            done += got
        return bytes(buffer)

    def close(self) -> None:
        """Hang up; idempotent. The other end, and a ``receive`` in progress here, fail at once."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more: what we want
            pass
        finally:
            self._sock.close()


class StepListener:
    """Where the other ranks of one group call in.

    Raises:
        UnavailableError: ``host`` is no address of this machine.
    """

    def __init__(self, host: str, codec: MessageCodec) -> None:
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._codec = codec
        try:
            self._sock = socket.create_server((host, 0), backlog=_MAX_STRANGERS)
        except OSError as error:
            raise UnavailableError(f"cannot listen on {host}: {error}", host=host) from error
        self.address = f"{host}:{self._sock.getsockname()[1]}"

    def accept(self, ranks: set[int], timeout_s: float, check: Callable[[], None]) -> dict[int, StepChannel]:
        """Wait until every rank has called in.

        Strangers (no token, a wrong one, a rank not expected) are hung up on and change nothing.

        Args:
            check: called some ten times a second; raises when a rank died before it could call.

        Raises:
            UnavailableError: some rank did not call within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        channels: dict[int, StepChannel] = {}
        hellos: dict[socket.socket, bytes] = {}
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._sock, selectors.EVENT_READ)
                while set(channels) != ranks:
                    check()
                    if time.monotonic() > deadline:
                        missing = sorted(ranks - set(channels))
                        raise UnavailableError(
                            f"ranks {missing} did not call in within {timeout_s:g} s", ranks=missing
                        )
                    for key, _ in selector.select(_POLL_S):
                        sock = key.fileobj
                        if sock is self._sock:
                            self._take_call(selector, hellos)
                        elif isinstance(sock, socket.socket):
                            self._read_hello(selector, hellos, sock, ranks, channels)
        except BaseException:
            for channel in channels.values():
                channel.close()
            raise
        finally:
            for sock in hellos:
                sock.close()
        return channels

    def _take_call(self, selector: selectors.BaseSelector, hellos: dict[socket.socket, bytes]) -> None:
        sock, _ = self._sock.accept()
        if len(hellos) >= _MAX_STRANGERS:
            oldest = next(iter(hellos))
            selector.unregister(oldest)
            del hellos[oldest]
            oldest.close()
        sock.setblocking(False)
        hellos[sock] = b""
        selector.register(sock, selectors.EVENT_READ)

    def _read_hello(
        self,
        selector: selectors.BaseSelector,
        hellos: dict[socket.socket, bytes],
        sock: socket.socket,
        ranks: set[int],
        channels: dict[int, StepChannel],
    ) -> None:
        if sock not in hellos:  # it was dropped to make room earlier in this round
            return
        try:
            got = sock.recv(_HELLO.size - len(hellos[sock]))
        except OSError:
            got = b""
        hellos[sock] += got
        if got and len(hellos[sock]) < _HELLO.size:
            return
        selector.unregister(sock)
        hello = hellos.pop(sock)
        if len(hello) == _HELLO.size:
            token, rank = _HELLO.unpack(hello)
            if hmac.compare_digest(token, self.token) and rank in ranks and rank not in channels:
                channels[rank] = StepChannel(sock, self._codec, f"rank {rank}")
                return
        sock.close()

    def close(self) -> None:
        """Stop listening; idempotent."""
        self._sock.close()
