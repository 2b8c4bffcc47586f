"""Whole models: quantise them, and the layers that take a linear layer's place."""
