"""Make the tables of the book's pages from results/*.json and published.json: `{{ table("shipped") }}`."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from sources import Table, as_published, fixed, number, publication, publications, results, row, rows

SMOLLM2, STORED = "training_smollm2", "stored_smollm2"

FIRST_LADDER = {  # what a row is called in the results, and on the page
    "base": "base",
    "latents 1e-3": "latents at `1e-3`",
    "latents 4e-3": "latents at `4e-3`",
    "hidden 0.1": "hidden states, normalised, weight 0.1 (part of the loss)",
    "4 sequences a step": "4 sequences a step, rates divided by `1.4`",
    "16 sequences a step": "16 sequences a step, rates times `1.4`",
    "two paths": "two paths",
    "dual-svid": "Dual-SVID in place of ADMM",
    "0.1 bits": "0.1 bits",
    "0.3 bits": "0.3 bits",
    "1.0 bits": "1.0 bits",
}
SECOND_LADDER = {
    "defaults": "these defaults",
    "sensitivity": "ranks by sensitivity",
    "blocks first": "a quarter of the tokens block by block first",
    "wikitext 0.9": "nine tenths WikiText-2",
    "sequence 2048, 2 a step": "2 sequences of 2048",
    "sequence 256, 16 a step": "16 sequences of 256",
    "two paths": "two paths",
    "half written by the teacher": "half of the text written by the teacher",
    "itq": "Joint-ITQ in place of ADMM",
    "1.0 bits, sequence 2048": "1.0 bits, 2 sequences of 2048",
    "1.0 bits, latents 1.2e-2, sequence 2048": "the same, latents at `1.2e-2`",
}
THIRD_LADDER = {  # by bits, what a row is called after its bits, and on the page
    1.0: {
        "base": "base",
        "latents of 0.3": "latents scaled to 0.3",
        "sensitivity within 1.5": "ranks by sensitivity, within a factor of 1.5",
        "labels 0.5": "labels, half",
        "muon, latents of 0.3, rate 1e-2": "Muon, latents scaled to 0.3, rate `1e-2`",
    },
    0.55: {
        "base": "base",
        "a quarter in 2048": "the last quarter in sequences of 2048",
        "latents of 0.3": "latents scaled to 0.3",
        "muon": "Muon at the base's rate",
        "muon, latents of 0.3, rate 1e-2": "Muon, latents scaled to 0.3, rate `1e-2`",
        "labels 0.2": "labels, a fifth",
        "labels 0.5": "labels, half",
        "sensitivity within 2": "ranks by sensitivity, within a factor of 2",
    },
    0.1: {
        "base": "base",
        "latents of 0.3": "latents scaled to 0.3",
        "muon": "Muon at the base's rate",
    },
}
RATIOS = {  # held-out texts by their name in the results, and on the page
    "wikitext2-train end": "WikiText-2",
    "encyclopedia, wikitext style": "its style",
    "encyclopedia": "encyclopedia",
    "books": "books",
    "explanatory": "explanatory",
    "dialogue": "dialogue",
}
TASKS = {  # zero-shot tasks by their name in the results, and on the page
    "winogrande": "WinoGrande",
    "hellaswag": "HellaSwag",
    "openbook_qa": "OpenBookQA",
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "arc_easy": "ARC-easy",
    "arc_challenge": "ARC-challenge",
}
TINY = {
    "base": "defaults (sequences of 128)",
    "smooth_sign": "SmoothSign",
    "sequence 256": "sequences of 256, half as many",
    "sequence 64": "sequences of 64, twice as many",
    "blocks first": "a quarter of the tokens block by block first",
    "sensitivity": "ranks by sensitivity",
    "importance": "importance weights in ADMM",
    "Joint-ITQ": "Joint-ITQ in place of ADMM",
    "embeddings too": "embeddings train too",
    "no norms": "norms do not train",
    "KL alone": "KL alone",
    "two paths": "two paths",
}


def scaled(each: dict[str, Any], key: str, unit: float) -> float | None:
    """Return a row's value in a unit, or None if the row lacks it."""
    return each[key] / unit if key in each else None


def thousands(value: float) -> str:
    """Round a speed to thousands."""
    return f"{round(value, -3):,.0f}"


def first_ladder() -> Table:
    """Show one change at a time, after few tokens."""
    lines = []
    for name, title in FIRST_LADDER.items():
        found = row(SMOLLM2, stage="first ladder", name=name)
        lines.append([title, number(found["loss"]), number(found["perplexity"]), thousands(found["tokens_per_s"])])
    return Table(["what", "last loss, nats", "WikiText-2 perplexity", "tokens a second"], lines, [SMOLLM2])


def second_ladder() -> Table:
    """Show one change at a time, from what the first ladder found."""
    keys = ("perplexity", "held_out_512", "held_out_2048")
    lines = []
    for name, title in SECOND_LADDER.items():
        found = row(SMOLLM2, stage="second ladder", name=name)
        lines.append([title, *(number(found[key]) for key in keys), thousands(found["tokens_per_s"])])
    head = ["what", "WikiText-2 test, 2048", "held-out, 512", "held-out, 2048", "tokens a second"]
    return Table(head, lines, [SMOLLM2])


