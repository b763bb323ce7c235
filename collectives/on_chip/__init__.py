"""Schedules of the collectives among the CTAs of a thread-block cluster, as data, and the proofs about them.

``schedule`` says what a CTA does; ``forms`` writes the collectives down; ``order`` proves a schedule free of races
whatever the timing; ``machine`` runs one with real values and explores its interleavings; ``costs`` counts rounds and
bytes. The CUDA side of the same schedules is ``kernels/csrc/cuda/cluster.cuh``. Imports nothing but itself.
"""
