"""Quantised linear layers: what a checkpoint or an option says of them, reading them, and keeping what was made.

May import kernels, runtime and what ``workers`` reads checkpoints with. The numbers themselves, and how they lie in
memory, are defined in ``kernels.quantized``.
"""
