"""Quantisation-aware training of whole models."""
