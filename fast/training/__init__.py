"""Train quantized models: quantization-aware training (QAT)."""
