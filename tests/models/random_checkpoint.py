"""A packed checkpoint of random signs in the shape of any Llama, made without a dense weight: to load and to measure.

`python tests/models/random_checkpoint.py OUT` writes one in the shape of Llama-2-7B and says what loading it takes.
"""

import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
from littlebit.fast.bench import random_model
from littlebit.fast.checkpoints.format import weight_files

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_7B |= {"num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}

# What loading and one token add to the memory that a process holds after the same with a tiny model
PEAK = """
import gc, sys, torch, littlebit.fast as lb
from pathlib import Path
from transformers import AutoModelForCausalLM

def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)

def load(path):
    if sys.argv[3] == "lb":
        model = lb.load(path, dtype=torch.float16)
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)
    return model

load(sys.argv[1])
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
model = load(sys.argv[2])
assert not any(tensor.is_meta for tensor in model.state_dict().values())
for tensor in model.state_dict().values():  # every page of it, those that are only mapped to the file included
    tensor.contiguous().view(-1).view(torch.uint8)[::1024].sum()
print(1024 * (status("VmHWM") - before))
"""


def random_checkpoint(path, bits=0.55, shard_bytes=300_000_000, **sizes):
    """Write the checkpoint; `sizes` are keywords of a LlamaConfig."""
    return random_model.random_checkpoint(path, {"model_type": "llama"} | sizes, bits, shard_bytes=shard_bytes)


def peak_over_size(small, path, loader):
    """Peak of the host memory that loading a checkpoint and running it once adds, over the bytes of its files.

    The second process counts: the first one compiles what is not yet compiled, which takes memory of its own.
    """
    command = [sys.executable, "-c", PEAK, str(small), str(path), loader]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / sum(file.stat().st_size for file in weight_files(Path(path)))


if __name__ == "__main__":
    out = Path(sys.argv[1])
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    if not out.exists():
        random_checkpoint(out / "tiny", bits=4, vocab_size=64, num_key_value_heads=2, **tiny)
        random_checkpoint(out / "7b", **LLAMA_7B)
    size = lb.info(out / "7b")["file_bytes"]
    for name in ("lb", "transformers"):
        print(f"{name}: {peak_over_size(out / 'tiny', out / '7b', name):.3f} times the packed {size:,} bytes")
