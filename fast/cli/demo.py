"""Show a trained sub-1-bit model writing, then measure it beside two others: the `demo` command."""

import argparse
import contextlib
import functools
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.fetch import fetch, resolve
from ..checkpoints.names import TINY
from ..files.atomic import check_file, write_text
from .arguments import Command
from .models import load_any, use_torch
from .tables import text_table

if TYPE_CHECKING:
    from torch import Tensor

MODEL, TRAINED = "smollm2", "smollm2-0.55bit"
BITS = 0.55
UNTRAINED = "bits-0.55-untrained"
PICTURED = "model.layers.0.self_attn.q_proj"
CORNER = 128  # Rows and columns to draw: few enough to see single weights.
PROMPT = "In the beginning of the twentieth century,"
SAMPLING = {"temperature": 0.6, "top_p": 0.8, "seed": 3}  # Greedy text of a small model repeats itself.
NEW_TOKENS = 19  # up to the end of the sentence that the trained model writes
WINDOWS = 4  # windows of the included text that perplexity is measured on
TIMED_TOKENS = 80

NOTE = """\
The last two models store their linear layers in 0.55 bits per weight. Training starts from the untrained one. The
trained one comes with this package (`littlebit fetch smollm2-0.55bit`). Most bytes of its file are the embedding, in 8
bits per entry; the untrained one's has 16."""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the arguments of `littlebit demo`."""
    sub.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the models and the picture")


def run(arguments: argparse.Namespace) -> None:
    """Let the trained model write before torch is imported, then measure and print the table."""
    for name in ("demo.json", "figure2.png"):
        check_file(arguments.out / name)
    write_sample()
    use_torch()
    print(measure(arguments.out))


def write_sample() -> None:
    """Print what the trained model writes, token by token, as soon as it and the kernels are ready."""
    folder = trained_model()
    print(f"SmolLM2-135M in {BITS} bits per weight, trained, writes on this CPU:\n")
    print(f"    {PROMPT}", end="", flush=True)
    for piece in stream_text(folder):
        print(piece.replace("\n", " "), end="", flush=True)
    print("\n", flush=True)


def stream_text(folder: Path) -> Iterator[str]:
    """Yield the text that a stored model writes after PROMPT, in pieces."""
    from ..decoding.generate import stream
    from ..decoding.mapped_weights import map_model
    from ..decoding.tokenizer import Tokenizer

    return stream(map_model(folder), PROMPT, NEW_TOKENS, **SAMPLING, tokenizer=Tokenizer(folder))


def trained_model() -> Path:
    """Return the trained model's folder; on the first run, build it while the kernels are compiled."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(fetch, TRAINED), pool.submit(compile_kernels)]
        wait_for("getting ready", jobs)
    return jobs[0].result()


def compile_kernels() -> None:
    """Compile the decoder's kernels, or load them from Numba's cache, by decoding two tokens of a tiny model."""
    from ..decoding.generate import stream
    from ..decoding.mapped_weights import map_model
    from ..decoding.tokenizer import Tokenizer

    folder = Path(resolve(TINY))
    next(stream(map_model(folder), "a", 2, tokenizer=Tokenizer(folder)))


def wait_for(title: str, jobs: list[Future[Any]]) -> None:
    """Wait for jobs and show the time that has passed, in one line; raise the first error of a job."""
    from .._progress import tqdm

    with tqdm(desc=title, bar_format="{desc} (the first time takes a while): {elapsed}", leave=False) as bar:
        while wait(jobs, timeout=1).not_done:
            bar.refresh()
    for job in jobs:
        job.result()


def measure(out: Path) -> str:
    """Make the untrained model, measure three models from disk, and describe them.

    Writes the untrained model, demo.json and figure2.png into `out`. Returns the table, a note and a sample of each
    model.
    """
    from .._progress import tqdm
    from ..checkpoints.checkpoint import info
    from ..checkpoints.saving import check_target

    untrained = out / UNTRAINED
    check_target(untrained, overwrite=True)
    models: list[tuple[str, str | Path, Callable[[], dict[str, Any]]]] = [
        ("original (Q4_1 GGUF)", MODEL, lambda: gguf_sizes(fetch(MODEL))),
        ("Dual-SVID, untrained", untrained, lambda: info(untrained)),
        ("trained", TRAINED, lambda: info(fetch(TRAINED))),
    ]
    rows = []
    with tqdm(total=len(models) + 3, unit="step") as bar:

        def step(title: str, work: Callable[[], Any]) -> Any:
            bar.set_description(title)
            try:
                return work()
            finally:
                bar.update()

        step("fetching the original", fetch_original)
        step("quantizing", functools.partial(save_untrained, untrained))
        for title, source, sizes in models:
            found = step(f"measuring: {title}", functools.partial(measure_model, source))
            rows.append({"title": title} | sizes() | found)
        picture = step("drawing", functools.partial(draw_weights, untrained, out / "figure2.png"))
    write_text(out / "demo.json", json.dumps(rows, indent=1) + "\n")
    samples = [f"{row['title']}:\n    {PROMPT}{row['text']}" for row in rows]
    return "\n".join([table(rows), "", NOTE, "", *samples, "", f"Picture: {picture}"])


