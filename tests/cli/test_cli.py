"""Test the command's help, dry runs, reports, shell completion and progress bars."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import littlebit.fast as lb
import pytest
import torch
from littlebit.fast import _progress
from littlebit.fast.admm import ADMM_STEPS
from littlebit.fast.cli.estimate import estimate
from littlebit.fast.cli.main import COMMANDS, SHELLS, build_parser, main, subcommands
from littlebit.fast.cli.plan import find_shape, shape_costs
from littlebit.fast.cli.quantization_cost import INITS, PASSES, multiplications, quantize_seconds
from littlebit.fast.cli.report import html_report, summarize_layer_types
from littlebit.fast.cli.tables import text_table
from littlebit.fast.cli.training_cost import Workload
from littlebit.fast.models.published import published_config
from test_command import littlebit


def test_every_command_has_help_with_examples_that_parse(capsys):
    parsers = subcommands(build_parser())
    assert list(parsers) == list(COMMANDS)
    for name, sub in parsers.items():
        assert COMMANDS[name].examples
        for example in COMMANDS[name].examples:
            words = shlex.split(example.split(" > ")[0].split(" < ")[0])
            assert words[0] == name
            assert build_parser().parse_args(words).command == name
            assert f"littlebit {example}\n" in sub.format_help()
        for action in sub._actions:
            assert action.help, action
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert re.search(r"exit codes:\n  0 +done\n", capsys.readouterr().out)


def test_dry_run_predicts_what_is_stored_and_writes_nothing(tiny_llama, tmp_path):
    """Compare the prediction of a fresh process with the checkpoint that is written afterwards."""
    common = [tiny_llama, tmp_path / "out", "--bits", 2.5, "--json"]
    found = json.loads(littlebit("quantize", *common, "--dry-run"))
    assert list(tmp_path.iterdir()) == []
    stored = json.loads(littlebit("quantize", *common))
    for key in ("bits_per_weight", "linear_bytes", "weights", "layers"):
        assert found[key] == stored[key]
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert found["file_bytes"] == stored["file_bytes"] - header
    assert found["memory_bytes"] > found["file_bytes"]
    assert found["quantise_s"] > 0 == found["train_s"]


def test_dry_run_predicts_the_official_ranks_and_refuses_what_quantize_refuses(tiny_llama, tmp_path, capsys):
    common = [str(tiny_llama), str(tmp_path / "out"), "--bits", "2.5", "--allocation", "official", "--json"]
    assert main(["quantize", *common, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["quantize", *common]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert found["linear_bytes"] == stored["linear_bytes"]
    for name, result in stored["results"].items():
        assert found["kinds"][name.split(".")[-1]]["ranks"] == result["ranks"]
    assert main(["quantize", *common, "--overwrite", "--paths", "auto", "--dry-run"]) == 2
    assert "choose paths=1 or 2" in capsys.readouterr().err


def test_dry_run_of_training_counts_its_tokens_and_refuses_impossible_bits(tiny_llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["train", str(tiny_llama), out, "--bits", "2.5", "--tokens", "1000000", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "to train; nothing was written" in printed
    assert re.search(r"^layer type +layers +d_out x d_in +rank +bits$", printed, re.M)
    config = lb.Config(bits=2.5)
    long, short = (estimate(tiny_llama, config, tokens)["train_s"] for tokens in (10**8, 10**6))
    assert 20 < long / short < 500  # 100 on a quiet machine
    assert main(["quantize", str(tiny_llama), out, "--bits", "0.1", "--dry-run"]) == 2
    assert "smallest possible value is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
LLAMA_70B |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}


@pytest.mark.parametrize("init", INITS)
def test_dry_run_of_a_large_model_reads_no_weight_and_factorises_nothing(init, tmp_path, monkeypatch, capsys):
    """Estimate from a folder that holds only config.json."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    for name in ("svd", "qr", "cholesky"):
        monkeypatch.delattr(torch.linalg, name)
    start = time.process_time()
    common = [str(tmp_path), str(tmp_path / "out"), "--bits", "0.55", "--paths", "1", "--init", init, "--dry-run"]
    assert main(["quantize", *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["train", *common, "--tokens", "1000", "--json"]) == 0
    assert time.process_time() - start < 20
    weights = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert found["weights"] == weights
    assert found["file_bytes"] < found["memory_bytes"] < weights  # The dense weights stay in their files.
    assert 0.5499 < found["bits_per_weight"] <= 0.55
    assert json.loads(capsys.readouterr().out)["train_s"] > 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.json"]


def test_plan_divides_the_trained_state_among_gpus(tmp_path, capsys):
    """Plan from a shape's name, and from a config.json of the same shape."""
    (tmp_path / "config.json").write_text(json.dumps(published_config("smollm2-135m")))
    found = []
    for source, gpus in (("smollm2-135m", "1"), (str(tmp_path / "config.json"), "2")):
        common = [source, "--bits", "0.55", "--tokens", "1000000", "--gpus", gpus, "--price", "2.5", "--json"]
        assert main(["plan", *common]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, two = found
    assert one["linear_bytes"] == two["linear_bytes"]
    for part in ("states", "teacher"):
        assert one["gpu_bytes"][part] // 2 == two["gpu_bytes"][part]
    assert one["gpu_bytes"]["activations"] == two["gpu_bytes"]["activations"]
    assert one["train_s"] == pytest.approx(2 * two["train_s"])
    assert one["cost"] == pytest.approx(2.5 * one["train_s"] / 3600)
    assert main(["plan", "llama9-7b"]) == 2
    assert "cannot load a model from 'llama9-7b'" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, shape in lb.MODEL_SHAPES.items() if shape.gated])