def third_ladder() -> Table:
    """Show one change at a time, on varied text: perplexity over the original's."""
    lines = []
    for bits, names in THIRD_LADDER.items():
        for name, title in names.items():
            found = row(SMOLLM2, stage="third ladder", name=f"{bits} bits, {name}")
            ratios = [fixed(found["ratios"][text], 2) for text in RATIOS]
            lines.append([f"{bits:g}", title, *ratios, thousands(found["tokens_per_s"])])
    return Table(["bits", "what", *RATIOS.values(), "tokens a second"], lines, [SMOLLM2])


def fourth_ladder() -> Table:
    """Compare scales of 8 and 16 bits after 400 steps, at equal stored bits."""
    lines = []
    for bits in (0.1, 0.3):
        for scale_bits, more in ((16, ""), (8, ", 8-bit scales")):
            found = row(SMOLLM2, stage="fourth ladder", name=f"{bits} bits{more}")
            figures = (number(found[key]) for key in ("loss", "perplexity", "held_out_2048"))
            lines.append([f"{bits:g}", str(scale_bits), *figures])
    head = ["bits", "bits of a scale", "last loss, nats", "WikiText-2 test", "end of WikiText-2 train"]
    return Table(head, lines, [SMOLLM2])


def held_out() -> Table:
    """Show held-out perplexity over the original's for the checkpoints that were trained on varied text."""
    found = [each for each in checkpoints("shipped") if "ratios" in each]
    lines = [[title, *(fixed(each["ratios"][text], 2) for each in found)] for text, title in RATIOS.items()]
    lines.append(["WikiText-2 test", *(fixed(each["ratios"]["wikitext2-test"], 2) for each in found)])
    for positions in ("512 to 1024", "1024 to 1536", "1536 to 2048"):
        ratios = (fixed(each["ratios_by_position"][positions], 2) for each in found)
        lines.append([f"the same, positions {positions} of a window", *ratios])
    return Table(["text", *(f"{each['bits']:g} bits" for each in found)], lines, [SMOLLM2])


def tiny() -> Table:
    """Show the ladder of the tiny model."""
    lines = [[title, fixed(row("training_tiny", name=name)["perplexity_128"], 2)] for name, title in TINY.items()]
    return Table(["what", "perplexity of a byte"], lines, ["training_tiny"])


def checkpoints(stage: str) -> list[dict[str, Any]]:
    """List the trained checkpoints of a stage, from the most bits to the fewest."""
    return sorted(rows(SMOLLM2, stage=stage), key=lambda each: -each["bits"])


def shipped() -> Table:
    """Show the checkpoints that come with the package."""
    teacher = row(SMOLLM2, name="teacher")
    blimp = results(SMOLLM2)["blimp"]["teacher"]
    whole = [fixed(teacher["perplexity"]), fixed(teacher["validation"]), "", fixed(blimp, 3)]
    lines = [["original (Q4_1)", "", "", *whole]]
    for each in checkpoints("shipped"):
        stored = row(STORED, name=each["name"])["described_bits_per_weight"]
        tokens = f"{each['tokens'] / 1e6:.1f} M"
        scores = [fixed(each[key]) for key in ("perplexity_packed", "held_out_512", "held_out_2048")]
        scores.append(fixed(each["blimp"], 3) if "blimp" in each else "")
        lines.append([f"`{each['name']}`", fixed(stored, 3), tokens, *scores])
    head = ["", "bits, names and checksums included", "tokens", "WikiText-2 test, window 2048"]
    head += ["held-out, 512", "held-out, 2048", "BLiMP"]
    note = (
        "The name gives the ceiling for the layers alone. Embedding and head have 16 bits. "
        f"{wikitext_share()} of the training text is WikiText-2's train split or text in its style; held-out text is "
        "of that split too."
    )
    return Table(head, lines, [SMOLLM2, STORED], note)


def wikitext_share() -> str:
    """Say how much of the shipped checkpoints' training text is WikiText-2, or in its style."""
    shares = {f"{sum(each['weights'][: 2 if len(each['weights']) == 6 else 1]):.0%}" for each in checkpoints("shipped")}
    return " to ".join(sorted(shares))


def before() -> Table:
    """Compare training on sequences of 512 and of 1024 tokens."""
    lines = []
    second = checkpoints("earlier checkpoint, 1024 tokens")
    for old, new in zip(checkpoints("earlier checkpoint, 512 tokens"), second, strict=True):
        scores = (old["perplexity_packed"], new["perplexity_packed"], old["validation"], new["held_out_512"])
        lines.append([f"{old['bits']:g}", *map(fixed, scores)])
    head = ["bits", "test, from 512", "test, from 1024", "held-out in 512, from 512", "held-out in 512, from 1024"]
    return Table(head, lines, [SMOLLM2])