def fetch_original() -> None:
    """Fetch and convert the original model, without the bars that transformers draws over this command's."""
    with contextlib.redirect_stderr(io.StringIO()):
        resolve(MODEL)


def save_untrained(folder: Path) -> None:
    """Quantize the original model with Dual-SVID and save it."""
    import torch

    from ..checkpoints.checkpoint import save
    from ..checkpoints.dense import load_model, load_tokenizer
    from ..models.quantize import Config, quantize_

    model, threads = load_model(MODEL), torch.get_num_threads()
    # For matrices of this size one thread is as fast as two, and a hundred times faster if other programs are busy.
    torch.set_num_threads(1)
    results = quantize_(model, Config(bits=BITS), progress=False)
    torch.set_num_threads(threads)
    save(model, folder, load_tokenizer(MODEL), BITS, results, overwrite=True)


def gguf_sizes(path: Path) -> dict[str, Any]:
    """Count the stored bits and bytes of the blocks' linear layers in a GGUF file, under the keys of `info`."""
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


def measure_model(source: str | Path) -> dict[str, Any]:
    """Measure perplexity, decoding speed and a text sample of a model that is loaded from disk.

    The speed is 1 / the median time of TIMED_TOKENS tokens in the decoder of `littlebit generate`. `core_share` is the
    processor time of the decoding thread / the time that passed; below 1, other programs kept the thread waiting.
    """
    from ..bench.decode import prefilled_decoder, token_times
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.texts import text_tokens
    from ..evaluation.perplexity import SAMPLE_TEXT, perplexity

    folder = Path(resolve(source))
    text = "".join(stream_text(folder)).replace("\n", " ")
    decoder = prefilled_decoder(folder, None, TIMED_TOKENS)
    start, begun = time.perf_counter(), time.thread_time()
    times = sorted(token_times(decoder, TIMED_TOKENS))
    share = (time.thread_time() - begun) / (time.perf_counter() - start)
    del decoder
    tokens = text_tokens(load_tokenizer(str(folder)), SAMPLE_TEXT)
    found = perplexity(load_any(folder, "cpu"), tokens, max_windows=WINDOWS, progress=False)
    speed = {"tokens_per_s": 1 / times[len(times) // 2], "core_share": share}
    return {"perplexity": found.perplexity, "scored": found.scored, "text": text} | speed


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the measurements as text, with a warning if other programs slowed the decoder down."""
    from ..bench.decode import QUIET_SHARE

    lines = text_table(
        [
            {"SmolLM2-135M-Instruct": row["title"], "bits/weight": f"{row['bits_per_weight']:.3f}"}
            | {"linear bytes": f"{row['linear_bytes']:,}", "file bytes": f"{row['file_bytes']:,}"}
            | {"perplexity": f"{row['perplexity']:.4g}", "tokens/s": f"{row['tokens_per_s']:.1f}"}
            for row in rows
        ]
    ).splitlines()
    lines.insert(1, "-" * len(lines[0]))
    lines.append(
        "bits/weight and linear bytes: the linear layers, as stored. file bytes: the whole file.\n"
        f"perplexity: {WINDOWS} windows of 2048 tokens of an included text from 1901, {rows[0]['scored']} tokens\n"
        f"scored. tokens/s: one sequence in the decoder of `littlebit generate`, median of {TIMED_TOKENS} tokens; the\n"
        "original runs with dequantized weights."
    )
    share = min(row["core_share"] for row in rows)
    if share < QUIET_SHARE:
        lines.append(
            f"The machine was too busy to measure speed: other programs left the decoder {share:.0%} of a core.\n"
            f"On a quiet machine, try `littlebit bench decode --model {TRAINED}`."
        )
    return "\n".join(lines)


def draw_weights(folder: Path, path: Path) -> Path:
    """Draw the paper's Figure 2 from stored bits: a weight matrix, its primary and residual path, and their sum."""
    from matplotlib.figure import Figure

    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_model
    from ..models.quantize import packed_layers
    from ..packing import unpack_factors

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
    figure.suptitle(f"{PICTURED} ({size}) at {BITS} bits per weight")
    figure.savefig(path, dpi=150)
    return path


def relative_error(weight: "Tensor", matrix: "Tensor") -> float:
    """Return ||W - matrix||_F / ||W||_F."""
    return float((weight - matrix).norm() / weight.norm())


COMMANDS = {
    "demo": Command(
        run,
        add_arguments,
        "Let a trained SmolLM2-135M of 0.55 bits per weight write, then measure it beside two other models.",
        ("demo --out build/demo",),
    )
}
