"""Adapters: each makes a peer's model of a checkpoint (``prepare``) and generates with it (``load``).

They run in the peer's own environment: nothing here imports Fuseline, but for the adapter of Fuseline.
"""