def early() -> Table:
    """Compare the earlier and the present recipe after four million tokens."""
    lines = []
    for new in sorted(rows(SMOLLM2, name="pilot, latents 0.008"), key=lambda each: -each["bits"]):
        old = row(SMOLLM2, stage="earlier pilot, 512 tokens", name="pilot 0.008", bits=new["bits"])
        lines.append([f"{new['bits']:g}", number(old["perplexity"]), number(new["perplexity"])])
    return Table(["bits", "512 tokens, equal ranks", "1024 tokens, ranks by sensitivity"], lines, [SMOLLM2])


def speed() -> Table:
    """Show training speed in tokens a second."""
    lines = []
    for each in rows("training_speed"):
        sequences = f"{each['tokens_a_step'] // each['sequence']} of {each['sequence']}"
        hidden = "yes" if each["hidden"] else "no"
        memory = fixed(each["memory_bytes"] / 2**30)
        lines.append([number(each["tokens_a_step"]), sequences, hidden, thousands(each["tokens_per_s"]), memory])
    head = ["tokens a step", "sequences", "hidden-state term", "tokens a second", "memory, GiB"]
    return Table(head, lines, ["training_speed"])


def processes() -> Table:
    """Compare the same training in one process and in several."""
    losses = results(SMOLLM2)["several_processes"]["losses"]
    lines = [[str(steps[0][0]), *(fixed(loss, 3) for _, loss in steps)] for steps in zip(*losses.values(), strict=True)]
    return Table(["step", "one process", "two (DDP)", "two, masters divided (FSDP2)"], lines, [SMOLLM2])


def authors() -> Table:
    """Show the authors' recipe, and the sketches that came before this project's trainer."""
    lines = [
        [each["name"], f"{each['stored_bits']:g}", number(each["perplexity"]), thousands(each["tokens_per_s"])]
        for each in rows("baselines", what="training")
    ]
    return Table(["recipe", "stored bits", "WikiText-2 perplexity", "tokens a second"], lines, ["baselines"])


def starts() -> Table:
    """Show the relative error of the weights by initialiser."""
    lines = []
    for bits in sorted({each["bits"] for each in rows("initialisation_smollm2")}):
        cells = [f"{bits:g}"]
        for paths in (1, 2):
            for init in ("dual-svid", "itq", "admm"):
                found = rows("initialisation_smollm2", bits=bits, init=init, paths=paths)
                cells.append(fixed(found[0]["error"], 3) if found else "")
        lines.append(cells)
    kinds = ("Dual-SVID", "Joint-ITQ", "ADMM")
    head = ["bits", *(f"{kind}, one path" for kind in kinds), *(f"{kind}, two" for kind in kinds)]
    return Table(head, lines, ["initialisation_smollm2"])


def shape_of(found: dict[str, Any]) -> str:
    """Format a layer's sizes."""
    return f"{found['d_out']} x {found['d_in']}"


PEERS = {"int8_us": "int8 dynamic", "int4_us": "int4 weight-only"}  # torch's own layers of fewer bits


def cpu_linear() -> Table:
    """Compare the packed layer with torch's layers on a CPU."""
    lines = []
    peers = {key: title for key, title in PEERS.items() if any(each.get(key) for each in rows("cpu_linear"))}
    for each in rows("cpu_linear"):
        rate = [fixed(each["sign_adds_per_s"] / 1e9), f"{100 * each['fraction_of_peak']:.0f}"]
        times = [fixed(each["time_us"] / 1000, 2), fixed(each["dense_us"] / 1000), fixed(each["speedup"], 0)]
        times += [fixed(each[key] / 1000) if each[key] else "" for key in peers]
        lines.append([shape_of(each), fixed(each["bits"], 3), *times, *rate])
    head = ["layer (d_out x d_in)", "stored bits", "packed, ms", "bfloat16, ms", "times faster"]
    head += [*(f"{title}, ms" for title in peers.values()), "billion sign additions a second", "% of lookups alone"]
    old = any("rotated_bytes" not in each for each in rows("cpu_linear"))
    note = "Copies of the packed layer rotated through 32 MiB, which the last cache of a server holds." if old else ""
    return Table(head, lines, ["cpu_linear"], note)


def cpu_linear_threads() -> Table:
    """Compare the packed layer on two threads with one."""
    lines = []
    for each in rows("cpu_linear_threads"):
        times = [fixed(each[name] / 1000, 2) for name in ("one_thread_us", "time_us")]
        factors = [fixed(each[name], 2) for name in ("times_one_thread", "times_one_thread_of_lookups", "speedup")]
        lines.append([shape_of(each), fixed(each["bits"], 3), *times, *factors])
    head = ["layer (d_out x d_in)", "stored bits", "one thread, ms", "two threads, ms", "times faster"]
    head += ["the same of lookups alone", "times bfloat16 on two threads"]
    return Table(head, lines, ["cpu_linear_threads"])


KERNELS = {
    "loops": "one sign, one addition",
    "bytes": "eight signs choose one of 256 partial sums, made once for all rows",
    "select": "sixteen signs are the mask of a vector addition",
    "nibbles": "four signs choose one of sixteen sums in a register; sixteen rows at once",
}