def test_plan_of_a_config_counts_what_transformers_builds(name, tmp_path):
    """Compare the plan, which does not build the model, with the estimate of one or two blocks, which does."""
    (tmp_path / "config.json").write_text(json.dumps(published_config(name, layers=2)))
    shape = find_shape(str(tmp_path))
    assert shape is not None
    planned = shape_costs(shape, 1.0, 2, "admm", 8, Workload(1000, 1))
    built = estimate(tmp_path, lb.Config(bits=1.0, init="admm", scale_bits=8), Workload(1000, 1))
    timed = {"quantise_s", "train_s"}
    assert {key: value for key, value in planned.items() if key not in timed} == {
        key: value for key, value in built.items() if key not in timed
    }


def test_plan_of_the_largest_shape_takes_two_seconds_and_imports_no_torch():
    """Count the processor time of a new process."""
    code = "import sys, time; from littlebit.fast.cli.main import main\n"
    code += (
        "assert main(['plan', 'llama2-70b', '--bits', '0.55', '--tokens', '1000000', '--gpus', '8', '--json']) == 0\n"
    )
    code += "print(sorted({'torch', 'transformers'} & set(sys.modules)), time.process_time() < 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] True"


def test_the_commands_of_the_page_about_your_own_model_run(tmp_path, monkeypatch, capsys):
    """Run the first commands of the page, which plan, quantize, train, verify and generate with the tiny model."""
    page = (Path(__file__).parents[2] / "book" / "your_model.md").read_text(encoding="utf-8")
    commands = page.split("```sh\n")[1].split("```")[0].splitlines()
    monkeypatch.chdir(tmp_path)
    for line in commands:
        program, *words = shlex.split(line)
        assert program == "littlebit"
        capsys.readouterr()
        assert main(words) == 0, line
        assert capsys.readouterr().out.strip()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "untrained"]


def test_quantize_seconds_adds_products_and_elementwise_work():
    rate, entry_seconds, shape, rank = 1e9, 1e-9, (1024, 2048), 100
    for init, steps in {"dual-svid": 1, "admm": ADMM_STEPS}.items():
        expected = multiplications(shape, rank, init) / rate + PASSES * steps * sum(shape) * rank * entry_seconds
        one, three = (
            quantize_seconds(dict.fromkeys(names, shape), dict.fromkeys(names, (rank,)), init, rate, entry_seconds)
            for names in (["a"], ["a", "b", "c"])
        )
        assert abs(one / expected - 1) < 1e-9  # sums in another order
        assert abs(three / one - 3) < 1e-9
    assert multiplications((64, 48), 40, "dual-svid") == 50 * 64 * 48 * 48  # an exact SVD, as the rank is large
    assert multiplications((512, 256), 32, "dual-svid") == 10 * 512 * 256 * 32 + 40 * (512 + 256) * 32**2


