"""Use LittleBit inside transformers and PEFT."""
