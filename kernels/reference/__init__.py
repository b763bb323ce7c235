"""The ops in plain torch: the oracle that every other implementation is compared with, and the default on a CPU."""
