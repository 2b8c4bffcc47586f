"""Time llama.cpp on a dense model of a published shape, beside `littlebit bench decode --model-shape`.

    python book/experiments/llama_cpp_large.py OUT.json --shape llama2-7b --types Q4_0 Q2_K IQ1_S --threads 1 2

No such model is needed: a GGUF file of its shape is written, whose weights are random codes with one fixed scale, and
deleted afterwards. Embedding and head are Q4_0 in all files. The Python of --llama-python must have llama_cpp.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from littlebit.fast.bench.decode import run_engine, summary
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.models.build import empty_model
from littlebit.fast.models.published import published_config

SCALE = 0.01  # of each block of weights
SCALE_AT = {"Q4_0": (0,), "Q2_K": (80, 82), "IQ1_S": (0,), "TQ1_0": (52,)}  # where a block has float16 scales, in bytes
TABLES = "Q4_0"  # type of the embedding and of the head
TOKENS = 16  # to time in a round
NAMES = {  # GGUF's names of a Llama's tensors
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_blocks(rows: int, columns: int, kind: str, generator: np.random.Generator) -> np.ndarray:
    """Draw a matrix of a quantized type, (rows, bytes of a row) uint8: random codes, fixed scales."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = generator.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    for at in SCALE_AT[kind]:
        blocks[:, at : at + 2] = np.array([SCALE], np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def gguf_name(name: str) -> str:
    """Translate a parameter's name of transformers into GGUF's."""
    parts = name.removeprefix("model.").split(".")
    block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
    return f"{block}{NAMES[parts[-2]]}.weight"


def write_model(out: Path, shape: str, kind: str) -> None:
    """Write a GGUF file of a published Llama shape; matrices of one size share their random codes."""
    config = published_config(shape)
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads", config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    add_tokenizer(writer, config["vocab_size"])
    with torch.device("meta"):
        model = empty_model(config)
    made: dict[tuple[Any, ...], np.ndarray] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ones(parameter.shape, np.float32))
            continue
        own = kind if ".layers." in name else TABLES
        key = (*parameter.shape, own)
        if key not in made:
            made[key] = random_blocks(*parameter.shape, own, generator)
        writer.add_tensor(gguf_name(name), made[key], raw_dtype=gguf.GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """Add a vocabulary of the bytes and of words that no text has."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    words = [f"word{at}" for at in range(len(tokens), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + words)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*types, *[kinds.NORMAL] * len(words)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    """Read the arguments and measure; save after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--types", nargs="+", choices=SCALE_AT, default=["Q4_0", "Q2_K", "IQ1_S"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama_cpp (default: this one)")
    parser.add_argument("--folder", type=Path, help="for the files (default: the temporary folder)")
    arguments = parser.parse_args()
    rows = []
    for kind in arguments.types:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "model.gguf"
            write_model(path, arguments.shape, kind)
            for threads in arguments.threads:
                found = run_engine("llama.cpp", "", "", threads, TOKENS, arguments.llama_python, path)
                if found is None:
                    raise SystemExit(f"{arguments.llama_python} has no llama_cpp: install llama-cpp-python there")
                row = {"shape": arguments.shape, "type": kind, "file_bytes": path.stat().st_size}
                rows.append(row | summary("llama.cpp", threads, TOKENS, [found]))
                print(rows[-1], flush=True)
                save_results(arguments.out, rows, " ".join(["python", *sys.argv]), cpu_name())


if __name__ == "__main__":
    main()
