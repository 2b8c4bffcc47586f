"""Fuzz the checkpoint readers: a mutated checkpoint must load with every bit unchanged, or be refused.

Run `make fuzz BUDGET=seconds`. A case is a small checkpoint (see `seeds`) after a few mutations: flip a bit, edit the
JSON of a config or a header, cut a file, link it elsewhere, or change tensors and recompute the checksums as an
attacker would (`seal`). `info`, `verify`, `load` and the torch-free decoder may raise CheckpointError. Otherwise they
must give exactly what was saved, unless the case was sealed. Anything else is a finding: another exception, a crash,
more than SECONDS of processor time or MEMORY. Half of the budget goes to mutations drawn at random, half to mutations
that atheris draws, guided by the code's branches.
"""

import argparse
import contextlib
import importlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "fuzz"
MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None
SECONDS = 10  # of processor time for one case; four times that by the clock
MEMORY = 256 << 20  # bytes that a case may add to what the process holds
ADDRESSES = 4 << 30  # bytes of address space beyond those in use at the start
WEIGHTS, INDEX, NOTE = "model.safetensors", "model.safetensors.index.json", "littlebit_config.json"
# The modules that read checkpoints, whose branches guide atheris
READING = ("packing", "files.digests", "files.untrusted", "models.build", "models.embeddings", "models.layers")
READING += (
    "models.quantize",
    "checkpoints.checkpoint",
    "checkpoints.checksums",
    "checkpoints.loading",
    "checkpoints.format",
)
READING += ("checkpoints.official", "checkpoints.dense", "checkpoints.dense_files", "decoding.mapped_weights")
SMALL = (0, 1, -1, 2, 3, 31, 33, 127, 255, 65536)
LARGE = (2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1, 10**30)
INTEGERS = SMALL + LARGE
TEXTS = ("", "x", "../x", "/etc/passwd", "\udc80", "\0", "F64", "BF16", "I32", "U64", "F8_E4M3", "C64", "llama", "gpt2")
OTHERS = (0.5, -1e308, 1e999, float("nan"), None, True, False, [], {}, [0], [-1, 1], [2**40, 2**40], {"a": 1})
VALUES = INTEGERS + TEXTS + OTHERS


class HangError(BaseException):  # a BaseException, so that no `except Exception` catches it
    """Report a case that takes too long."""


class FindingError(AssertionError):
    """Report a case whose outcome is not allowed."""


class Random:
    """Draw numbers from a seed; both fuzzers draw through these two methods."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def choice(self, values):
        return values[self.integer(0, len(values) - 1)]


class Guided(Random):
    """Draw numbers from the bytes that atheris gives."""

    def __init__(self, data):
        import atheris

        self.data = atheris.FuzzedDataProvider(data)

    def integer(self, low, high):
        return self.data.ConsumeIntInRange(low, high)


# --- the checkpoints that are mutated


KINDS = {"whole": "llama", "tables": "llama", "shards": "llama", "gpt2": "gpt2", "fused": "phi3"}


def tiny_model(kind):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **sizes)
    else:
        make = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}[kind]
        sizes |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = make(num_key_value_heads=1, tie_word_embeddings=kind == "llama", **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seeds():
    """Make a small checkpoint of each kind, as {kind: {file name: bytes}}."""
    import littlebit.fast as lb
    from littlebit.fast.models.embeddings import quantize_embeddings_

    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, family in KINDS.items():
            model = tiny_model(family)
            lb.quantize_(model, lb.Config(bits=5, split_fused=kind == "fused"), progress=False)
            if kind == "tables":
                quantize_embeddings_(model, 4)
            path = lb.save(model, Path(folder) / kind, bits=5, shard_bytes=5000 if kind == "shards" else 10**9)
            made[kind] = {file.name: file.read_bytes() for file in path.iterdir() if "generation" not in file.name}
        made["old"] = dict(made["whole"])
        config = json.loads(made["old"]["config.json"])
        config["quantization_config"]["format_version"] = 1
        made["old"]["config.json"] = json.dumps(config).encode()
        edit_header(made["old"], WEIGHTS, lambda header: header["__metadata__"].pop("checksums"))
        model = tiny_model("llama")
        lb.quantize_(model, lb.Config(bits=5), progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the authors' loader takes other ranks
            path = lb.save_official(model, Path(folder) / "official", bits=5)
        made["official"] = {file.name: file.read_bytes() for file in path.iterdir()}
        made["latent"] = latents(made["official"])
    return made


def latents(files):
    """Turn an official checkpoint into the unpacked variant."""
    import torch
    from safetensors.torch import load, save

    tensors = load(files[WEIGHTS])
    for name in [name for name in tensors if name.endswith("_packed")]:
        del tensors[name]
        shape = tensors.pop(name.replace("_packed", "_shape")).tolist()
        tensors[name.removesuffix("_packed")] = torch.randn(shape)
    return files | {WEIGHTS: save(tensors)}


# --- mutations


def split_header(data):
    """Split a safetensors file into its header and its tensors; raise ValueError if the header is not JSON."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, rest):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + rest


