"""CPU kernels: launchers over the C++ of ``kernels/csrc/cpu``, which is compiled at first use."""