def cpu_ladder() -> Table:
    """Show the CPU kernels, from the simplest to the one in use."""
    found = rows("cpu_ladder")
    layers = list(dict.fromkeys((shape_of(each), each["bits"]) for each in found))
    lines = []
    for kernel, idea in KERNELS.items():
        cells = []
        for shape, bits in layers:
            (each,) = (one for one in rows("cpu_ladder", kernel=kernel, bits=bits) if shape_of(one) == shape)
            cells.append(fixed(each["sign_adds_per_s"] / 1e9))
        lines.append([f"`{kernel}`", idea, *cells])
    head = ["kernel", "idea", *(f"{shape}, {bits:.2f} bits" for shape, bits in layers)]
    return Table(head, lines, ["cpu_ladder"], "Billion sign additions a second.")


def cuda_linear() -> Table:
    """Compare the packed layer on a GPU with cuBLAS and with kernels of peers."""
    lines = []
    found = [each for each in rows("cuda_linear") if each.get("batch", 1) == 1]
    for each in sorted(found, key=lambda each: (each["d_out"] * each["d_in"], each["d_out"], each["bits"])):
        peer = [
            other
            for other in rows("baselines", engine="NanoQuant GEMV", d_out=each["d_out"], d_in=each["d_in"])
            if 0 <= other["bits"] - each["bits"] < 0.02
        ]
        cells = [shape_of(each), fixed(each["bits"], 3), fixed(each["time_us"]), fixed(each["dense_us"])]
        times = peer[0]["time_us"] if peer else None, each["gemlite_us"]
        cells += [fixed(each["speedup"]), *(fixed(time) if time else "" for time in times)]
        lines.append([*cells, fixed(100 * each["fraction_of_copy"])])
    head = ["layer (d_out x d_in)", "stored bits", "packed, µs", "cuBLAS, 16 bits, µs", "times faster"]
    head += ["NanoQuant's GEMV, µs", "gemlite, µs", "% of a copy's speed"]
    note = "gemlite's layer has a sign for each weight, that is one bit, whatever the bits of the row."
    return Table(head, lines, ["cuda_linear", "baselines"], note)


def cuda_batches() -> Table:
    """Show the packed layer's speed-up over cuBLAS, by batch size."""
    found = rows("cuda_batches")
    batches = sorted({each["batch"] for each in found})
    layers = sorted({(each["d_out"] * each["d_in"], each["d_out"], each["rank"], shape_of(each)) for each in found})
    lines = []
    for _, _, rank, shape in layers:
        cells = {each["batch"]: each for each in found if shape_of(each) == shape and each["rank"] == rank}
        bits = fixed(next(iter(cells.values()))["bits"], 2)
        lines.append([shape, bits, *(fixed(cells[batch]["speedup"]) if batch in cells else "" for batch in batches)])
    head = ["layer (d_out x d_in)", "stored bits", *map(str, batches)]
    return Table(head, lines, ["cuda_batches"])


CPU_ENGINES = {
    "littlebit": "littlebit, 0.55 bits",
    "transformers": "transformers, float32",
    "llama.cpp": "llama.cpp, Q4_1",
}


def cpu_decode() -> Table:
    """Compare decoding on a CPU, by engine and threads."""
    lines = []
    for each in rows("cpu_decode"):
        cells = [str(each["threads"]), fixed(each["time_ms"]), number(each["tokens_per_s"])]
        lines.append([CPU_ENGINES[each["engine"]], *cells, fixed(each["memory_bytes"] / 1e6, 0)])
    head = ["engine", "threads", "ms a token", "tokens a second", "memory of the process, MB"]
    return Table(head, lines, ["cpu_decode"])


def looping() -> Table:
    """Show how many answers to short questions repeat themselves, by model."""
    lines = []
    for name in dict.fromkeys(each["model"] for each in rows("looping")):
        greedy, sampled = (row("looping", model=name, decoding=how) for how in ("greedy", "sampled"))
        cells = [str(greedy["looping"]), fixed(greedy["mean_tokens"], 0), str(sampled["looping"])]
        lines.append([f"`{name}`", *cells, fixed(sampled["mean_tokens"], 0)])
    head = ["model", "greedy: loops", "mean tokens", "sampled: loops", "mean tokens"]
    return Table(head, lines, ["looping"])


SHAPE_INITS = {"dual-svid": "Dual-SVID", "admm": "ADMM"}


def cpu_decode_shape() -> Table:
    """Compare decoding a dense shape of 7 billion weights on a CPU, with random weights, by bits and threads."""
    lines = []
    for each in rows("cpu_decode_shape"):
        name = f"littlebit, {number(each['bits'])} bits" if each["engine"] == "littlebit" else each["engine"]
        speed = [number(each.get(key)) for key in ("tokens_per_s", "prefill_tokens_per_s")]
        sizes = [fixed(scaled(each, key, 1e6), 0) for key in ("packed_bytes", "memory_bytes")]
        lines.append([name, str(each["threads"]), *speed, *sizes])
    for each in rows("llama_cpp_large"):
        sizes = [fixed(scaled(each, key, 1e6), 0) for key in ("file_bytes", "memory_bytes")]
        lines.append([f"llama.cpp, {each['type']}", str(each["threads"]), number(each["tokens_per_s"]), "", *sizes])
    head = ["engine", "threads", "tokens a second", "prompt, tokens a second", "file, MB", "memory of the process, MB"]
    note = "Prompts have 512 tokens (llama.cpp: a sentence). Embedding and head have 4 bits."
    return Table(head, lines, ["cpu_decode_shape", "llama_cpp_large"], note)