def edit_header(files, name, edit):
    header, rest = split_header(files[name])
    edit(header)
    files[name] = joined(header, rest)


def some_file(files, draw, suffix=""):
    names = sorted(name for name, data in files.items() if isinstance(data, bytes) and name.endswith(suffix))
    return draw.choice(names) if names else None


def position(data, draw):
    return draw.integer(0, max(0, len(data) - 1))


def flip_bit(files, draw):
    if (name := some_file(files, draw)) and files[name]:
        data = bytearray(files[name])
        data[position(data, draw)] ^= 1 << draw.integer(0, 7)
        files[name] = bytes(data)


def write_integer(files, draw):
    if name := some_file(files, draw):
        at = draw.choice((0, position(files[name], draw)))
        size = draw.choice((1, 2, 4, 8))
        value = (draw.choice(INTEGERS) % (1 << 8 * size)).to_bytes(size, "little")
        files[name] = files[name][:at] + value + files[name][at + size :]


def cut(files, draw):
    if name := some_file(files, draw):
        files[name] = files[name][: position(files[name], draw)]


def splice(files, draw):
    """Repeat, remove or move a part of a file."""
    if name := some_file(files, draw):
        data = files[name]
        at, length, to = position(data, draw), draw.integer(0, 64), position(data, draw)
        piece = data[at : at + length] * draw.choice((1, 1, 2, 50))
        rest = data if draw.integer(0, 1) else data[:at] + data[at + length :]
        files[name] = rest[:to] + piece + rest[to:]


def places(value, found=None):
    """List every (container, key) in a JSON value."""
    found = [] if found is None else found
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(child, dict | list):
            places(child, found)
    return found


def edit_json(value, draw):
    """Change one place in a JSON value."""
    found = places(value)
    if not found:
        return
    container, key = draw.choice(found)
    old, how = container[key], draw.integer(0, 7)
    if how == 0:
        del container[key]
    elif how == 1 and isinstance(container, dict):
        container[draw.choice(("", "x", key + "x", *map(str, container)))] = container.pop(key)
    elif how == 2:
        container[key] = draw.choice(found)[0]
        with contextlib.suppress(ValueError, RecursionError):
            container[key] = json.loads(json.dumps(container[key]))
            return
        container[key] = old  # A value must not contain itself.
    elif how == 3 and isinstance(old, int):
        container[key] = old + draw.choice((-1, 1, old, -2 * old, 32))
    elif how == 4 and isinstance(old, str) and old:
        at = position(old, draw)
        container[key] = old[:at] + chr(draw.integer(32, 126)) + old[at + 1 :]
    elif how == 5:
        container[key] = nested(draw.choice((3, 200, 900)))
    else:
        container[key] = draw.choice(VALUES)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def edit_settings(files, draw):
    if name := some_file(files, draw, ".json"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(files[name])
            edit_json(value, draw) if isinstance(value, dict | list) else None
            files[name] = json.dumps(value).encode("utf-8", "surrogatepass")


def edit_tensors(files, draw):
    """Edit the header of a safetensors file."""
    if name := some_file(files, draw, ".safetensors"):
        with contextlib.suppress(ValueError, RecursionError):
            edit_header(files, name, lambda header: edit_json(header, draw))


def move_file(files, draw):
    """Remove a file, or replace it by a folder, a pipe, a link or another file."""
    if name := some_file(files, draw):
        how = draw.choice(("gone", "empty", "folder", "pipe", "link", "inside", "swap"))
        data = files.pop(name)
        other = some_file(files, draw)
        if how == "empty":
            files[name] = b""
        elif how == "swap" and other:
            files[name], files[other] = files[other], data
        elif how == "inside":
            files |= {"another": data, name: ("link", "another")}
        elif how == "link":
            files[name] = ("link", draw.choice(("/etc/passwd", "/dev/zero", "..", name, "/proc/self/mem", "nowhere")))
        elif how in ("folder", "pipe"):
            files[name] = (how, "")


def seal(files, draw):
    """Change a tensor or the settings, and recompute the checksums, as an attacker would."""
    import torch
    from safetensors.torch import load, save

    name = some_file(files, draw, ".safetensors")
    try:
        tensors = load(files[name])
        key = draw.choice(sorted(tensors))
        tensor, how = tensors[key], draw.integer(0, 6)
        if how == 0:
            tensors[key] = tensor[: draw.integer(0, len(tensor))].clone()
        elif how == 1:
            tensors[key] = tensor.to(draw.choice((torch.float32, torch.float64, torch.int32, torch.uint8, torch.bool)))
        elif how == 2:
            tensors[key] = torch.full_like(tensor, draw.choice((0, 1, 127)))
        elif how == 3:
            bits = tensor.clone().view(-1).view(torch.uint8)
            bits[position(bits, draw)] ^= 1 << draw.integer(0, 7)
            tensors[key] = bits.view(tensor.dtype).view(tensor.shape)
        elif how == 4:
            tensors[draw.choice((key + "x", "lm_head.weight", draw.choice(sorted(tensors))))] = tensors.pop(key)
        elif how == 5:
            tensors[key] = tensor.reshape(draw.choice(((-1,), (1, -1), (*tensor.shape, 1), tensor.shape[::-1])))
        edit_settings(files, draw) if draw.integer(0, 1) else None
        from littlebit.fast.checkpoints.checksums import make_checksums
        from littlebit.fast.checkpoints.saving import tensor_digests

        files[name] = save({key: each.contiguous() for key, each in tensors.items()}, {"format": "pt"})
        shards = {shard: load(data) for shard, data in files.items() if shard.endswith(".safetensors")}
        checksums = make_checksums([*map(tensor_digests, shards.values())], json.loads(files["config.json"]))
        files |= {shard: save(shards[shard], own) for shard, own in zip(shards, checksums, strict=True)}
    except Exception:  # Earlier mutations left a file that cannot be parsed.
        return


MUTATIONS = (flip_bit, write_integer, cut, splice, edit_settings, edit_settings, edit_tensors, edit_tensors)
MUTATIONS += (move_file, seal, seal)


def mutated(seeds, draw):
    """Draw a case: the kind of its checkpoint, its files, and whether they were sealed."""
    kind = draw.choice(sorted(seeds))
    files, used = dict(seeds[kind]), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        used.append(draw.choice(MUTATIONS))
        used[-1](files, draw)
    return kind, files, seal in used


# --- what a case is allowed to do


def write(files, folder):
    """Write a case into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        if isinstance(data, bytes):
            (folder / name).write_bytes(data)
        elif data[0] == "link":
            (folder / name).symlink_to(data[1])
        elif data[0] == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).mkdir()


def state(model):
    """Collect all tensors of a model as bytes, to compare them."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.numpy(force=True).tobytes())
        for name, tensor in (*model.state_dict().items(), *model.named_buffers())
    }


