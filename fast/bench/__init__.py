"""Benchmarks of layers, caches and decoders."""
