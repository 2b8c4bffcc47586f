"""The conformance kit itself: every law catches its own mistake, and the command reports."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from littlebit.conformance import LAWS, Backend, broken, check, vectors
from littlebit.conformance.backend import as_python
from littlebit.conformance.compare import assert_same, assert_within

BACKEND = """import numpy as np


def pack_signs(signs):
    count = signs.shape[-1]
    width = 8 if count <= 8 else 16 if count <= 16 else 32
    if np.isnan(signs).any():
        raise ValueError("NaN")
    bits = np.zeros((*signs.shape[:-1], -(-count // width) * width), bool)
    bits[..., :count] = signs < 0
    return np.packbits(bits, axis=-1, bitorder="little").view(f"u{width // 8}")


def signs_of(words, count):
    bits = np.unpackbits(np.ascontiguousarray(words).view("u1"), axis=-1, count=count, bitorder="little")
    return 1 - 2 * bits.astype("f4")


def packed_linear(x, paths, bias=None):
    y = np.float32(0)
    for u_words, v_words, h, ell, g in paths:
        u, v = signs_of(u_words, len(ell)), signs_of(v_words, len(g))
        y = y + ((x * g.astype("f4")) @ v.T * ell.astype("f4")) @ u.T * h.astype("f4")
    return y if bias is None else y + bias
"""


@pytest.mark.parametrize("law", LAWS, ids=[law.name for law in LAWS])
def test_law_catches_its_own_mistake(law):
    outcome = check(law, Backend(broken.backend(law.name)), 40, shrink=False)
    assert outcome is not None, f"{broken.MISTAKES[law.name].what} was not noticed"
    assert outcome.found
    assert f"backend.{law.functions[-1]}(" in outcome.example


def test_every_law_says_what_must_hold_and_where_it_is_written():
    assert len({law.name for law in LAWS}) == len(LAWS)
    assert {law.name for law in LAWS} == set(broken.MISTAKES)
    assert all(law.statement.endswith(".") and len(law.statement) < 200 and law.source for law in LAWS)


def test_smallest_example_runs_and_shows_the_mistake(capsys):
    (law,) = (law for law in LAWS if law.name == "packed_linear.h_scales_the_outputs")
    outcome = check(law, Backend("littlebit.reference"))
    assert outcome is None
    backend = Backend("littlebit.reference")
    path = backend.pack_factors(broken.ref.Factors(*(np.ones(shape, "f4") for shape in ((1, 1), (1, 1), 1, 1, 1))))
    backend.packed_linear(np.array([[2.0]], "f4"), [path])
    exec(as_python(backend), {})
    assert "[[2.]]" in capsys.readouterr().out


def run(folder, *arguments):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "littlebit.conformance",
        *arguments,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def test_command_reports_laws_and_smallest_examples(tmp_path):
    (tmp_path / "my_module.py").write_text(BACKEND.replace("* h.astype", "* 2 * h.astype"))
    (tmp_path / "skips.txt").write_text("packing.zero_is_positive  # not needed here\n\n")
    done = run(tmp_path, "--backend", "my_module", "--examples", "5", "--skips", "skips.txt", "-k", "h_scales or zero")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 skipped by the list" in done.stdout
    assert "broken: packed_linear.h_scales_the_outputs" in done.stdout
    assert "source: LittleBit (arXiv 2506.13771), forward pass" in done.stdout
    assert "backend = Backend('my_module')" in done.stdout
    (tmp_path / "my_module.py").write_text(BACKEND)
    done = run(tmp_path, "--backend", "my_module", "--examples", "5", "-k", "h_scales or sign_j")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "my_module: 2 of 2 laws hold; 1 need functions that my_module does not have" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--backend MODULE is missing"),
        (["--backend", "no_such_module"], "No module named 'no_such_module'"),
        (["--backend", "json"], "json must have some of these functions, but has none: allocate_ranks"),
        (["--backend", "littlebit.reference", "--skips", "wrong.txt"], "there is no law 'packing.magic'"),
        (["--backend", "littlebit.reference", "--examples", "0"], "--examples must be at least 1"),
    ],
)
def test_command_refuses_what_it_cannot_check(tmp_path, arguments, message):
    (tmp_path / "wrong.txt").write_text("packing.magic\n")
    done = run(tmp_path, *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr


def test_golden_vectors_are_what_the_cases_give_now():
    """Inputs and words to the bit; sums of float64 may round in another order on another machine."""
    stored, made = vectors.load(), list(vectors.cases())
    assert [case.function for case in stored] == [case.function for case in made]
    with np.load(vectors.GOLDEN / "vectors.npz") as arrays:
        for at, (old, new) in enumerate(zip(stored, made, strict=True)):
            for kind in ("inputs", "expected"):
                mine, theirs = getattr(old, kind), getattr(new, kind)
                assert set(mine) == set(theirs)
                for name, value in theirs.items():
                    if not isinstance(value, np.ndarray):
                        assert mine[name] == value
                        continue
                    assert_same(arrays[f"{at}.{kind}.{name}"], mine[name])
                    if value.dtype == np.float64 and value.size:
                        assert_within(mine[name], value, np.abs(value).max() + 1, terms=1000)
                    else:
                        assert_same(mine[name], value)
    assert json.loads((vectors.GOLDEN / "vectors.json").read_text())["format"] == vectors.FORMAT


def test_reference_gives_the_golden_vectors():
    seen = set()
    for case in vectors.load():
        inputs = dict(case.inputs)
        if case.function == "pack_signs":
            assert_same(broken.ref.pack_signs(inputs["signs"]), case.expected["words"])
        elif case.function == "packed_linear":
            y = broken.ref.packed_linear(inputs["x"], vectors.paths_of(inputs), inputs["bias"])
            assert (np.abs(y - case.expected["y"]) <= case.expected["y.bound"]).all()
        elif case.function == "unpack_factors":
            dense = sum(broken.ref.unpack_factors(path).to_dense() for path in vectors.paths_of(inputs))
            assert_within(dense, case.expected["weight"], np.abs(dense).max(), terms=100)
        elif case.function == "round_latents":
            stored = broken.ref.round_latents(inputs["latent"], inputs["dtype"])
            assert_same(stored.codes, case.expected["codes"])
            assert_same(stored.scale, case.expected["scale"])
        elif case.function == "linear_vjp":
            paths = vectors.paths_of(inputs, broken.ref.Factors)
            grad_x, grad_paths, grad_bias = broken.ref.linear_vjp(inputs["x"], paths, inputs["grad"], inputs["rule"])
            found = {"x": grad_x, "bias": grad_bias} | vectors.named(grad_paths)
            assert set(found) == {name for name in case.expected if not name.endswith(".bound")}
            for name, value in found.items():
                assert (np.abs(value - case.expected[name]) <= case.expected[f"{name}.bound"]).all()
        seen.add(case.function)
    assert seen == {"pack_signs", "packed_linear", "unpack_factors", "linear_vjp", "round_latents", "read_layers"}
