"""The demonstration behind `make demo`: a trained sub-1-bit model writes at once; then four models are measured."""

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._progress import tqdm
from ..bench.decode import QUIET_SHARE, prefilled_decoder, token_times
from ..checkpoints.bundled import place
from ..checkpoints.fetch import fetch, resolve
from ..checkpoints.names import TINY
from ..decoding.generate import stream
from ..decoding.mapped_weights import map_model
from ..decoding.tokenizer import Tokenizer
from ..files.atomic import check_file, write_text

if TYPE_CHECKING:
    from torch import Tensor

MODEL, TRAINED = "smollm2", "smollm2-0.55bit"
BITS = 0.55
UNTRAINED, SMALL = "bits-0.55-untrained", "smollm2-0.55bit-embedding-8"
PICTURED = "model.layers.0.self_attn.q_proj"
CORNER = 128  # rows and columns drawn: enough to see single weights
PROMPT = "The castle was built in the"
SAMPLING = {"temperature": 0.5, "top_p": 0.8, "seed": 2}  # greedy text of a small model repeats itself
NEW_TOKENS = 45
WINDOWS = 4  # of the text that perplexity is measured on
ROUNDS, TOKENS = 5, 16  # that speed is measured in

NOTE = """\
The last three hold their linear layers in 0.55 bits a weight. Dual-SVID is where quantisation-aware training starts.
The trained model comes with this package (`littlebit fetch smollm2-0.55bit`). An 8-bit embedding makes the file smaller
still; most of what is left of it is that table."""


def check_out(out: Path) -> None:
    """Raise OSError unless the demonstration can write into a folder."""
    for name in ("demo.json", "figure2.png"):
        check_file(out / name)


def speak() -> None:
    """Let the trained model write, as soon as it and the kernels are there."""
    folder = ready()
    print(f"SmolLM2-135M in {BITS} bits a weight, trained, writes on this CPU:\n")
    print(f"    {PROMPT}", end="", flush=True)
    for piece in text_of(folder):
        print(piece.replace("\n", " "), end="", flush=True)
    print(" ...\n", flush=True)


def text_of(folder: Path) -> Iterator[str]:
    """What a model on disk writes after PROMPT, in pieces."""
    return stream(map_model(folder), PROMPT, NEW_TOKENS, **SAMPLING, tokenizer=Tokenizer(folder))


