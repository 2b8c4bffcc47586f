"""Read and write models on disk: packed checkpoints, the authors' format, GGUF files, dense models, downloads."""
