"""Quantize whole models: choose layers and ranks, and define the layers that replace dense ones."""
