"""Runs models: weights, sharded layers, KV tensors, the model runner, the sampler, and the worker processes.

May import ``collectives``, ``runtime``, ``kernels`` and ``proto``. Never Ray.
"""
