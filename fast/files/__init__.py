"""Whole files: atomic writes, digests and the cache folder."""
