"""How every connection between Fuseline's processes is set up: sizes bounded, dead peers noticed."""

from __future__ import annotations

KEEPALIVE_TIME_S = 10
KEEPALIVE_TIMEOUT_S = 5
# A prompt of a million tokens takes 5 MB at most; KV travels in parcels of 1 to 2 MiB.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_COMMON: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),  # a stream may wait long for its first token
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [*_COMMON, ("grpc.max_reconnect_backoff_ms", 2000)]
SERVER_OPTIONS: list[tuple[str, int]] = [
    *_COMMON,
    ("grpc.so_reuseport", 0),  # or a second server would share the port unnoticed
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_S * 500),
]
