"""A packed checkpoint of random signs in the shape of any Llama, made without a dense weight: to load and to measure.

`python tests/models/random_checkpoint.py OUT` writes one in the shape of Llama-2-7B and says what loading it takes.
"""

import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.bench.linear import random_path
from littlebit.fast.checkpoints.format import weight_files
from littlebit.fast.models.build import empty_model
from littlebit.fast.models.layers import PackedLinear
from littlebit.fast.models.quantize import Config, replace_module, target_layers

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
    model = empty_model({"model_type": "llama"} | sizes)
    layers = dict(target_layers(model, Config()))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    for name, ranks in lb.allocate_ranks(shapes, bits, paths=1).items():
        replace_module(model, name, PackedLinear([random_path(*shapes[name], rank, generator) for rank in ranks]))
    for parameter in model.parameters():
        values = torch.empty(parameter.shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
        module, _, name = next(key for key, each in model.named_parameters() if each is parameter).rpartition(".")
        setattr(model.get_submodule(module), name, torch.nn.Parameter(values))
    return lb.save(model, path, bits=bits, shard_bytes=shard_bytes)


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
