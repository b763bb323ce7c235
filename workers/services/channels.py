"""Connections to other workers, kept for the next call."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

import grpc.aio

from ..grpc_options import CHANNEL_OPTIONS

MAX_CHANNELS = 64
CLOSE_GRACE_S = 30.0  # calls on a channel that is dropped may end by themselves


class ChannelCache:
    """At most ``MAX_CHANNELS`` channels by address; the least recently used one makes room. Lives on the loop."""

    def __init__(self) -> None:
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to an address; connects when it is first used."""
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            if len(self._channels) > MAX_CHANNELS:
                _, oldest = self._channels.popitem(last=False)
                self._close(oldest, CLOSE_GRACE_S)
        self._channels.move_to_end(address)
        return channel

    async def close(self) -> None:
        """Close all of them; calls under way are cancelled."""
        while self._channels:
            _, channel = self._channels.popitem()
            self._close(channel, None)
        if self._closing:
            await asyncio.wait(self._closing)

    def _close(self, channel: grpc.aio.Channel, grace_s: float | None) -> None:
        task = asyncio.ensure_future(channel.close(grace_s))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
