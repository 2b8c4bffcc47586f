"""Test `littlebit train`: its files, its errors, several processes, kills and signals."""

import json
import lzma
import os
import signal
import subprocess
import sys

import littlebit.fast as lb
import numpy as np
import pytest
import torch
import workers
from compare import assert_same
from littlebit.fast.checkpoints import texts
from littlebit.fast.cli.main import main
from training_runs import (
    TEXT,
    assert_same_curves,
    measured,
    one_thread,  # noqa: F401 (a fixture of this module)
    teacher_and_student,
    train,
)


@pytest.fixture(scope="module")
def models(loud_llama):
    return teacher_and_student(loud_llama)


def command(model, out, text, *more):
    settings = {"--tokens": 8 * 128, "--sequence": 32, "--batch": 4, "--lr-latents": 0.01, "--lr-scales": 0.01}
    settings |= {"--bits": 2.5, "--device": "cpu", "--log-steps": 1, "--data": text}
    return [str(word) for word in ("train", model, out, *(part for pair in settings.items() for part in pair), *more)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Write a file that the byte-level tokenizer reads as 128 tokens."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(chr(97 + token % 26) for token in TEXT.tolist()))
    return path


def logged(out):
    return [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(loud_llama, text, tmp_path_factory):
    """Train in one process, and return its output."""
    out = tmp_path_factory.mktemp("one") / "out"
    assert main(command(loud_llama, out, text)) == 0
    return out


@pytest.fixture(scope="module")
def command_conditions(loud_llama, models, text):
    """Measure the conditions of the command's training run."""
    tokens = texts.text_tokens(lb.load_tokenizer(loud_llama), text)
    return measured(models, train(models, tokens)[1], tokens)


def test_command_writes_checkpoint_and_log(loud_llama, one_process, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(loud_llama, out, text, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    log = logged(out)
    assert printed["training"] == log[-1]
    assert printed["bits_per_weight"] == lb.info(out)["bits_per_weight"] <= 2.5
    assert [entry["step"] for entry in log] == list(range(1, 9))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()
    assert lb.generate(lb.load(out), "abc", 3, tokenizer=lb.load_tokenizer(out))


def test_command_reads_compressed_text(loud_llama, one_process, text, tmp_path, capsys):
    packed, out = tmp_path / "text.txt.xz", tmp_path / "out"
    packed.write_bytes(lzma.compress(text.read_bytes()))
    assert main(command(loud_llama, out, packed)) == 0
    assert "last loss" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()


def test_command_reads_tokens(loud_llama, one_process, text, tmp_path):
    tokens, out = tmp_path / "tokens.npy", tmp_path / "out"
    np.save(tokens, texts.text_tokens(lb.load_tokenizer(loud_llama), text).numpy().astype(np.uint16))
    assert main(command(loud_llama, out, tokens)) == 0
    assert (out / "model.safetensors").read_bytes() == (one_process / "model.safetensors").read_bytes()


@pytest.mark.parametrize("content", [b"", b"some text"])
def test_command_refuses_what_is_no_array(loud_llama, tmp_path, capsys, content):
    (tmp_path / "tokens.npy").write_bytes(content)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / "tokens.npy")) == 2
    assert "tokens.npy is not an array that NumPy can read" in capsys.readouterr().err


@pytest.mark.parametrize("values", [np.zeros((2, 3), np.uint16), np.zeros(300, np.float32)])
def test_command_refuses_arrays_that_hold_no_tokens(loud_llama, tmp_path, capsys, values):
    np.save(tmp_path / "tokens.npy", values)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / "tokens.npy")) == 2
    assert "tokens.npy must hold token ids, integers of shape (n,)" in capsys.readouterr().err


