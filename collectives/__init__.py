"""Moves bytes: process groups behind one communicator protocol, the step channel, and KV transfer transports.

May import ``runtime``, ``kernels`` and ``proto``. Never takes a scheduling decision.
"""
