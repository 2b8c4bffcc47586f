"""Test the demo: the model writes before torch is imported, errors take one line, a busy machine is reported."""

import subprocess
import sys

import pytest
from littlebit.fast.cli import demo
from littlebit.fast.cli.main import main

ROW = {"bits_per_weight": 0.55, "linear_bytes": 7, "file_bytes": 9, "perplexity": 81.3, "scored": 8188}


def row(share):
    return ROW | {"title": "trained", "tokens_per_s": 300.0, "core_share": share}


def test_model_writes_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAINED", demo.TINY)
    printed = []

    def measure(out):
        printed.append(capsys.readouterr().out)
        return "the table"

    monkeypatch.setattr(demo, "measure", measure)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    (sample,) = printed
    assert f"    {demo.PROMPT} " in sample
    assert len(sample.split(demo.PROMPT)[1]) > demo.NEW_TOKENS / 2
    assert capsys.readouterr().out == "the table\n"


def test_a_model_that_cannot_be_fetched_is_one_line_of_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAINED", "no such model")
    monkeypatch.setattr(demo, "compile_kernels", lambda: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("littlebit: error: no model is called")


@pytest.mark.parametrize(("share", "busy"), [(0.89, True), (0.99, False)])
def test_table_reports_a_busy_machine(share, busy):
    text = demo.table([row(1.0), row(share)])
    assert ("too busy to measure speed: other programs left the decoder 89% of a core" in text) == busy


def test_demo_imports_torch_only_to_measure():
    code = "import sys; from littlebit.fast.cli import demo; demo.TRAINED = demo.TINY"
    code += "; demo.write_sample(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