def quantize_large() -> Table:
    """Show what quantizing a dense shape of 7 billion weights takes, by device and initialization."""
    lines = []
    for name, device in (("quantize_large_cpu", "two CPU cores"), ("quantize_large_gpu", "one GPU")):
        for each in rows(name):
            cells = [device, SHAPE_INITS[each["init"]], number(each["bits"]), str(each["blocks"])]
            sizes = [number(scaled(each, key, 1e9)) for key in ("dense_bytes", "peak_bytes", "gpu_bytes")]
            lines.append([*cells, fixed(each["seconds"], 0), *sizes])
    head = ["device", "by", "bits", "blocks", "seconds", "dense files, GB", "host memory, GB", "GPU memory, GB"]
    return Table(head, lines, ["quantize_large_cpu", "quantize_large_gpu"])


def training_large() -> Table:
    """Show the speed and the memory of training steps at a shape of 7 billion weights, by GPUs and sequences."""
    lines = []
    for each in rows("training_large"):
        memory = [number(scaled(each, key, 1e9)) for key in ("peak_bytes", "planned_bytes")]
        cells = [str(each[key]) for key in ("blocks", "gpus", "sequences")]
        speed = [fixed(each["tokens_per_s"], 0), fixed(100 * each["mfu"])]
        lines.append([*cells, *speed, *memory, each["beside"] or ""])
    head = [
        "blocks",
        "GPUs",
        "sequences on each",
        "tokens a second",
        "MFU, %",
        "memory, GB",
        "planned, GB",
        "beside it",
    ]
    return Table(head, lines, ["training_large"])


SERVERS = {
    "littlebit": "`littlebit serve`, 0.55 bits",
    "vllm plug-in": "vLLM with the plug-in, 0.55 bits, float32",
    "vllm": "vLLM, the original in bfloat16",
    "transformers": "`transformers serve`, the original in bfloat16",
    "transformers batching": "the same with `--continuous-batching`",
    "llama.cpp": "llama.cpp's server, Q4_1",
}


def serving() -> Table:
    """Compare servers of the OpenAI API on a CPU, by the number of clients."""
    lines = []
    for each in sorted(rows("serving"), key=lambda found: found["clients"]):
        cells = [fixed(each["requests_per_s"], 2), fixed(each["tokens_per_s"], 0)]
        for name in ("first_token", "latency"):
            cells += [fixed(each[f"{name}_p{percent}_s"], 2) for percent in (50, 99)]
        cells.append(fixed(each["memory_bytes"] / 1e6, 0))
        lines.append([str(each["clients"]), SERVERS[each["engine"]], *cells])
    head = ["clients", "server", "requests a second", "tokens a second", "first token, p50, s", "p99, s"]
    head += ["whole answer, p50, s", "p99, s", "memory, MB"]
    return Table(head, lines, ["serving"])


CUDA_MODELS = {  # of the files of decoding on a GPU
    "cuda_decode": "Llama-2-7B",
    "cuda_decode_70b": "Llama-2-70B",
    "cuda_decode_smollm2": "SmolLM2-135M",
}
CUDA_ENGINES = {
    "packed": "packed",
    "float16": "the same engine, float16",
    "transformers": "transformers, float16",
}


def cuda_decode() -> Table:
    """Compare decoding on a GPU, by model and engine."""
    lines = []
    for file, model in CUDA_MODELS.items():
        for each in rows(file):
            dense = [other["tokens_per_s"] for other in rows(file) if other["engine"] == "float16"]
            cells = [CUDA_ENGINES[each["engine"]], fixed(each["bits"], 2), fixed(each["time_ms"], 3)]
            cells += [number(each["tokens_per_s"]), fixed(each["tokens_per_s"] / dense[0]) if dense else ""]
            cells += [fixed(each["weights_bytes"] / 1e9, 2), fixed(100 * each["fraction_of_copy"])]
            lines.append([model, *cells])
    head = ["shape", "engine", "bits of the layers", "ms a token", "tokens a second", "times float16"]
    return Table([*head, "weights, GB", "% of a copy's speed"], lines, [*CUDA_MODELS])


def cuda_parts() -> Table:
    """Show where the time of a token goes on a GPU, in Llama-2-7B's shape."""
    found = [each for each in rows("cuda_decode") if "parts" in each]
    names = [part["part"] for part in found[0]["parts"]]
    steps = [{part["part"]: part["step_us"] for part in each["parts"]} for each in found]
    lines = [[name, *(fixed(step[name], 0) for step in steps)] for name in names]
    lines.append(["a step, in which kernels overlap", *(fixed(1e3 * each["time_ms"], 0) for each in found)])
    titles = [f"{each['bits']:.2g} bits, µs" if each["bits"] < 16 else "float16, µs" for each in found]
    return Table(["part", *titles], lines, ["cuda_decode"])


