"""The demonstration behind `make demo`: a real language model in, packed sub-1-bit models out, measured from disk."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import info, load, save
from .fetch import fetch
from .hf import load_model, load_tokenizer
from .model import Config, packed_layers, quantize_
from .packing import unpack_factors
from .progress import tqdm

MODEL = "smollm2"
PICTURED = "model.layers.0.self_attn.q_proj"
CORNER = 128  # rows and columns drawn: enough to see single weights
PROMPT = "The history of the city begins"
WINDOWS = 4
NEW_TOKENS = 60

NOTE = """\
All rows of the quantised model hold 0.55 bits per weight. Dual-SVID is where quantisation-aware training starts, and
speaks nonsense; the trained checkpoint comes with this package (`littlebit fetch smollm2-0.55bit`)."""
UNTRAINED, TRAINED = "bits-0.55-untrained", "smollm2-0.55bit"
CONFIG = Config(bits=0.55)


def demo(out: Path) -> str:
    """Quantise, save, reload in fresh processes, measure; returns the table as text and leaves a picture in `out`."""
    gguf = fetch(MODEL)
    out.mkdir(parents=True, exist_ok=True)
    untrained, trained = write_untrained(out / UNTRAINED), fetch(TRAINED)
    jobs = [
        ("original (Q4_1 GGUF)", MODEL, gguf_sizes(gguf)),
        ("Dual-SVID, untrained", str(untrained), info(untrained)),
        ("trained", str(trained), info(trained)),
    ]
    rows = []
    for title, model, stored in tqdm(jobs, desc="measuring, each model in a fresh process", unit="model"):
        rows.append({"title": title} | stored | measure(model))
    (out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    picture = draw(untrained, out / "figure2.png")
    samples = [f'{row["title"]}:\n    "{PROMPT}{row["text"]}"' for row in rows]
    return "\n".join(["", table(rows), "", NOTE, "", *samples, "", f"Picture: {picture}"])


def write_untrained(folder: Path) -> Path:
    """Quantise the model by Dual-SVID and save it."""
    model = load_model(MODEL)
    results = quantize_(model, CONFIG)
    return save(model, folder, load_tokenizer(MODEL), CONFIG.bits, results, overwrite=True)


def gguf_sizes(path: Path) -> dict[str, Any]:
    """Stored bits and bytes of the linear layers of a GGUF file's blocks, as `info` gives them for a checkpoint."""
    from gguf import GGUFReader

    tensors = [
        tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    linear_bytes, weights = (sum(int(getattr(t, key)) for t in tensors) for key in ("n_bytes", "n_elements"))
    return {
        "bits_per_weight": 8 * linear_bytes / weights,
        "linear_bytes": linear_bytes,
        "file_bytes": path.stat().st_size,
    }


def measure(model: str) -> dict[str, Any]:
    """Perplexity, speed and a sample of a model, each from its own process that loads the model from disk."""
    score = littlebit("eval", model, "--max-windows", str(WINDOWS))
    sampling = ("--temperature", "0.7", "--top-p", "0.9")
    spoken = littlebit("generate", model, "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS), *sampling)
    return {key: score[key] for key in ("perplexity", "scored")} | {
        key: spoken[key] for key in ("text", "tokens_per_s")
    }


def littlebit(*arguments: str) -> dict[str, Any]:
    """The JSON that a `littlebit` command prints."""
    command = [sys.executable, "-m", "littlebit.fast", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as text."""
    head = f"{'SmolLM2-135M-Instruct':<24}{'bits/weight':>12}{'linear bytes':>14}{'file bytes':>13}{'perplexity':>12}"
    lines = [head + f"{'tokens/s':>10}", "-" * (len(head) + 10)]
    for row in rows:
        lines.append(
            f"{row['title']:<24}{row['bits_per_weight']:>12.3f}{row['linear_bytes']:>14,}{row['file_bytes']:>13,}"
            f"{row['perplexity']:>12.4g}{row['tokens_per_s']:>10.1f}"
        )
    lines.append(
        "bits/weight and linear bytes: of the quantised layers (embeddings and norms stay in 16 bits), as stored. "
        f"Perplexity:\nthe shipped 1901 text, {WINDOWS} windows of 2048 tokens, {rows[0]['scored']} tokens scored. "
        "The original runs dequantised, in float32."
    )
    return "\n".join(lines)


def draw(folder: Path, path: Path) -> Path:
    """The paper's Figure 2: a weight matrix, its primary path, its residual and their sum, from the stored bits."""
    from matplotlib.figure import Figure

    weight = load_model(MODEL).get_submodule(PICTURED).weight.detach()  # type: ignore[union-attr]
    primary, residual = (unpack_factors(path).to_dense() for path in packed_layers(load(folder))[PICTURED].factors())
    panels = {
        "original W": weight,
        "primary": primary,
        "residual": residual,
        "primary + residual": primary + residual,
    }
    limit = float(weight.abs().flatten().quantile(0.99))
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, matrix) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        corner = matrix[:CORNER, :CORNER].numpy()
        image = axes.imshow(corner, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        axes.set_title(title if matrix is weight else f"{title}\nrelative error {relative_error(weight, matrix):.2f}")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="weight")
    size = f"{weight.shape[0]} x {weight.shape[1]}, first {CORNER} rows and columns"
    figure.suptitle(f"{PICTURED} ({size}) at {CONFIG.bits} bits per weight")
    figure.savefig(path, dpi=150)
    return path


def relative_error(weight: Tensor, matrix: Tensor) -> float:
    """||W - matrix||_F / ||W||_F."""
    return float(torch.linalg.matrix_norm(weight - matrix) / torch.linalg.matrix_norm(weight))
