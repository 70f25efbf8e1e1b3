"""Kernels for preference optimisation with many candidates per prompt."""