def test_long_texts_are_tokenised_once(loud_llama, tmp_path, monkeypatch):
    """In pieces, of which this tokenizer, which reads bytes, makes the same tokens; another text has others."""
    monkeypatch.setattr(texts, "LONG_TEXT", 10)
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))
    tokenizer, file = lb.load_tokenizer(loud_llama), tmp_path / "text.txt"
    file.write_text("It was the best of times.\n\nIt was the worst of times.\n\n\nThe age of wisdom.")
    expected = texts.text_tokens(tokenizer, file)
    assert_same(texts.training_tokens(tokenizer, file), expected)
    with monkeypatch.context() as patch:
        patch.setattr(texts, "read_text", lambda path: pytest.fail("tokenised again"))
        assert_same(texts.training_tokens(tokenizer, file), expected)
    file.write_text("It was the age of foolishness.")
    assert_same(texts.training_tokens(tokenizer, file), texts.text_tokens(tokenizer, file))
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(file.read_bytes()))
    assert_same(texts.training_tokens(tokenizer, packed), texts.text_tokens(tokenizer, file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("binary.txt", b"\xff\xfe\x00\x81", "is not a UTF-8 text file"),
        ("broken.xz", lzma.compress(b"text" * 100)[:-20], "is not a UTF-8 text file"),
        ("plain.xz", b"text", "is not a UTF-8 text file"),
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "at least 32 tokens are needed, got 0"),
        ("short.txt", b"too short", "at least 32 tokens are needed, got 9"),
    ],
)
def test_command_says_what_is_wrong_with_the_data(loud_llama, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(command(loud_llama, tmp_path / "out", tmp_path / name)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("littlebit: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--shard"], "torchrun"),
        (["--recompute"], "needs shard=True"),
    ],
)
def test_command_refuses_what_cannot_be_done(loud_llama, text, tmp_path, capsys, more, message):
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(command(loud_llama, tmp_path / "out", text, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def assert_same_checkpoint(out, one_process, conditions):
    """Compare losses within the bound, and require a working checkpoint of the same size."""
    assert_same_curves(logged(out), logged(one_process), conditions)
    stored, expected = lb.info(out), lb.info(one_process)
    for each in (stored, expected):
        each.pop("path", None)
    assert stored == expected
    assert lb.generate(lb.load(out), "abc", 3, tokenizer=lb.load_tokenizer(out))


@pytest.mark.parametrize("more", [[], ["--shard", "--recompute"], ["--micro-batch", "1", "--train", "all"]])
def test_command_in_two_processes_draws_the_same_curve(
    loud_llama, text, one_process, command_conditions, tmp_path, more
):
    out, printed = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, out, text, *more)] * 2, printed)
    assert [workers.ended(process) for process in processes] == [0, 0], printed[0].read_text()
    if "all" not in more:
        assert_same_checkpoint(out, one_process, command_conditions)
    assert "last loss" in printed[0].read_text()
    assert "last loss" not in printed[1].read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]


@pytest.mark.parametrize(("more", "kills"), [([], (2, 5)), (["--shard", "--recompute", "--log-steps", "4"], (3,))])
def test_command_in_two_processes_goes_on_after_a_kill(loud_llama, text, tmp_path, more, kills):
    """Also within and after the part that trains block by block, in which the last norm has no gradient."""
    words = ["--block-tokens", "512", "--save-minutes", "0", *more]
    whole_run, out = tmp_path / "whole", tmp_path / "out"
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, whole_run, text, *words)] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
    for step in kills:
        processes = workers.group([command(loud_llama, out, text, *words)] * 2, outputs)
        while processes[0].is_alive() and not any(
            (out.with_name("out.training") / f"step-{at}").exists() for at in range(step, 9)
        ):
            processes[0].join(0.002)
        for process in processes:
            process.kill()
            workers.ended(process)
    processes = workers.group([command(loud_llama, out, text, *words)] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
    assert (out / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()
    assert [entry["loss"] for entry in logged(out)] == [entry["loss"] for entry in logged(whole_run)]


def test_command_in_two_processes_begins_with_the_first_ones_factors(loud_llama, text, tmp_path):
    """Where rounding differs between processes, so do factors; here they do because they are found differently."""
    outputs, written = [tmp_path / "first", tmp_path / "second"], []
    for init in ("itq", "dual-svid"):
        out = tmp_path / init
        commands = [command(loud_llama, out, text, "--init", each) for each in ("itq", init)]
        processes = workers.group(commands, outputs)
        assert [workers.ended(process) for process in processes] == [0, 0], outputs[0].read_text()
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_command_in_two_processes_stops_in_all_when_one_is_told(loud_llama, text, tmp_path):
    words = command(loud_llama, tmp_path / "out", text, "--tokens", str(400 * 128), "--log-steps", "2")
    outputs, log = [tmp_path / "first", tmp_path / "second"], tmp_path / "out.training" / "log.jsonl"
    processes = workers.group([words] * 2, outputs)
    while processes[1].is_alive() and not (log.exists() and log.read_text()):
        processes[1].join(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [workers.ended(process) for process in processes] == [143, 143]
    (state,) = log.parent.glob("step-*")
    assert all(f"step {state.name[5:]}; its state is saved" in output.read_text() for output in outputs)


def test_command_in_two_processes_refuses_a_step_that_cannot_be_divided(loud_llama, text, tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]
    processes = workers.group([command(loud_llama, tmp_path / "out", text, "--batch", "3")] * 2, outputs)
    assert [workers.ended(process) for process in processes] == [2, 2]
    assert "must be a multiple of the number of processes, got 3 sequences for 2" in outputs[0].read_text()


def test_command_under_torchrun(loud_llama, text, one_process, command_conditions, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "littlebit.fast", *command(loud_llama, out, text, "--shard", "--threads", "1")],
        capture_output=True,
        text=True,
        timeout=workers.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(out, one_process, command_conditions)
