"""Evaluate language models: perplexity and zero-shot tasks."""