def held(key):
    """Read this process's memory in bytes: VmRSS (resident), VmHWM (its peak) or VmSize (address space)."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


@contextlib.contextmanager
def guarded():
    """Raise an error if the block takes too long or too much memory."""

    def too_long(*_):
        raise HangError

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = held("VmRSS")
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (grown := held("VmHWM") - before) > MEMORY:
        raise FindingError(f"memory grew by {grown:,} bytes")


class Judge:
    """Read cases, and compare them with the checkpoints before their mutation."""

    def __init__(self, seeds, folder):
        import littlebit.fast as lb
        import torch
        from littlebit.fast.decoding.architecture import NotDecodableError
        from littlebit.fast.decoding.cpu_decoder import decode
        from littlebit.fast.decoding.mapped_weights import map_model

        self.map, self.decode, self.not_decodable = map_model, decode, NotDecodableError
        self.config = lb.GenerationConfig(2, temperature=0, repetition_penalty=1)
        torch.set_num_threads(1)
        self.lb, self.folder, self.tokens = lb, folder, torch.tensor([[1, 5, 9]])
        self.expected, self.texts = {}, {}
        for kind, files in seeds.items():
            write(files, folder)
            model = lb.load(folder)
            self.expected[kind] = state(model)
            model(self.tokens)  # loads the kernels
            with contextlib.suppress(NotDecodableError):
                self.texts[kind] = list(decode(map_model(folder), [1, 5, 9], self.config))

    def case(self, kind, files, sealed):
        """Return "refused" or "loaded" for a case; raise an error for any other outcome."""
        write(files, self.folder)
        outcome = []
        with guarded():
            for read in (self.lb.info, self.lb.verify, self.lb.load, self.map):
                try:
                    outcome.append(read(self.folder))
                except (self.lb.CheckpointError, self.not_decodable):
                    outcome.append(None)
            _, checked, model, mapped = outcome
            if mapped is not None:  # The torch-free decoder reads only the files that it needs.
                text = list(self.decode(mapped, [1, 5, 9], self.config))
                if not sealed and checked and checked["checksums"] and text != self.texts[kind]:
                    raise FindingError("the decoder maps a checkpoint that differs from what was saved")
            if model is None:
                return "refused"
            if checked is None or checked["damaged"]:
                raise FindingError("load accepts a checkpoint that verify finds damaged")
            if not sealed and checked["checksums"] and state(model) != self.expected[kind]:
                raise FindingError("load gives something else than was saved")
            with contextlib.suppress(Exception):  # Nonsensical settings may raise here, but must not crash.
                model(self.tokens)
        return "loaded, sealed" if sealed else "loaded"


class Tally:
    """Count outcomes, and keep the first case of each finding."""

    def __init__(self, judge, seeds, name):
        self.judge, self.seeds, self.name = judge, seeds, name
        self.counts, self.findings = Counter(), {}

    def run(self, draw, label):
        kind, files, sealed = mutated(self.seeds, draw)
        try:
            self.counts[self.judge.case(kind, files, sealed)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.counts["findings"] += 1
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "littlebit" in frame.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            key = f"{type(error).__name__} at {place}"
            if key not in self.findings:
                self.findings[key] = f"{label}, {kind}: {str(error)[:300]}"
                kept = OUT / "findings" / f"{self.name}-{len(self.findings)}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                write(files, kept)
                (kept.parent / f"{kept.name}.txt").write_text("".join(traceback.format_exception(error)))
                print(f"finding: {key} ({self.findings[key]}); its files are in {kept}", flush=True)

    @property
    def cases(self):
        return sum(self.counts.values())

    def report(self, **more):
        (OUT / f"{self.name}.json").write_text(
            json.dumps({"cases": self.cases, "outcomes": self.counts, "findings": self.findings} | more)
        )


def limited():
    """Limit the address space to ADDRESSES bytes more than now, and silence the log."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + ADDRESSES,) * 2)


