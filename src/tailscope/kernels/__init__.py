"""Kernels of our own, for what the libraries leave slow: today batch normalisation on the CPU."""
