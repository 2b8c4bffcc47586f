"""Train a LoRA adapter on top of packed 1.5-bit layers with PEFT; the packed signs stay as they are.

python book/examples/lora.py
"""

from pathlib import Path

import littlebit.fast as lb
import torch
from peft import LoraConfig, get_peft_model

STEPS, LENGTH, BATCH = 30, 128, 4

torch.manual_seed(0)
model, tokenizer = lb.load_model("tiny"), lb.load_tokenizer("tiny")
lb.quantize_(model, lb.Config(bits=1.5, init="admm", paths=1), progress=False)
lb.pack_(model)  # as `lb.load` gives a saved model
model = get_peft_model(
    model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
print(f"{sum(parameter.numel() for parameter in trained):,} parameters of the adapter are trained")

text = (Path(lb.__file__).with_name("data") / "roosevelt_1901.txt").read_text(encoding="utf-8")
tokens = torch.tensor(tokenizer(text).input_ids)
optimizer = torch.optim.AdamW(trained, lr=1e-2)
for step in range(STEPS):
    starts = torch.randint(len(tokens) - LENGTH, (BATCH,)).tolist()
    batch = torch.stack([tokens[start : start + LENGTH] for start in starts])  # (batch, length)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == STEPS - 1:
        print(f"step {step:3}: loss {loss.item():.2f} nats a byte")
