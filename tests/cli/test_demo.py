"""The demonstration: the model writes first, progress is out of the way, and a busy machine is said."""

import subprocess
import sys

import pytest
from littlebit.fast.cli import demo
from littlebit.fast.cli.main import main

ROW = {"bits_per_weight": 0.55, "linear_bytes": 7, "file_bytes": 9, "perplexity": 81.3, "scored": 8188}


def row(share):
    return ROW | {"title": "trained", "tokens_per_s": 300.0, "core_share": share}


def test_the_model_writes_before_anything_is_measured_or_torch_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "bundled_folder", lambda name: tmp_path)  # it is there
    monkeypatch.setattr(demo, "TRAINED", demo.TINY)
    said = []

    def measured(out):
        said.append(capsys.readouterr().out)
        return "the table"

    monkeypatch.setattr(demo, "measure", measured)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 0
    (spoken,) = said
    assert f"    {demo.PROMPT} " in spoken
    assert len(spoken.split(demo.PROMPT)[1]) > demo.NEW_TOKENS / 2
    assert capsys.readouterr().out == "the table\n"


def test_a_model_that_cannot_be_fetched_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "bundled_folder", lambda name: tmp_path / "missing")
    monkeypatch.setattr(demo, "TRAINED", "no such model")
    monkeypatch.setattr(demo, "first_token", lambda: None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("littlebit: error: no model is called")


@pytest.mark.parametrize(("share", "busy"), [(0.89, True), (0.99, False)])
def test_the_table_says_when_the_machine_was_too_busy(share, busy):
    text = demo.table([row(1.0), row(share)])
    assert ("too busy to measure speed: other programs left the decoder 89% of a core" in text) == busy


def test_nothing_that_needs_torch_is_imported_to_speak():
    code = "import sys, littlebit.fast.cli.demo as d; d.place(d.TRAINED); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