def at_random(budget, seed, most):
    """Run cases drawn at random until the budget is spent."""
    made = seeds()
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as folder:
        tally = Tally(Judge(made, Path(folder) / "case"), made, f"random-{seed}")
        limited()
        end = time.monotonic() + budget
        while time.monotonic() < end and tally.cases < most:
            label = f"{seed}/{tally.cases}"
            (OUT / f"{tally.name}.last").write_text(label)  # names the case if the process dies
            tally.run(Random(label), label)
        tally.report()


def guided(budget, seed, most):
    """Run cases that atheris draws, guided by the branches that earlier cases reached."""
    import atheris

    fast = ROOT / "fast"
    modules = {".".join(path.relative_to(fast).with_suffix("").parts) for path in fast.rglob("*.py")}
    others = [f"littlebit.fast.{name}" for name in modules - set(READING)]
    with atheris.instrument_imports(include=["littlebit"], exclude=others):
        for name in READING:
            importlib.import_module(f"littlebit.fast.{name}")
    made = seeds()
    folder = tempfile.mkdtemp(dir=MEMORY_DISK)
    tally = Tally(Judge(made, Path(folder) / "case"), made, f"guided-{seed}")
    limited()

    def one(data):
        tally.run(Guided(data), f"{len(data)} bytes")
        if tally.cases % 100 == 0 or tally.cases >= most - 1:
            tally.report()

    corpus = OUT / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={int(budget)}", f"-runs={most}", f"-seed={seed + 1}", "-rss_limit_mb=0"]
    options += ["-max_len=400", "-len_control=0", "-verbosity=0", f"-artifact_prefix={OUT}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def child(how, budget, seed, most):
    """Start a process that fuzzes in one of the two ways."""
    options = {"--how": how, "--budget": budget, "--seed": seed, "--most": most}
    command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="seconds in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=10**9, help="most cases of each fuzzer")
    parser.add_argument("--how", choices=["both", "random", "guided"], default="both")
    parser.add_argument("--save", action="store_true", help="record this run in book/results/reliability.json")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if arguments.how != "both":
        {"random": at_random, "guided": guided}[arguments.how](arguments.budget, arguments.seed, arguments.most)
        return
    found = {}
    for how in ("random", "guided"):
        (OUT / f"{how}-{arguments.seed}.json").unlink(missing_ok=True)
        process = child(how, arguments.budget / 2, arguments.seed, arguments.most)
        code = process.wait()
        report = OUT / f"{how}-{arguments.seed}.json"
        if code or not report.exists():
            sys.exit(f"the {how} fuzzer ended with {code}: a crash is a finding; see {OUT}")
        found[how] = json.loads(report.read_text())
        print(f"{how}: {found[how]['cases']:,} cases, {dict(found[how]['outcomes'])}", flush=True)
    if arguments.save:
        from record import record

        limits = {"seeds": [arguments.seed], "limit_s": SECONDS, "limit_bytes": MEMORY}
        record(
            "fuzz",
            *({"drawn": how, "cases": each["cases"], **each["outcomes"]} | limits for how, each in found.items()),
        )
    findings = [each for report in found.values() for each in report["findings"]]
    if findings:
        sys.exit(f"{len(findings)} findings: {'; '.join(findings)}")


if __name__ == "__main__":
    main()