def test_dry_run_of_training_names_the_recipe(tiny_llama, tmp_path, capsys):
    words = ["train", str(tiny_llama), str(tmp_path / "out"), "--bits", "2.5", "--dry-run", "--tokens", "1200"]
    words += ["--sequence", "5", "--batch", "4", "--block-tokens", "200", "--long-tokens", "400"]
    words += ["--long-sequence", "10", "--frozen-tokens", "100", "--optimizer", "muon"]
    lines = [
        "steps 0 to 10: each block against the teacher's block, 4 sequences of 5 tokens per step",
        "steps 10 to 40: the whole model, 4 sequences of 5 tokens per step",
        "steps 40 to 55: the whole model, 2 sequences of 10 tokens per step",
        "steps 55 to 60: scales only, signs frozen, 2 sequences of 10 tokens per step",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    at = printed.index(lines[0])
    assert printed[at : at + 4] == lines
    assert printed[at + 4].startswith("settings: total_tokens 1200, sequence_length 5, block_tokens 200, long")
    assert "optimizer muon" in printed[at + 4]
    found = json.loads(littlebit(*words, "--json"))
    assert found["recipe"][:4] == lines
    assert found["training"]["long_sequence"] == 10
    assert main([*words, "--batch", "3"]) == 2
    assert "long_sequence must divide the 3 x 5 tokens" in capsys.readouterr().err


def test_quantize_ends_with_a_table_a_report_and_the_next_step(tiny_llama, tmp_path, capsys):
    report = tmp_path / "new" / "report.html"
    words = [
        "quantize",
        str(tiny_llama),
        str(tmp_path / "out"),
        "--bits",
        "2.5",
        "--report",
        str(report),
        "--device",
        "cpu",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert " ".join(printed[0].split()) == "layer type layers d_out x d_in rank paths bits rel. error"
    assert [line.split()[0] for line in printed[1:8]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert len({len(line) for line in printed[:8]}) == 1
    assert printed[-1].startswith(f"next: littlebit eval {tmp_path / 'out'}")
    page = report.read_text()
    assert page.count("<rect ") == 2 * 14
    assert page.count("<tr>") == 8
    assert "http" not in page  # complete in itself
    results = json.loads((tmp_path / "out" / "quantization.json").read_text())
    for name, result in results.items():
        assert f"<title>{name}: {result['error']:.4f}</title>" in page


def test_reports_show_ranges_and_escape_names(tmp_path):
    results = {
        "a.<b>": lb.LayerResult(8, 16, (3, 2), 1.5, 0.25),
        "c.<b>": lb.LayerResult(8, 16, (7,), 0.5, 0.75),
        "d": lb.LayerResult(4, 4, (1,), 2.0, 0.0),
    }
    rows = summarize_layer_types(results)
    assert rows[0] == {
        **{"layer type": "<b>", "layers": 2, "d_out x d_in": "8 x 16", "rank": "5-7", "paths": "1-2"},
        **{"bits": "1.000", "rel. error": "0.500"},
    }
    assert text_table(rows).splitlines()[1].split() == ["<b>", "2", "8", "x", "16", "5-7", "1-2", "1.000", "0.500"]
    html_report(tmp_path / "page.html", "<title>", "&", results)
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;: 0.2500" in page


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Completion scripts by shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with (folder / shell).open("w") as file, contextlib.redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return {shell: (folder / shell).read_text() for shell in SHELLS}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_offers_every_option(shell, scripts):
    for name, sub in subcommands(build_parser()).items():
        assert name in scripts[shell]
        for action in sub._actions:
            for text in action.option_strings[-1:]:  # the long form
                assert text.lstrip("-") in scripts[shell]


def completed(script, *words):
    """Return what bash offers to complete the last of the words."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _shtab_littlebit; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", script + code], capture_output=True, text=True, check=False)
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(scripts):
    script = scripts["bash"]
    assert completed(script, "littlebit", "qu") == ["quantize"]
    assert "--kv-rank-factor" in completed(script, "littlebit", "quantize", "--k")
    assert completed(script, "littlebit", "quantize", "--init", "d") == ["dual-svid"]
    assert completed(script, "littlebit", "export", "--to", "") == ["official", "gguf"]
    assert completed(script, "littlebit", "info", "pyproj") == ["pyproject.toml"]


def test_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'littlebit[completion]'" in capsys.readouterr().err


def test_the_top_help_imports_neither_torch_nor_numba():
    code = "import contextlib, sys; from littlebit.fast.cli.main import main\n"
    code += "with contextlib.suppress(SystemExit): main(['--help'])\n"
    code += "print(sorted({'torch', 'numba', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("redrawn", [True, False])
def test_bars_are_redrawn_on_terminals_and_lines_in_logs(redrawn, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    file = Terminal() if redrawn else io.StringIO()
    for _ in _progress.tqdm(range(5000), desc="work", file=file):
        pass
    shown = file.getvalue()
    assert ("\r" in shown) == redrawn
    if not redrawn:
        assert 1 <= len(shown.splitlines()) <= 3
        assert shown.splitlines()[-1].startswith("work: 100%|#")
        monkeypatch.setitem(sys.modules, "ipykernel", sys)  # a notebook draws over, and says that it is no terminal
        assert _progress.can_redraw(io.StringIO())


def test_an_option_that_is_mistyped_exits_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "littlebit.fast", "quantize", "a", tmp_path / "b", "--bit", "x"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 2
    assert "usage: littlebit quantize" in done.stderr
