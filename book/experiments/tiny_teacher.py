"""Train the tiny byte-level language model that littlebit ships for its notebooks, tests and quick trials.

A Llama of 0.9 million parameters that reads and writes bytes, trained from scratch on public-domain books (about two
minutes on a GPU):

    python book/experiments/tiny_teacher.py --out fast/data/tiny books.txt
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQUENCE, BATCH, LEARNING_RATE = 256, 128, 4e-3
BEGIN, END, PAD = 256, 257, 258


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in arguments.texts)
    tokenizer = byte_tokenizer()
    order = torch.tensor(tokenizer.convert_tokens_to_ids(byte_letters()))  # token of each byte
    data = order[torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))].to(arguments.device)
    model = LlamaForCausalLM(config()).to(arguments.device)
    train(model, data, arguments.steps)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


def config() -> LlamaConfig:
    """Choose the model's sizes."""
    return LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def byte_letters() -> list[str]:
    """List the letters by which byte-level tokenizers write each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + rest.index(byte)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each byte."""
    vocabulary = {letter: at for at, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = {"<s>": BEGIN, "</s>": END, "<pad>": PAD, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | special, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )


def train(model: LlamaForCausalLM, data: torch.Tensor, steps: int) -> None:
    """Train with AdamW on random pieces of the text, with a linear warm-up and decay."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, max(0.0, 1 - step / steps))
    )
    offsets = torch.arange(SEQUENCE + 1, device=data.device)
    begin = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(data) - SEQUENCE - 1, (BATCH, 1), device=data.device)
        batch = data[starts + offsets]
        with torch.autocast(data.device.type, torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 500 == 0 or step + 1 == steps:
            print(
                f"step {step}: {loss.item() / np.log(2):.3f} bits a byte, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
