"""Text from models: decoders for CPUs and GPUs, tokenizers and caches."""
