"""How every connection between Fuseline's processes is set up: sizes bounded, dead peers noticed."""

from __future__ import annotations

Options = list[tuple[str, int]]

KEEPALIVE_TIME_S = 10.0
KEEPALIVE_TIMEOUT_S = 5.0
# A prompt of a million tokens takes 5 MB at most; KV travels in parcels of 1 to 2 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024


def channel_options(keepalive_time_s: float = KEEPALIVE_TIME_S) -> Options:
    """Of a client: it pings while a call is open, however long nothing is said on it."""
    return [*_common(keepalive_time_s), ("grpc.max_reconnect_backoff_ms", 2000)]


def server_options(keepalive_time_s: float = KEEPALIVE_TIME_S) -> Options:
    """Of a server: it pings as clients do, and does not take their pings for abuse, which it would by default."""
    return [
        *_common(keepalive_time_s),
        ("grpc.http2.min_ping_interval_without_data_ms", int(keepalive_time_s * 500)),
        ("grpc.so_reuseport", 0),  # or a second server would share the port unnoticed
    ]


def _common(keepalive_time_s: float) -> Options:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # no limit: a stream may wait long for its first token
    ]


CHANNEL_OPTIONS = channel_options()
SERVER_OPTIONS = server_options()
