"""Decides: configuration, requests, KV block accounting, the prefix cache, the scheduler and the engine loop.

May import only itself, the standard library and numpy. Never torch, Ray, gRPC, I/O or the wall clock: time comes
in through an injected clock, so that the same objects run in tests and simulators.
"""
