"""The CUDA kernels, without a GPU: run in a simulator, and compiled for the GPUs that they are meant for."""

import itertools
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from littlebit.fast.bench import tune
from littlebit.fast.bits import rank_for_bits
from littlebit.fast.cli.main import main
from littlebit.fast.kernels import (
    cuda_driver,
    cuda_gemm,
    cuda_gemv as kernels,
    cuda_layer,
    cuda_plain,
    cuda_schedule,
    cuda_unpack,
)
from littlebit.fast.kernels.cuda_schedule import Blocks, Schedule

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
KINDS = ("half", "bfloat", "single")
FRAME_SIZE = 0x11  # attribute of a kernel in a cubin: bytes of local memory, where registers are spilled to
SHAPES = ((16, 17), (576, 1536), (4096, 4096), (4096, 11008), (28672, 8192), (8192, 28672))


def test_properties_in_the_simulator():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "simulated_cuda.py"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills(capability, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    # device functions keep what they were compiled for
    plain = cuda_plain.plain_latent, cuda_plain.plain_output
    for factory in (kernels.latent, kernels.output, *plain, cuda_unpack.unpacking):
        factory.cache_clear()
    early = capability >= cuda_driver.EARLY
    kinds = KINDS if capability == CAPABILITIES[-1] else ("bfloat",)
    for kind, (wide, vectors) in itertools.product(kinds, ((True, 1), (False, 4))):
        chosen = [kernels.latent(kind, wide, wide, vectors, early), kernels.output(kind, wide, vectors, 4, early)]
        if kind == kinds[-1] and not wide:
            entries, sizes = ("norm", "silu", "gelu_tanh", kernels.Shares(8, 128)), (wide, wide, vectors, early, 6)
            chosen += [kernels.latent("single", *sizes, entry) for entry in entries]
            chosen += [kernels.output("single", wide, vectors, 4, early, *each) for each in ((3, "bias"), (1, "add"))]
        for kernel in chosen:
            text, attributes = compiled(kernel, capability)
            assert text.count(b"mma.sync") == 3 * vectors
            assert (b"griddepcontrol.wait" in text) == early
            assert attributes[FRAME_SIZE] == 0
    for kernel in (cuda_plain.plain_latent("half"), cuda_plain.plain_output("half")):
        assert compiled(kernel, capability)[1][FRAME_SIZE] == 0
    for kind, paths in (("half", 1), ("bfloat", 2)):
        text, attributes = compiled(cuda_unpack.unpacking(kind, paths, early), capability)
        assert b"st.global.v4" in text
        assert attributes[FRAME_SIZE] == 0


@pytest.mark.parametrize(("capability", "grouped"), [((8, 0), False), ((9, 0), False), ((9, 0), True)])
def test_kernels_for_batches_compile_without_spills(capability, grouped, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    cuda_gemm.scaled_vectors.cache_clear()
    cuda_gemm.products.cache_clear()
    early = capability >= cuda_driver.EARLY
    large, small = cuda_schedule.tiles_for(100, grouped)[0], cuda_schedule.tiles_for(16, grouped)[0]
    chosen = [
        cuda_gemm.products(kind, tile, 1, 2, early, grouped) for kind, tile in (("half", large), ("bfloat", small))
    ]
    chosen += [cuda_gemm.products("single", large, 2, 1, early, grouped, direct) for direct in (False, True)]
    for kernel in chosen:
        text, attributes = compiled(kernel, capability)
        assert (b"wgmma.mma_async" if grouped else b"mma.sync.aligned.m16n8k16") in text
        assert attributes[FRAME_SIZE] == 0
    if not grouped:
        for scaled in (("half", False, 2, 1), ("single", True, 0, 8)):
            assert compiled(cuda_gemm.scaled_vectors(*scaled, early), capability)[1][FRAME_SIZE] == 0


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rows", [5, 16, 17, 33, 64, 65, 1000])
def test_tiles_of_batches_fit_and_are_filled(rows, grouped):
    limit = (227 if grouped else 99) << 10
    for (d_out, d_in), ranks in itertools.product(SHAPES, ((1,), (600,), (300, 310), (6336,))):
        sizes = cuda_schedule.Sizes(d_in, (d_out,), (ranks,))
        schedule = cuda_schedule.batch_schedule(sizes, rows, 132, grouped)
        assert 1 <= schedule.parts <= max(1, cuda_schedule.steps_of(d_in))
        for tile in (schedule.latent, schedule.output):
            assert max(tile.shared_bytes(len(ranks)), tile.shared_bytes(1, True)) <= limit
            assert tile.threads % tile.rows == 0
            assert tile.vectors < 2 * max(rows, 16)
        assert schedule.latent.grouped or not grouped or rows <= 32


@pytest.mark.parametrize("ranks", [(64,), (184,), (300, 310), (1096,), (6336,)])
def test_a_layer_is_quicker_unpacked_from_some_number_of_rows_on(ranks):
    for d_out, d_in in SHAPES:
        sizes = cuda_schedule.Sizes(d_in, (d_out,), (ranks,))
        quicker = [cuda_schedule.is_quicker_unpacked(sizes, 1 << log) for log in range(17)]
        assert quicker == sorted(quicker)
        assert not any(quicker[:6])
        assert all(quicker[11:]) or d_in < 100


def compiled(kernel, capability):
    """PTX of a kernel and, from its cubin, its attributes by number."""
    from cuda.core import Program, ProgramOptions  # pyright: ignore[reportAttributeAccessIssue]

    text, _ = cuda_driver.compiled.__wrapped__(kernel, capability)
    options = ProgramOptions(arch=f"sm_{capability[0]}{capability[1]}{'a' if b'wgmma' in text else ''}")
    return text, attributes_of(bytes(Program(text.decode(), "ptx", options).compile("cubin").code))


def attributes_of(cubin):
    """Attributes of the only kernel in a cubin: the entries of its section .nv.info that name a kernel and a number."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(number)]
    found = {}
    for name, _, _, _, offset, length, *_ in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        at = offset
        while at < offset + length:
            form, attribute, extent = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:
                if extent == 8:
                    found[attribute] = struct.unpack_from("<II", cubin, at)[1]
                at += extent
    return found


@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
@pytest.mark.parametrize("multiprocessors", [16, 132])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_schedules_fit_what_they_are_for(rows, multiprocessors, shared_bytes):
    device = cuda_schedule.Device("any", multiprocessors, shared_bytes)
    vectors = cuda_schedule.vectors_of(rows)
    for (d_out, d_in), ranks in itertools.product(SHAPES, ((1,), (17,), (600,), (300, 310), (6336,))):
        sizes = cuda_schedule.Sizes(d_in, (d_out, d_out), (ranks, ranks[:1]))
        schedule = cuda_schedule.schedule_for(sizes, rows, device)
        if schedule is None:  # planes of four vectors, and words, of long rows
            assert vectors == 4 or shared_bytes == 99 << 10
            continue
        assert schedule.parts <= max(1, d_in // 256)
        assert cuda_schedule.latent_bytes(schedule.latent, vectors, d_in, schedule.parts) <= shared_bytes
        assert cuda_schedule.output_bytes(schedule.output, vectors, sizes) <= shared_bytes
        for blocks in (schedule.latent, schedule.output):
            assert 32 <= blocks.threads <= 512
            assert blocks.tiles >= 1


def test_a_kernel_is_compiled_once_and_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cuda_driver, "ptx_of", lambda kernel, of: made.append(of) or b".visible .entry some_name(")
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))
    compiled_now = cuda_driver.compiled.__wrapped__
    one, other = (cuda_plain.plain_output(kind) for kind in ("half", "single"))
    for _ in range(2):
        assert compiled_now(one, (9, 0)) == (b".visible .entry some_name(", b"some_name")
    assert made == [(9, 0)]
    compiled_now(other, (9, 0))
    compiled_now(one, (8, 0))
    assert made == [(9, 0), (9, 0), (8, 0)]
    monkeypatch.setattr(cuda_driver, "sources", lambda: "changed")
    compiled_now(one, (9, 0))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "file"))  # where no folder can be made
    assert compiled_now(one, (9, 0))[1] == b"some_name"
    assert len(made) == 5


def test_measured_schedules_are_of_layers_that_exist_and_fit_their_gpu():
    limit = 227 << 10
    known = cuda_schedule.measured()["NVIDIA H100 80GB HBM3"]
    for d_out, d_in in ((4096, 4096), (28672, 8192)):
        assert f"{d_out}x{d_in}:{rank_for_bits(d_out, d_in, 0.1, 1)}" in known
    for sizes, schedule in known.items():
        d_outs, d_in, ranks = re.split("[x:]", sizes)
        ranks = tuple(tuple(map(int, each.split("+"))) for each in ranks.split(","))
        parsed = cuda_schedule.Sizes(int(d_in), tuple(map(int, d_outs.split(","))), ranks)
        assert str(parsed) == sizes
        assert cuda_schedule.latent_bytes(schedule.latent, 1, parsed.d_in, schedule.parts) <= limit
        assert cuda_schedule.output_bytes(schedule.output, 1, parsed) <= limit


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Where `tune` keeps schedules."""
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path))
    cuda_schedule.measured.cache_clear()
    yield tmp_path / "cuda_schedules.json"
    cuda_schedule.measured.cache_clear()


