"""Backends to begin from: NumPy, torch on CPUs and GPUs through `littlebit.fast`, Triton, and JAX."""
