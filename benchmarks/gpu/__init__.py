"""The GPU suite: is every kernel right, and how far is it from memory speed. ``python -m benchmarks.gpu --help``.

Needs torch, numpy and nvcc (or a library built before), no network and none of the runtime's other dependencies.
"""