def embeddings() -> Table:
    """Show the perplexity that 8- and 4-bit embeddings cost."""
    texts = {"roosevelt_1901.txt": "the package's own text", "wikitext2-test.txt": "WikiText-2 test"}
    lines = []
    for model in ("smollm2", "smollm2-0.55bit"):
        for text, title in texts.items():
            cells = []
            for bits in (16, 8, 4):
                found = row("embeddings_smollm2", model=model, embedding_bits=bits)[text]
                cells.append(fixed(found["perplexity"], 2) + (f" ({100 * found['cost']:+.2f} %)" if bits < 16 else ""))
            lines.append([f"`{model}`", title, *cells])
    return Table(["model", "text", "16 bits", "8 bits", "4 bits"], lines, ["embeddings_smollm2"])


def cache() -> Table:
    """Show the latent cache's time and bytes on a CPU."""
    lines = []
    for file, name in (("cpu_cache_llama2", "Llama-2-7B"), ("cpu_cache_llama3", "Llama-3-8B")):
        found = rows(file)
        contexts = sorted({each["context"] for each in found})
        groups = dict.fromkeys((each["bits"], each["kind"]) for each in found)
        for bits, kind in groups:
            each = [row(file, bits=bits, kind=kind, context=context) for context in contexts]
            first = each[0]
            smaller = [number(round(first["bytes_per_token"])), fixed(first["reduction"])]
            lines.append([f"{name}, {bits:g} bits, {kind}", *smaller, *(fixed(one["speed"], 2) for one in each)])
    head = ["model and cache", "bytes a token", "times smaller", "speed at 1k tokens", "at 8k", "at 32k"]
    note = "Speed = time of torch's attention on float32 keys and values / time of the latent cache. Below 1 is slower."
    return Table(head, lines, ["cpu_cache_llama2", "cpu_cache_llama3"], note)


CACHES = {"full": "keys and values", "latent": "latents, float16", "latent-int8": "latents, 8 bits"}


def cuda_cache() -> Table:
    """Compare decoding on a GPU with the latent and with the full cache."""
    lines = []
    for each in rows("cuda_cache"):
        context, full = each["context"], row("cuda_cache", context=each["context"], kv_cache="full")
        (attention,) = (part["time_us"] for part in each["parts"] if part["part"] == "attention")
        cells = [CACHES[each["kv_cache"]], number(each["kv_bytes_per_token"])]
        cells += [fixed(full["kv_bytes_per_token"] / each["kv_bytes_per_token"])]
        cells += [fixed(each["kv_bytes_per_token"] * context / 1e9, 2), fixed(each["time_ms"], 2)]
        cells += [number(each["tokens_per_s"]), fixed(each["tokens_per_s"] / full["tokens_per_s"], 2)]
        lines.append([number(context), *cells, fixed(attention)])
    head = ["tokens in it", "the cache has", "bytes a token", "times smaller", "GB", "ms a token", "tokens a second"]
    return Table([*head, "speed", "attention of a layer, µs"], lines, ["cuda_cache"])


def peers(model: str = "Llama-2-7B") -> Table:
    """List published perplexities at the bits that methods really store."""
    found: dict[tuple[str, float], tuple[float, dict]] = {}
    for each in publications():
        if each["model"] == model and each["metric"] == "wikitext2_ppl" and each["table"].startswith("NanoQuant"):
            found.setdefault((each["method"], each["bpw"]), (each["value"], each))
    lines = []
    for (method, bits), (value, each) in sorted(found.items(), key=lambda item: -item[0][1]):
        sizes = [publication(metric, model, method, bits) for metric in ("size_GB", "data_tokens", "gpu_hours")]
        size, tokens, hours = (each["value"] if each else None for each in sizes)
        millions = fixed(tokens / 1e6, 2) if tokens else ""
        cells = [f"{bits:g}", as_published(value), number(size, None), millions, number(hours, None)]
        lines.append([method, *cells, each["table"].removeprefix("NanoQuant ")])
    head = [
        "method",
        "bits per weight, all counted",
        "WikiText-2 perplexity",
        "file, GB",
        "tokens, millions",
        "GPU hours",
    ]
    return Table([*head, "table there"], lines, ["published"], "NanoQuant, arXiv 2602.06694v3.")


def littlebit_at(bits: float = 0.1) -> Table:
    """List the paper's perplexities at one budget, model by model."""
    lines: list[Sequence[str]] = []
    for each in publications():
        if (each["method"], each.get("bpw"), each["table"]) == ("LittleBit", bits, "LittleBit T1"):
            lines.append([each["model"], as_published(each["value"]), each["status"]])
    return Table(["model", f"published perplexity at {bits:g} bits", "read"], lines, ["published"])


