"""The scripts of book/examples: short, and each runs offline and prints something that makes sense."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "book" / "examples"
MOST_LINES = 40
PRINTED = {  # patterns that occur, in this order, in what a script prints
    "chat": [r"In the beginning of the( [a-z]+){5}"],
    "lora": [r"[\d,]+ parameters of the adapter", r"step   0: loss \d", r"step  29: loss \d"],
    "own_initializer": ["dual-svid .* weights 0", "my_init .* weights 0", "admm .* weights 0"],
    "quantize": ["original: .*perplexity", "down_proj .*relative error 0", r"stored: .*1\.\d+ bits", "quantised: "],
    "train": ["original .*perplexity", "untrained .*perplexity", "trained .*perplexity", "loss: "],
}


@cache
def run(name):
    """Run a script where no network can be reached, and return what it prints."""
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, FOLDER / f"{name}.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested_and_short():
    lines = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in FOLDER.glob("*.py")}
    assert lines.keys() == PRINTED.keys()
    assert max(lines.values()) <= MOST_LINES


@pytest.mark.parametrize("name", PRINTED)
def test_example_runs_and_prints_sense(name):
    if name == "lora":
        pytest.importorskip("peft")
    assert re.search(".*".join(PRINTED[name]), run(name), re.DOTALL)


def numbers(pattern, text):
    """Find the numbers that follow a pattern."""
    return [float(found) for found in re.findall(rf"{pattern}\s*(\d+(?:\.\d+)?)", text)]


def test_training_example_improves_the_model():
    original, untrained, trained = numbers("perplexity", run("train"))
    assert original < trained < untrained / 2


def test_own_initializer_is_closer_than_dual_svid():
    dual_svid, mine, *_ = numbers("of the weights", run("own_initializer"))
    assert mine < dual_svid
