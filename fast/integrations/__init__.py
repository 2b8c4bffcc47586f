"""LittleBit inside transformers and PEFT."""