def inits_published() -> Table:
    """Compare initialisers in NanoQuant's pipeline."""
    lines = []
    for each in publications():
        if each["table"] == "NanoQuant T5" and each["metric"] == "wikitext2_ppl":
            lines.append([each["method"].split("init=")[1], f"{each['bpw']:g}", as_published(each["value"])])
    return Table(
        ["initialiser", "bits", "WikiText-2 perplexity, Rnj-1-8B"], lines, ["published"], "NanoQuant, Table 5."
    )


STARTS = {"random": "random", "dual-svid": "Dual-SVID", "admm": "ADMM"}
RULES = {"straight_through": "straight-through", "smooth_sign": "SmoothSign"}


def latent_starts() -> Table:
    """How far a small network comes from three starts, under both rules."""
    lines = []
    for init, name in STARTS.items():
        found = [row("latents", name=f"{init}, {rule}, eps 1e-08") for rule in RULES]
        lines.append([name, number(found[0]["kl_start"]), *(number(each["kl_end"]) for each in found)])
    head = ["latents from", "KL before training", *(f"after it, {name}" for name in RULES.values())]
    return Table(head, lines, ("latents",), "Nats per character of held-out text; one run each.")


def latent_reach() -> Table:
    """How far latents move under Adam, by the size that they start with, for three values of its eps."""
    epsilons = ("0.0001", "1e-08", "1e-14")
    chosen = [row("latents", name=f"dual-svid, smooth_sign, eps {eps}") for eps in epsilons]
    lines = []
    for bins in zip(*(each["latents"] for each in chosen), strict=True):
        low, high = bins[0]["from"], bins[0]["to"]
        sizes = f"{low:g} to {high:g}" if high else f"above {low:g}"
        cells = [f"{each['median_move']:.4f}, {each['flipped']:.0%}" for each in bins]
        lines.append([sizes, f"{bins[0]['share']:.0%}", *cells])
    head = ["size at the start", "share of latents", *(f"eps {eps}" for eps in epsilons)]
    note = "Median movement of a latent, and share of signs flipped; Dual-SVID, SmoothSign, first layer."
    return Table(head, lines, ("latents",), note)


SPEEDS = ("tokens_per_processor_s", "tokens_per_s")


def browser() -> Table:
    """Speed of the model that writes in the browser, and its agreement with the package."""
    found = results("browser")["rows"]
    lines = [
        [each["name"], *(number(each[key]) for key in SPEEDS), f"{each['same_texts']} of {each['prompts']}"]
        for each in found
    ]
    note = f"{found[0]['browser']}, headless, on two cores."
    head = [
        "model",
        "tokens/s of processor time",
        "tokens/s on the clock",
        f"texts of {found[0]['tokens']} greedy tokens that are the package's",
    ]
    return Table(head, lines, ("browser",), note)


NOMINAL = (  # method, width in its title, row of NanoQuant's recount, perplexity as LittleBit's paper has it
    ("LittleBit", "0.55", ("LittleBit", 0.55)),
    ("STBLLM 4:8", "0.55", ("STBLLM 4:8", 3.5)),
    ("STBLLM 6:8", "0.8", ("STBLLM 6:8", 4.0)),
    ("BiLLM", "1.08", ("BiLLM", 2.88)),
    ("ARB-LLM", "1.11", ("ARB-LLM_RC", 2.51)),
    ("HBLLM", "1.08", ("HBLLM_R", 3.25)),
    ("OneBit", "1", ("OneBit", 1.04)),
)


def nominal() -> Table:
    """Join the widths that titles name to what the files store, on Llama-2-7B."""
    lines = []
    for name, width, (method, bits) in NOMINAL:
        found = publication("wikitext2_ppl", "Llama-2-7B", method, bits)
        assert found is not None, method
        lines.append([name, width, number(found["bpw"]), as_published(found["value"])])
    head = ["method", "bits in its title", "bits stored", "WikiText-2 perplexity, Llama-2-7B"]
    note = (
        "Stored bits and perplexities as NanoQuant's paper recounts and repeats them. For STBLLM 4:8 LittleBit's paper "
        f"has {as_published(publication('wikitext2_ppl', 'Llama-2-7B', 'STBLLM (nominal bits)', 0.55)['value'])}."
    )
    return Table(head, lines, ("published",), note)


def spread() -> Table:
    """Errors of Dual-SVID on a matrix of rank 8, with its own axes and after a rotation."""
    found = rows("rotation")
    head = ["error with this many columns of signs", *(str(each["rank"]) for each in found)]
    lines = [
        [f"{name}{', scales refitted' if ending else ''}", *(number(each[key + ending]) for each in found)]
        for ending in ("", "_refitted")
        for key, name in (("own_axes", "own axes"), ("random_rotation", "random rotation"))
    ]
    return Table(head, lines, ("rotation",), "A 256 x 256 matrix; the mean of five.")