def test_what_was_tuned_is_kept_and_taken(own_table):
    sizes = cuda_schedule.Sizes(512, (512, 64), ((40,), (33, 17)))
    chosen = Schedule(2, Blocks(1, 1, 2), Blocks(2, 0, 1))
    device = cuda_schedule.Device("NVIDIA H100 80GB HBM3", 132, 227 << 10)
    before = cuda_schedule.schedule_for(sizes, 1, device)
    assert before != chosen
    for of, rows in ((str(sizes), 1), (f"{sizes}*4", 3)):
        tune.keep([{"sizes": of, "schedule": chosen}], device.name)
        assert cuda_schedule.schedule_for(sizes, rows, device) == chosen
    assert cuda_schedule.schedule_for(sizes, 2, device) == before
    assert cuda_schedule.schedule_for(sizes, 1, device._replace(name="another")) == before
    assert f"28672x8192:{rank_for_bits(28672, 8192, 0.1, 1)}" in cuda_schedule.measured()[device.name]
    assert own_table.read_text().count("\n") == 6
    assert [path.name for path in own_table.parent.iterdir()] == [own_table.name]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"GPU": [1]}', '{"GPU": {"1x1:1": [1, [1, 0, 1]]}}', '{"GPU": {"1x1:1": [1, [9, 9, 1], [1, 0, 1]]}}'],
)
def test_a_damaged_table_is_passed_over_and_not_written_over(text, own_table, monkeypatch):
    said = []
    monkeypatch.setattr(cuda_layer.log, "warning", lambda message, *of: said.append(message % of))
    own_table.write_text(text)
    assert "NVIDIA H100 80GB HBM3" in cuda_schedule.measured()
    assert f"{own_table} is no table of launch schedules" in said[0]
    with pytest.raises(ValueError, match="remove it, and run `littlebit tune` again"):
        tune.keep([], "GPU")
    assert own_table.read_text() == text


def test_tune_says_that_it_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "tuning needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_measured_schedule_is_taken_for_its_gpu_and_a_vector_only():
    device = cuda_schedule.Device("NVIDIA H100 80GB HBM3", 132, 227 << 10)
    known = cuda_schedule.measured()[device.name]
    rank = rank_for_bits(28672, 8192, 0.55, 1)
    layer = cuda_schedule.Sizes(8192, (28672,), ((rank,),))
    schedule = known[f"28672x8192:{rank}"]
    estimate = cuda_schedule.estimated(layer, 132)
    assert schedule != estimate
    assert cuda_schedule.schedule_for(layer, 1, device) == schedule
    assert cuda_schedule.schedule_for(layer, 1, device._replace(name="another")) == estimate
    of_two = cuda_schedule.schedule_for(layer, 2, device)
    assert of_two
    assert of_two.parts == estimate.parts
