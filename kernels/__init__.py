"""Computes: one op, one signature, with a torch reference for each op and faster implementations behind it.

May import only itself, numpy and torch. Never a model's name, never a request.
"""
