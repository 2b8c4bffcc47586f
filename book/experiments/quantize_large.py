"""Measure the quantization of dense models of a published shape: time, host and GPU memory, and going on after a kill.

    python book/experiments/quantize_large.py OUT.json --shape llama2-7b --blocks 1 2 3 [--init admm] [--device cuda]

For each number of blocks, `dense_model.py` writes a model in a folder of its own, which is deleted afterwards.
Embedding and head are complete, so what one block adds is the difference of two rows. Each quantization is the command
`littlebit quantize` in a new process, with one path and ADMM or Dual-SVID at `--bits`.

With --kill the command is also killed with SIGKILL once half of its layers are finished, and run again. The row then
says how many layers were kept, how long the second run took, and whether it wrote the same bytes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from littlebit.fast.bench.decode import memory_bytes
from littlebit.fast.bench.timing import cpu_name, save_results
from littlebit.fast.cli.main import main as littlebit
from littlebit.fast.files.digests import file_digest
from littlebit.fast.models.layer_store import LayerStore

POLL_S = 0.05  # between two looks at the finished layers


def quantize(arguments: list[str]) -> None:
    """Quantize in this process, and print seconds and peak memory as the last line."""
    start = time.perf_counter()
    if code := littlebit(["quantize", *arguments]):
        raise SystemExit(code)
    row = {"seconds": time.perf_counter() - start, "peak_bytes": memory_bytes("VmHWM")}
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        row |= {"gpu_bytes": torch.cuda.max_memory_allocated(), "gpu": torch.cuda.get_device_name()}
    print(json.dumps(row), flush=True)


def started(command: list[str]) -> "subprocess.Popen[str]":
    """Start `quantize` in a new process."""
    return subprocess.Popen([sys.executable, __file__, "--measure", *command], stdout=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for a process of `started`, and read its row."""
    printed, _ = process.communicate()
    if process.returncode:
        raise OSError(f"littlebit quantize must succeed, but exited with {process.returncode}: {printed[-300:]}")
    return json.loads(printed.splitlines()[-1])


def kill_and_resume(command: list[str], out: Path, layers: int) -> dict[str, Any]:
    """Kill a quantization once half of its layers are finished, run it again, and describe the second run."""
    kept = LayerStore(out.with_name(out.name + ".layers"))
    process = started(command)
    while process.poll() is None and kept.count() < layers // 2:
        time.sleep(POLL_S)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = kept.count()
    row = finished(started(command))
    return {"layers_kept": found, "resume_s": row["seconds"], "resume_peak_bytes": row["peak_bytes"]}


def measure(arguments: argparse.Namespace, blocks: int, folder: Path) -> dict[str, Any]:
    """Write a model of some blocks, quantize it, and return the row."""
    model, out = folder / "dense", folder / "packed"
    maker = [sys.executable, str(Path(__file__).with_name("dense_model.py")), arguments.shape, str(model)]
    subprocess.run([*maker, "--blocks", str(blocks), "--device", arguments.device], check=True)
    command = [str(model), str(out), "--bits", str(arguments.bits), "--init", arguments.init, "--paths", "1", "--json"]
    command += ["--device", arguments.device]
    row: dict[str, Any] = {"shape": arguments.shape, "blocks": blocks, "bits": arguments.bits, "init": arguments.init}
    row |= {"dense_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors"))}
    row |= finished(started(command))
    stored = sorted(out.glob("*.safetensors"))
    row["packed_bytes"] = sum(file.stat().st_size for file in stored)
    if arguments.kill:
        digests = [file_digest(file) for file in stored]
        layers = len(json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]["layers"])
        row |= {"layers": layers} | kill_and_resume([*command, "--overwrite"], out, layers)
        row["same_bytes"] = digests == [file_digest(file) for file in sorted(out.glob("*.safetensors"))]
    return row


def main() -> None:
    """Read the arguments and measure; save after each row."""
    if sys.argv[1:2] == ["--measure"]:
        return quantize(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--shape", default="llama2-7b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bits", type=float, default=0.55)
    parser.add_argument("--init", choices=["dual-svid", "admm"], default="dual-svid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, help="where to write the models (default: the system's for temporary files)"
    )
    parser.add_argument("--kill", action="store_true", help="also kill each quantization half-way and go on")
    arguments = parser.parse_args()
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory(prefix="littlebit-large-", dir=arguments.folder) as folder:
            rows.append(measure(arguments, blocks, Path(folder)))
        print(rows[-1], flush=True)
        save_results(arguments.out, rows, " ".join(["python", *sys.argv]), rows[0].get("gpu", cpu_name()))


if __name__ == "__main__":
    main()