def ready() -> Path:
    """The trained model's folder, with the kernels compiled; the first time both take a while, side by side."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(first_token)]
        if not place(TRAINED).exists():
            jobs.append(pool.submit(fetch_apart))
        shown("getting ready", jobs)
    return fetch(TRAINED)


def first_token() -> None:
    """Compile or load the kernels, and run them once."""
    folder = Path(resolve(TINY))
    next(stream(map_model(folder), "a", 2, tokenizer=Tokenizer(folder)))


def fetch_apart() -> None:
    """Fetch the trained model in a process of its own, whose pip and transformers print nothing here."""
    command = [sys.executable, "-m", "littlebit.fast", "fetch", TRAINED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip().splitlines()[-1].removeprefix("littlebit: error: "))


def shown(what: str, jobs: list[Future[Any]]) -> None:
    """Wait for jobs, and show in one line for how long already."""
    with tqdm(desc=what, bar_format="{desc} (the first time takes a while): {elapsed}", leave=False) as bar:
        while wait(jobs, timeout=1).not_done:
            bar.refresh()
    for job in jobs:
        job.result()


def measure(out: Path) -> str:
    """Make the untrained model and one with an embedding of 8 bits, measure all from disk, and give the table as text.

    Leaves the models, demo.json and a picture in the folder.
    """
    from ..checkpoints.checkpoint import info
    from ..checkpoints.saving import check_target

    folders = {name: out / name for name in (UNTRAINED, SMALL)}
    for folder in folders.values():
        check_target(folder, overwrite=True)
    jobs = [
        ("original (Q4_1 GGUF)", MODEL, lambda: gguf_sizes(fetch(MODEL))),
        ("Dual-SVID, untrained", folders[UNTRAINED], lambda: info(folders[UNTRAINED])),
        ("trained", TRAINED, lambda: info(fetch(TRAINED))),
        ("trained, 8-bit embedding", folders[SMALL], lambda: info(folders[SMALL])),
    ]
    rows = []
    with tqdm(total=len(jobs) + 3, unit="step") as bar:

        def step(what: str, run: Any) -> Any:
            bar.set_description(what)
            try:
                return run()
            finally:
                bar.update()

        step("quantising", functools.partial(write_untrained, folders[UNTRAINED]))
        step("quantising the embedding", functools.partial(write_small, folders[SMALL]))
        for title, source, sizes in jobs:
            found = step(f"measuring: {title}", functools.partial(figures, source))
            rows.append({"title": title} | sizes() | found)
        picture = step("drawing", functools.partial(draw, folders[UNTRAINED], out / "figure2.png"))
    write_text(out / "demo.json", json.dumps(rows, indent=1) + "\n")
    samples = [f"{row['title']}:\n    {PROMPT}{row['text']}" for row in rows]
    return "\n".join([table(rows), "", NOTE, "", *samples, "", f"Picture: {picture}"])


def write_untrained(folder: Path) -> None:
    """Quantise the model by Dual-SVID and save it."""
    import torch

    from ..checkpoints.dense import load_model, load_tokenizer
    from ..checkpoints.saving import save
    from ..models.quantize import Config, quantize_

    model, threads = load_model(MODEL), torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as fast as two for matrices of this size, and a hundred times where others keep cores busy
    results = quantize_(model, Config(bits=BITS), progress=False)
    torch.set_num_threads(threads)
    save(model, folder, load_tokenizer(MODEL), BITS, results, overwrite=True)


def write_small(folder: Path) -> None:
    """Save the trained model with an embedding of 8 bits."""
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.saving import save
    from ..models.embeddings import quantize_embeddings_

    model = load(fetch(TRAINED))
    quantize_embeddings_(model, 8)
    save(model, folder, load_tokenizer(MODEL), BITS, overwrite=True)


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


def figures(source: str | Path) -> dict[str, Any]:
    """Perplexity, speed and a sample of a model that is loaded from disk.

    Speed is that of `littlebit generate`'s decoder: the median over the tokens of several rounds. `core_share` is the
    processor time of the thread that decodes over the time that passed: below one, other programs kept it waiting.
    """
    from ..checkpoints.dense import load_tokenizer
    from ..checkpoints.texts import text_tokens
    from ..evaluation.perplexity import SAMPLE_TEXT, perplexity

    folder = Path(resolve(source))
    text = "".join(text_of(folder)).replace("\n", " ")
    decoder = prefilled_decoder(folder, None, ROUNDS * TOKENS)
    start, begun = time.perf_counter(), time.thread_time()
    times = sorted(token_times(decoder, ROUNDS * TOKENS))
    share = (time.thread_time() - begun) / (time.perf_counter() - start)
    del decoder
    tokens = text_tokens(load_tokenizer(str(folder)), SAMPLE_TEXT)
    found = perplexity(loaded(folder), tokens, max_windows=WINDOWS, progress=False)
    speed = {"tokens_per_s": 1 / times[len(times) // 2], "core_share": share}
    return {"perplexity": found.perplexity, "scored": found.scored, "text": text} | speed


def loaded(folder: Path) -> Any:
    """A model, packed or dense."""
    from ..checkpoints.checkpoint import load
    from ..checkpoints.dense import load_model
    from ..checkpoints.format import is_checkpoint

    return load(folder) if is_checkpoint(folder) else load_model(folder)


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as text."""
    head = f"{'SmolLM2-135M-Instruct':<26}{'bits/weight':>12}{'linear bytes':>14}{'file bytes':>13}{'perplexity':>12}"
    lines = [head + f"{'tokens/s':>10}", "-" * (len(head) + 10)]
    for row in rows:
        lines.append(
            f"{row['title']:<26}{row['bits_per_weight']:>12.3f}{row['linear_bytes']:>14,}{row['file_bytes']:>13,}"
            f"{row['perplexity']:>12.4g}{row['tokens_per_s']:>10.1f}"
        )
    lines.append(
        "bits/weight and linear bytes: of the linear layers, as stored; file bytes: of all. Perplexity: the shipped\n"
        f"1901 text, {WINDOWS} windows of 2048 tokens, {rows[0]['scored']} tokens scored. tokens/s: one sequence\n"
        f"through the decoder of `littlebit generate`, median of {ROUNDS * TOKENS} tokens. The original is dequantised."
    )
    share = min(row["core_share"] for row in rows)
    if share < QUIET_SHARE:
        lines.append(
            f"The machine was too busy to measure speed: other programs left the decoder {share:.0%} of a core.\n"
            f"On a quiet one try `littlebit bench decode --model {TRAINED}`."
        )
    return "\n".join(lines)


def draw(folder: Path, path: Path) -> Path:
    """The paper's Figure 2: a weight matrix, its primary path, its residual and their sum, from the stored bits."""
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
    """||W - matrix||_F / ||W||_F."""
    return float((weight - matrix).norm() / weight.norm())
