"""The notebooks, their solutions, and the whole method in one file (`littlebit_from_zero`)."""
