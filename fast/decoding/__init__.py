"""Generate text: decoders for CPUs and GPUs, tokenizers and key-value caches."""
