"""Models on disk: the packed format, the authors' format, GGUF, dense models, downloads."""
