"""Compare SmolLM2's packed students with llama.cpp's quantizations of the same model, by file size.

    python book/experiments/equal_bytes.py OUT.json --text wikitext2-test.txt --blimp blimp.zip --folder DIR

A run that was stopped goes on: rows in OUT.json are kept, and DIR keeps the files that take long to make. It needs
`llama-cpp-python`.

llama.cpp quantizes a float16 GGUF file of the original, and computes with its own kernels. Types that need an
importance matrix get the mean squares of the layers' inputs on the bundled training text. All models read the same
windows, spread evenly over the text. The original was published in Q4_1, so all start from its dequantized weights. The
4-bit embedding is one table for all students, fitted to the inputs of the original's head.

A size is that of everything that a program needs to run the model, tokenizer included: a GGUF file, or the folder of a
checkpoint.
"""

import argparse
import copy
import ctypes
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import littlebit.fast as lb
import llama_cpp
import numpy as np
import torch
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.checkpoints.fetch import fetch
from littlebit.fast.checkpoints.names import bundled_names
from littlebit.fast.checkpoints.texts import text_tokens
from littlebit.fast.evaluation.perplexity import TRAINING_TEXT
from littlebit.fast.files.atomic import atomic_file
from littlebit.fast.models.embeddings import EmbeddingTable, quantize_embeddings_, replace_embeddings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ORIGINAL = "smollm2"
TYPES = ("Q2_K", "Q4_K_M", "Q8_0", "Q3_K_M", "Q4_0", "Q6_K", "Q5_K_M", "IQ1_S", "IQ2_XXS")
NEED_IMPORTANCE = {"IQ2_XXS", "IQ1_S"}
CALIBRATION_TOKENS = 4096
CONTEXT = 2048  # tokens that llama.cpp has room for


class Subject(NamedTuple):
    """Name a model to measure: the first columns of its row, how to load it, and then how many bytes it takes."""

    row: dict[str, Any]
    load: Callable[[], nn.Module]
    bytes: Callable[[], int]


class Remembered(nn.Module):
    """Keep the logits of a model's windows in a folder, because every other model is compared with them."""

    def __init__(self, load: Callable[[], nn.Module], folder: Path):
        super().__init__()
        self.nowhere = nn.Parameter(torch.zeros(1))  # its device is the model's
        self.load, self.folder = load, folder

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """Map (1, length) tokens to an object with their logits."""
        file = self.folder / f"logits-{hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]}.npy"
        if not file.exists():
            logits = self.load()(tokens, **options).logits.numpy()
            with atomic_file(file) as part, part.open("wb") as opened:
                np.save(opened, logits)
        return SimpleNamespace(logits=torch.from_numpy(np.load(file)))


