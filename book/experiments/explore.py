"""Compute the interactive page and Figure 2: one weight of SmolLM2 at several bits, and the memory of models.

    python book/experiments/explore.py book/results/explore.json

The page's matrix is the query projection of the first block. Figure 2 has an MLP layer beside it, the kind that holds
most of the weights. "pictures" are the first rows and columns, a byte an entry in base64: 127 + round(127 w / limit),
clipped. Errors refer to the whole matrix. Memory is counted by reference/memory.py. A minute on one core.
"""

import argparse
import base64
import copy
from pathlib import Path
from typing import Any

import littlebit.fast as lb
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.reference.memory import MODEL_SHAPES, model_memory

LAYER = "model.layers.0.self_attn.q_proj"
TYPICAL = "model.layers.4.mlp.up_proj"
CORNER = 64
BITS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.7, 0.8, 1.0)
FIGURE_BITS = (0.3, 0.55, 1.0)  # at 0.1 the scales of two paths alone are too much for this layer
INITS = ("dual-svid", "admm")
MODELS = ("llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b")


def picture(matrix: torch.Tensor, limit: float) -> str:
    """Encode the corner of a matrix as text."""
    codes = 127 + (127 * matrix[:CORNER, :CORNER] / limit).round().clamp(-127, 127)
    return base64.b64encode(codes.byte().numpy().tobytes()).decode()


def original(layer: torch.nn.Module) -> dict[str, Any]:
    """Describe a weight, with a picture in which one value of a hundred is clipped."""
    weight = layer.weight.detach()
    limit = float(weight.abs().flatten().quantile(0.99))
    row = {"what": "original", "layer": LAYER, "d_out": weight.shape[0], "d_in": weight.shape[1]}
    return row | {"corner": CORNER, "limit": limit, "pictures": {"sum": picture(weight, limit)}}


def reconstruction(
    layer: torch.nn.Module, bits: float, init: str, limit: float, paths: int | None = None
) -> dict[str, Any]:
    """Factorise the layer within a budget, by default with a residual path where it pays."""
    weight = layer.weight.detach()
    holder = torch.nn.Sequential(copy.deepcopy(layer))
    (found,) = lb.quantize_(holder, lb.Config(bits=bits, init=init, paths=paths), progress=False).values()
    parts = [path.to_dense().detach() for path in holder[0].factors()]
    pictures = {"sum": picture(sum(parts), limit)}
    if paths:
        pictures |= {name: picture(part, limit) for name, part in zip(("primary", "residual"), parts, strict=True)}
    row = {
        "what": "figure 2" if paths else "reconstruction",
        "layer": LAYER,
        "init": init,
        "bits": bits,
        "stored_bits": found.bits,
    }
    row |= {"ranks": list(found.ranks), "error": found.error}
    row["primary_error"] = float((weight - parts[0]).norm() / weight.norm())
    return row | {"pictures": pictures}


def memory(model: str, bits: float | None) -> dict[str, Any]:
    """Count the GB of a model's weights with embedding and head in 16, 8 and 4 bits."""
    sizes = {width: model_memory(MODEL_SHAPES[model], bits, embedding_bits=width) for width in (16, 8, 4)}
    weights = {str(width): size.weights / 1e9 for width, size in sizes.items()}
    return {"what": "memory", "model": model, "bits": bits or 16, "linear_GB": sizes[16].linear / 1e9} | {
        "weights_GB": weights
    }


def main() -> None:
    """Measure every row and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = lb.load_model("smollm2")
    layer, typical = (model.get_submodule(name) for name in (LAYER, TYPICAL))
    rows = [original(layer), original(typical) | {"what": "typical original", "layer": TYPICAL}]
    limit, typical_limit = (each["limit"] for each in rows)
    rows += [reconstruction(layer, bits, init, limit) for init in INITS for bits in BITS]
    rows += [reconstruction(layer, bits, "dual-svid", limit, paths=2) for bits in FIGURE_BITS]
    for bits in FIGURE_BITS:
        found = reconstruction(typical, bits, "dual-svid", typical_limit, paths=2)
        rows.append(found | {"what": "typical", "layer": TYPICAL})
    rows += [memory(name, bits) for name in MODELS for bits in (*BITS, None)]
    save_results(arguments.out, rows, f"python book/experiments/explore.py {arguments.out}", cpu_name())


if __name__ == "__main__":
    main()
