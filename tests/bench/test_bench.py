"""Benchmarks: copies of weights beyond the cache, torch's own layers, and the code digests in a results file."""

import json
from pathlib import Path

import pytest
import torch
from littlebit.fast.bench import linear as bench, peers, timing
from littlebit.fast.bench.peers import PEERS, relative_error
from littlebit.fast.files.digests import code_digest
from littlebit.fast.kernels import cpu


@pytest.mark.parametrize("size", [1, 1000, 4096 * 4096 // 80, 1 << 28, 1 << 31])
def test_copies_exceed_the_last_cache(size, monkeypatch):
    monkeypatch.setattr(timing, "MAX_COPIES", 1 << 40)
    assert timing.rotated_bytes() >= max(2 * timing.last_cache_bytes(), 1 << 25)
    copies = timing.copies_beyond_cache(size)
    assert copies * size > timing.rotated_bytes() >= (copies - 1) * size


def test_copies_of_a_tiny_layer_are_bounded():
    assert timing.copies_beyond_cache(1) == timing.MAX_COPIES


def test_last_cache_is_the_largest_that_the_system_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(timing.os, "sysconf_names", {})
    assert timing.last_cache_bytes(tmp_path) == 0
    for at, size in enumerate(["48K", "2048K", "491520K", "32M", "unknown", ""]):
        folder = tmp_path / "cpu0" / "cache" / f"index{at}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
    assert timing.last_cache_bytes(tmp_path) == 480 << 20


def test_bench_linear_times_torchs_8_and_4_bit_layers_where_they_exist(monkeypatch):
    monkeypatch.setattr(timing, "rotated_bytes", lambda: 1 << 19)
    rows = bench.bench_linear(((256, 384), (256, 320)), (1.0,), repeats=1, progress=False)
    for row in rows:
        weight = torch.randn(row["d_out"], row["d_in"])
        for name, _, make, dtype in PEERS:
            possible = True
            try:
                make(weight, 1)[0](torch.zeros(1, row["d_in"], dtype=dtype))
            except (RuntimeError, NotImplementedError, AttributeError):
                possible = False
            assert (row[f"{name}_us"] is not None) == (row[f"{name}_error"] is not None) == possible
        assert row["rotated_bytes"] > 1 << 19
    assert rows[1]["int4_us"] is None  # 320 is not a multiple of 128


def test_bench_linear_refuses_a_peer_that_computes_another_product(monkeypatch):
    wrong = ("int8", 8, lambda weight, copies: [lambda x: torch.zeros(len(x), len(weight))] * copies, torch.float32)
    monkeypatch.setattr(bench, "PEERS", [wrong])
    monkeypatch.setattr(timing, "rotated_bytes", lambda: 1 << 19)
    with pytest.raises(RuntimeError, match=r"int8 layer must have .* got 1\.00"):
        bench.bench_linear(((64, 64),), (2.0,), repeats=1, progress=False)


def test_relative_error_is_relative_to_the_exact_output():
    weight, x = torch.eye(4), torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    assert relative_error(lambda x: 2 * x, weight, x) == 1.0
    assert relative_error(lambda x: x.clone(), weight, x) == 0.0
    assert set(peers.MAX_ERROR) == {name for name, *_ in PEERS}


def test_code_digest_ignores_comments_docstrings_and_layout():
    code = code_digest('def f(x):\n    """Double."""\n    return 2 * x\n')
    for same in ("def f(x):\n  return 2*x", '# f\ndef f(x):  # x\n\n    """Twice\n    x."""\n    return 2 * x'):
        assert code_digest(same) == code
    for other in ("def f(x):\n    return 3 * x", "def g(x):\n    return 2 * x", "", 'def f(x):\n    return "#" * x'):
        assert code_digest(other) != code
    assert code_digest('x = "a # b"') != code_digest('x = "a # c"')


def test_results_record_digests_of_loaded_modules(tmp_path):
    timing.save_results(tmp_path / "out.json", [{}], "a command", "a device")
    code = json.loads((tmp_path / "out.json").read_text())["code"]
    for name, module in (("bench.linear", bench), ("kernels.cpu", cpu)):
        assert code[name] == code_digest(Path(module.__file__).read_text())
