"""Write a dense bfloat16 model of a published shape whose weights have the spectra of a trained model.

    python book/experiments/dense_model.py llama2-7b OUT [--blocks 2] [--device cuda]

The weights say nothing, so the text of such a model is noise. Everything but its quality can be measured on it: the
memory and time of quantization and training, the speed of decoding. Of each type of layer, the cumulative share of
||W||_F^2 by singular value is the one in book/results/spectra_smollm2.json. Every block has the
same matrices, with their rows and columns permuted and their signs changed at random, which keeps the singular values.

OUT holds config.json, one safetensors file for each block and one for the rest, the index, and the byte-level
tokenizer of the package's tiny model.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import littlebit.fast as lb
import torch
from littlebit.fast.files.atomic import atomic_directory
from littlebit.fast.models.blocks import decoder_blocks
from littlebit.fast.models.build import empty_model
from littlebit.fast.models.published import published_config
from littlebit.fast.models.selection import is_linear
from safetensors.torch import save_file
from torch import Tensor

SPECTRA = Path(__file__).resolve().parents[1] / "results" / "spectra_smollm2.json"
ROOT_MEAN_SQUARE = 0.02  # of all weights, as in a trained model
#: Types of layers that have no spectrum of their own -> the measured type whose spectrum they get.
ALIKE = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj", "out_proj": "o_proj", "fc1": "up_proj", "fc2": "down_proj"}


def energy_curves() -> dict[str, dict[str, list[float]]]:
    """Read the measured spectra: a row for each type of layer."""
    rows = json.loads(SPECTRA.read_text(encoding="utf-8"))["rows"]
    return {row["kind"]: row for row in rows}


def singular_values(fractions: list[float], energy: list[float], count: int) -> Tensor:
    """Interpolate `count` singular values, in falling order, from shares of the squared norm at fractions of the rank.

    Returns
    -------
    (count,) float32 tensor with a squared norm of 1.
    """
    squares = torch.zeros(count)
    for (low, high), (less, more) in zip(pairwise(fractions), pairwise(energy), strict=True):
        first, last = round(low * count), round(high * count)
        squares[first:last] = (more - less) / max(1, last - first)
    smooth = squares.clamp(min=0).sort(descending=True).values
    return (smooth / smooth.sum()).sqrt()


def with_spectrum(d_out: int, d_in: int, values: Tensor, generator: torch.Generator) -> Tensor:
    """Make a (d_out, d_in) float32 matrix with these singular values, up to a scale, and random singular vectors.

    Random signs and orthogonal Hartley transforms, twice on each side, take seconds where a QR decomposition of a
    random matrix takes minutes.
    """
    matrix = torch.zeros(d_out, d_in, device=generator.device)
    matrix.diagonal().copy_(values * ROOT_MEAN_SQUARE * math.sqrt(d_out * d_in))
    for _ in range(4):
        spectrum = torch.fft.fft(matrix * random_signs(matrix, generator), dim=0, norm="ortho")
        matrix = (spectrum.real - spectrum.imag).mT.contiguous()
    return matrix


def random_signs(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a sign for each row, (rows, 1)."""
    signs = torch.randint(0, 2, (len(matrix), 1), generator=generator, device=matrix.device) * 2 - 1
    return signs.to(matrix.dtype)


def shuffled(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Permute rows and columns and change their signs at random, which keeps the singular values."""
    for _ in range(2):
        order = torch.randperm(len(matrix), generator=generator, device=matrix.device)
        matrix = (matrix[order] * random_signs(matrix, generator)).mT
    return matrix


def block_tensors(block: torch.nn.Module, first: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Make the tensors of a decoder block by name; `first` keeps its matrices for the next."""
    curves, tensors = energy_curves(), {}
    linears = {f"{name}.weight" for name, module in block.named_modules() if is_linear(module)}
    for name, parameter in block.named_parameters():
        if name not in linears:
            tensors[name] = plain_values(name, parameter.shape, generator)
            continue
        if name not in first:
            d_out, d_in = parameter.shape
            kind = name.split(".")[-2]
            curve = curves[ALIKE.get(kind, kind)]
            values = singular_values(curve["fractions"], curve["energy"], min(d_out, d_in))
            first[name] = with_spectrum(d_out, d_in, values, generator).to(torch.bfloat16)
        tensors[name] = shuffled(first[name], generator).contiguous().cpu()
    return tensors


def plain_values(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Make a tensor that is not a block's matrix: ones for a norm, zeros for a bias, normal numbers for a table."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    values = torch.randn(shape, generator=generator, device=generator.device)
    return (ROOT_MEAN_SQUARE * values).to(torch.bfloat16).cpu()


def write(out: Path, name: str, layers: int | None, device: str, overwrite: bool = False) -> None:
    """Write the files of a model, one block at a time."""
    config = published_config(name, layers)
    with torch.device("meta"):
        model = empty_model(config)
    blocks = decoder_blocks(model)
    prefix = next(key for key, each in model.named_modules() if each is blocks[0]).rpartition(".")[0]
    generator = torch.Generator(device).manual_seed(0)
    first: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    with atomic_directory(out, overwrite) as folder:
        total = len(blocks) + 1
        for at, block in enumerate(blocks):
            tensors = {f"{prefix}.{at}.{key}": each for key, each in block_tensors(block, first, generator).items()}
            save_part(folder, at + 1, total, tensors, weight_map)
        rest = {key: p for key, p in model.named_parameters() if not key.startswith(f"{prefix}.")}
        tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
        tensors = {key: plain_values(key, p.shape, generator) for key, p in rest.items() if key not in tied}
        save_part(folder, total, total, tensors, weight_map)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        lb.load_tokenizer("tiny").save_pretrained(folder)


def save_part(folder: Path, at: int, total: int, tensors: dict[str, Tensor], weight_map: dict[str, str]) -> None:
    """Write one safetensors file, and note in `weight_map` which tensors it holds."""
    name = f"model-{at:05d}-of-{total:05d}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
    print(f"{name}: {sum(tensor.nbytes for tensor in tensors.values()):,} bytes", flush=True)


def main() -> None:
    """Read the arguments and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a shape of `littlebit memory`, such as llama2-7b")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--blocks", type=int, help="decoder blocks (default: all of the shape's)")
    parser.add_argument("--device", default="cpu", help="where to compute the matrices: cpu or cuda")
    arguments = parser.parse_args()
    write(arguments.out, arguments.shape, arguments.blocks, arguments.device)


if __name__ == "__main__":
    main()
