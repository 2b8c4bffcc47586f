"""Write the shipped checkpoints as scripts that a page can load from a file, for the model that runs in the browser.

A browser refuses to fetch files beside a page that was opened from a disk, but it runs scripts. So each checkpoint is
written as a script that holds the bytes of its packed layers in base64; one more holds the embeddings, in 8 bits.
"""

import base64
import json
from pathlib import Path
from typing import Any

import littlebit.fast as lb
import numpy as np
from littlebit.reference.packing import decode_scale
from safetensors.numpy import load_file

NAMES = ("smollm2-1bit", "smollm2-0.55bit", "smollm2-0.3bit", "smollm2-0.1bit")
BLOCK_LAYERS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# GPT-2's pattern of words, on which the tokenizer's merges act
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Bytes:
    """Collect arrays as bytes, and say where each begins."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0

    def add(self, array: np.ndarray) -> int:
        """Append an array and return the place of its first byte."""
        start = self.size
        self.parts.append(np.ascontiguousarray(array).tobytes())
        self.size += array.nbytes
        return start

    def base64(self) -> str:
        """Encode all bytes."""
        return base64.b64encode(b"".join(self.parts)).decode()


def layer_entry(tensors: dict[str, np.ndarray], prefix: str, found: Bytes) -> dict[str, Any]:
    """Add the paths of one layer, and describe where their arrays are."""
    paths = []
    while f"{prefix}.paths.{len(paths)}.ell" in tensors:
        path = f"{prefix}.paths.{len(paths)}"
        u, v, h, ell, g = (tensors[f"{path}.{name}"] for name in ("u_words", "v_words", "h", "ell", "g"))
        if f"{path}.peaks" in tensors:
            h, ell, g = map(decode_scale, (h, ell, g), tensors[f"{path}.peaks"])
        entry = {"rank": len(ell), "u_stride": u[0].nbytes, "v_stride": v[0].nbytes}
        paths.append(entry | {name: found.add(a) for name, a in zip("uvh", (u, v, h), strict=True)})
        paths[-1] |= {"ell": found.add(ell), "g": found.add(g)}
    return {"d_out": len(h), "d_in": len(g), "paths": paths}


def layers_of(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint's sizes and packed layers."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    found, blocks = Bytes(), []
    for at in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{at}"
        layers = {
            name: layer_entry(tensors, f"{prefix}.{part}.{name}", found)
            for part, names in BLOCK_LAYERS.items()
            for name in names
        }
        norms = [
            found.add(tensors[f"{prefix}.{name}.weight"]) for name in ("input_layernorm", "post_attention_layernorm")
        ]
        blocks.append({"layers": layers, "norms": norms})
    sizes = {
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kvHeads": config["num_key_value_heads"],
        "size": config["head_dim"],
        "wide": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "eps": config["rms_norm_eps"],
        "theta": config["rope_parameters"]["rope_theta"],
    }
    return {"sizes": sizes, "blocks": blocks, "norm": found.add(tensors["model.norm.weight"]), "data": found.base64()}


def table_of(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint's embedding of 8 bits."""
    tensors, found = load_file(folder / "model.safetensors"), Bytes()
    codes, scale = (tensors[f"model.embed_tokens.table.{name}"] for name in ("codes", "scale"))
    found.add(codes)
    found.add(scale)
    return {"group": codes.shape[1] // scale.shape[1], "data": found.base64()}


def tokenizer_of(folder: Path) -> dict[str, Any]:
    """Read the pieces and merges of a byte-level BPE tokenizer."""
    record = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = record["model"]["vocab"] | {each["content"]: each["id"] for each in record["added_tokens"]}
    merges = [each if isinstance(each, str) else " ".join(each) for each in record["model"]["merges"]]
    return {
        "vocabulary": sorted(pieces, key=lambda piece: pieces[piece]),
        "merges": merges,
        "pattern": PATTERN,
        "special": [each["id"] for each in record["added_tokens"] if each["special"]],
        "stop": [json.loads((folder / "config.json").read_text())["eos_token_id"]],
    }


def write(folder: Path, names: tuple[str, ...] = NAMES) -> None:
    """Write a script for each checkpoint, and one for what they share, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = folder / "shared.js"
    for name in names:
        target = folder / f"{name}.js"
        if not target.exists():
            target.write_text(f"LittleBit.layers = {json.dumps(layers_of(lb.fetch(name)))};\n", encoding="utf-8")
    if not shared.exists():
        source = lb.fetch(names[0])
        text = f"LittleBit.table = {json.dumps(table_of(source))};\n"
        shared.write_text(text + f"LittleBit.words = {json.dumps(tokenizer_of(source))};\n", encoding="utf-8")