class LlamaCpp(nn.Module):
    """Give llama.cpp's model of a GGUF file the interface of a transformers model."""

    def __init__(self, file: Path, threads: int):
        super().__init__()
        self.nowhere = nn.Parameter(torch.zeros(1))  # its device is the model's
        self.llama = llama_cpp.Llama(
            str(file), n_ctx=CONTEXT, n_batch=CONTEXT, n_ubatch=CONTEXT, n_threads=threads, n_threads_batch=threads,
            logits_all=True, verbose=False,
        )  # fmt: skip

    def forward(self, tokens: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """Map (batch, length) tokens to an object with their logits, (batch, length, vocabulary) float32."""
        found = []
        for row in tokens.tolist():
            self.llama.reset()
            self.llama.eval(row)
            found.append(torch.from_numpy(np.array(self.llama.scores[: len(row)][-logits_to_keep:])))
        return SimpleNamespace(logits=torch.stack(found))


def importance(model: nn.Module, tokens: Tensor) -> dict[str, np.ndarray]:
    """Measure the mean square of each input channel of the linear layers, by GGUF's names of their weights."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    layers = [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    moments = lb.calibrate(model, tokens, layers, progress=False)
    return {
        names.get_name(f"{name}.weight", try_suffixes=(".weight",)): each.inputs.float().numpy()
        for name, each in moments.items()
    }


def llama_quantize(source: Path, file: Path, kind: str, matrix: dict[str, np.ndarray] | None, threads: int) -> bool:
    """Let llama.cpp quantize a GGUF file; return whether it could."""
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), threads
    if matrix is not None:
        rows = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # a row of zeros ends it
        for row, (name, values) in zip(rows, matrix.items(), strict=False):
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = ctypes.cast(rows, ctypes.POINTER(llama_cpp.llama_cpp.llama_model_imatrix_data))
    return not llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(file), ctypes.byref(settings))


def four_bit_table(original: Callable[[], nn.Module], calibration: Tensor, file: Path) -> EmbeddingTable:
    """Quantize the original's embedding, which is its head too, to 4 bits, or read the table from a file."""
    if not file.exists():
        small = copy.deepcopy(original())
        quantize_embeddings_(small, 4, calibration)
        with atomic_file(file) as part:
            save_file(small.get_input_embeddings().table.state_dict(), part)
    return EmbeddingTable(4, **load_file(file))


def folder_bytes(folder: Path) -> int:
    """Add up the sizes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def students(folder: Path, tokenizer: Any, table: Callable[[], EmbeddingTable]) -> Iterator[Subject]:
    """Name the shipped students, with their 8-bit embeddings and with 4-bit ones."""
    for name in bundled_names():
        if name.startswith(ORIGINAL):
            row = {"method": "littlebit", "name": name}
            packed = Path(fetch(name))
            yield Subject(
                row | {"embedding_bits": 8}, lambda name=name: lb.load(name), lambda at=packed: folder_bytes(at)
            )
            smaller = folder / f"{name}-4"

            def load(name: str = name, smaller: Path = smaller) -> nn.Module:
                model = lb.load(name)
                replace_embeddings(model, table(), table(), torch.float32)
                lb.save(model, smaller, tokenizer, overwrite=True)
                return lb.load(smaller)

            yield Subject(row | {"embedding_bits": 4}, load, lambda at=smaller: folder_bytes(at))


def peers(
    folder: Path, original: Callable[[], nn.Module], tokenizer: Any, calibration: Tensor, threads: int
) -> Iterator[Subject]:
    """Name llama.cpp's quantizations of the original."""
    source, matrix = folder / "original.gguf", folder / "importance.npz"
    for kind in TYPES:
        file = folder / f"{kind}.gguf"

        def load(kind: str = kind, file: Path = file) -> nn.Module:
            if not source.exists():
                lb.save_gguf(original(), source, tokenizer)
            if kind in NEED_IMPORTANCE and not matrix.exists():
                np.savez(matrix, **importance(original(), calibration))
            needed = dict(np.load(matrix)) if kind in NEED_IMPORTANCE else None
            if not llama_quantize(source, file, kind, needed, threads):
                raise RuntimeError(f"llama.cpp could not make {kind}")
            return LlamaCpp(file, threads)

        row = {"method": "llama.cpp", "name": kind, "importance_matrix": kind in NEED_IMPORTANCE}
        yield Subject(row, load, lambda file=file: file.stat().st_size)


def spread_windows(tokens: Tensor, window: int, count: int) -> Tensor:
    """Join `count` windows that lie evenly over a text."""
    starts = np.linspace(0, len(tokens) - window, count).astype(int)
    return torch.cat([tokens[at : at + window] for at in starts])


def measure(
    model: nn.Module, original: nn.Module, tokens: Tensor, tokenizer: Any, given: argparse.Namespace
) -> dict[str, Any]:
    """Measure a model's perplexity, divergence and BLiMP."""
    start = time.perf_counter()
    found = lb.divergence(model, original, tokens, given.window, progress=False)
    score = lb.blimp(model, tokenizer, given.blimp, given.blimp_items, progress=False)
    row = {"perplexity": found.perplexity, "kl": found.kl, "same_top": found.same_top, "window": found.window}
    row |= {"windows": found.windows, "scored": found.scored, "blimp": score.accuracy, "blimp_pairs": score.pairs}
    return row | {"seconds": time.perf_counter() - start}


def main() -> None:
    """Measure all models, and save the rows after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 test, rows joined by two newlines")
    parser.add_argument("--blimp", type=Path, required=True, help="zip archive of BLiMP")
    parser.add_argument("--folder", type=Path, required=True, help="folder for intermediate files, 1 GB")
    parser.add_argument("--windows", type=int, default=4, help="windows to measure")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window")
    parser.add_argument("--blimp-items", type=int, default=2, help="pairs of each paradigm, from the first")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    torch.set_num_threads(given.threads)
    tokenizer, load = lb.load_tokenizer(ORIGINAL), functools.cache(lambda: lb.load_model(ORIGINAL))
    calibration = text_tokens(tokenizer, TRAINING_TEXT)[:CALIBRATION_TOKENS]
    tokens = spread_windows(text_tokens(tokenizer, given.text), given.window, given.windows)
    original, kept = Remembered(load, given.folder), given.folder / "table.safetensors"
    table = functools.cache(lambda: four_bit_table(load, calibration, kept))
    command = f"python book/experiments/equal_bytes.py book/results/equal_bytes.json --text {given.text.name}"
    command += f" --blimp {given.blimp.name} --folder DIR --windows {given.windows} --window {given.window}"
    command += f" --blimp-items {given.blimp_items}"
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    first = Subject({"method": "original", "name": "Q4_1"}, load, lambda: fetch(ORIGINAL).stat().st_size)
    quantized = peers(given.folder, load, tokenizer, calibration, given.threads)
    subjects = [first, *students(given.folder, tokenizer, table), *quantized]
    for subject in sorted(subjects, key=lambda each: each.row.get("embedding_bits") == 4):  # these take longest
        if any(subject.row.items() <= row.items() for row in rows):
            continue
        row = subject.row | measure(subject.load(), original, tokens, tokenizer, given)
        rows.append(row | {"bytes": subject.bytes()})
        print(json.dumps(rows[-1]), flush=True)
        save_results(given.out, rows, command, cpu_name())


if __name__ == "__main__":
    main()
