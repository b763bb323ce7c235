"""GPU kernels: launchers over the CUDA C++ of ``kernels/csrc/cuda``, and models of its tiles and layouts.

Importing this needs neither a driver nor a compiler.
"""