RECORDS = {  # what changed, by the name of a run in speedrun.json
    "paper": "the paper's recipe: Dual-SVID, two paths, SmoothSign, hidden states with weight 10",
    "defaults": "ADMM, one path, straight-through, hidden states normalised, weight 0.1",
    "Muon": "latents scaled to 0.3, Muon at `7e-3`",
}
GPU_RECORDS = {  # the same for trainings of at most ten minutes in training_smollm2.json, by stage
    "earlier checkpoint, 1024 tokens": "ADMM, one path, straight-through, Adam at `6e-3`; two texts",
    "shipped": "six texts, ranks by sensitivity, labels at a half, latents scaled to 0.3, Muon at `7e-3`",
}


def runs(model: str) -> list[dict[str, Any]]:
    """List the runs of the speedrun in a model's full time, best last."""
    found = rows("speedrun", model=model)
    full = max((each["budget_s"] for each in found), default=0)
    return sorted((each for each in found if each["budget_s"] == full), key=lambda each: -each["perplexity"])


def speedrun() -> Table:
    """Show the runs of the tiny model in two minutes of one core, best last."""
    lines = []
    for each in runs("tiny"):
        cells = [RECORDS.get(each["name"], each["name"]), fixed(each["spent_s"], 0), fixed(each["bits"], 2)]
        lines.append([*cells, thousands(each["tokens"]), fixed(each["perplexity"], 2)])
    head = ["what the run does", "seconds", "stored bits", "bytes read", "perplexity of a byte"]
    return Table(head, lines, ["speedrun"])


def speedrun_gpu() -> Table:
    """Show trainings of SmolLM2 at 0.55 bits that took at most ten minutes of one GPU, best last."""
    lines = [["the speedrun's script", "not run yet", "", ""]]
    if found := runs("smollm2"):
        lines = [
            [each["name"], fixed(each["spent_s"], 0), fixed(each["tokens"] / 1e6), number(each["perplexity"])]
            for each in found
        ]
    for stage, what in GPU_RECORDS.items():
        each = row(SMOLLM2, stage=stage, bits=0.55)
        cells = [fixed(each["training_s"], 0), fixed(each["tokens"] / 1e6), number(each["perplexity"])]
        lines.append([f"{what} (training of a checkpoint)", *cells])
    head = ["what the run does", "seconds", "million tokens", "WikiText-2 perplexity"]
    start = row(SMOLLM2, stage="shipped", bits=0.55)["initialisation_s"]
    note = f"Seconds of the checkpoints are of training alone; the initialisation of the last took {start:.0f} more."
    return Table(head, lines, [SMOLLM2], note)


def equal_bytes() -> Table:
    """Compare the students with llama.cpp's quantizations by the size of their files, from the smallest."""
    lines = []
    for each in sorted(rows("equal_bytes"), key=lambda each: each["bytes"]):
        if each["method"] == "littlebit":
            bits = float(each["name"].removeprefix("smollm2-").removesuffix("bit"))
            name = f"littlebit, {bits} bits, {each['embedding_bits']}-bit embedding"
        elif each["method"] == "original":
            name = "the original, as published (Q4_1)"
        else:
            name = f"llama.cpp {each['name']}" + (", importance matrix" if each["importance_matrix"] else "")
        cells = fixed(each["bytes"] / 1e6), fixed(each["perplexity"]), number(each["kl"])
        lines.append([name, *cells, fixed(100 * each["same_top"]), fixed(100 * each["blimp"])])
    first = row("equal_bytes", method="original")
    error = 100 * (first["blimp"] * (1 - first["blimp"]) / first["blimp_pairs"]) ** 0.5
    note = (
        f"{first['windows']} windows of {first['window']} tokens of WikiText-2 test; {first['blimp_pairs']} pairs of "
        f"BLiMP, whose standard error is about {error:.0f} points."
    )
    head = ["files", "MB", "perplexity", "KL, nats a token", "same first choice, %", "BLiMP, %"]
    return Table(head, lines, ["equal_bytes"], note)


def zero_shot() -> Table:
    """Show the accuracy on each zero-shot task with its standard error, in percent."""
    students = [name for name in dict.fromkeys(each["model"] for each in rows("zero_shot")) if name != "smollm2"]
    names = ["smollm2", *sorted(students, key=lambda name: float(name[8:-3]), reverse=True)]
    tasks = [each for each in rows("zero_shot", model=names[0]) if each["task"] != "blimp"]
    lines = []
    for task in tasks:
        cells = []
        for name in names:
            found = row("zero_shot", model=name, task=task["task"])
            cells.append(f"{100 * found['acc']:.1f} ± {100 * found['acc_stderr']:.1f}")
        lines.append([TASKS[task["task"]], f"{task['items']:,}", fixed(100 * task["chance"]), *cells])
    means = [fixed(100 * zero_shot_mean(name)) for name in names]
    lines.append(["**mean of seven**", "", fixed(100 * sum(each["chance"] for each in tasks) / len(tasks)), *means])
    head = ["task", "items", "chance", "original", *(f"{float(name[8:-3])} bits" for name in names[1:])]
    return Table(head, lines, ["zero_shot"], "Accuracy in % (`acc`), with its standard error.")


def zero_shot_mean(model: str) -> float:
    """Average a model's accuracy over the tasks."""
    return fmean(each["acc"] for each in rows("zero_shot", model=model) if each["task"] != "blimp")
