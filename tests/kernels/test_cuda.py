"""Test the packed layer's CUDA kernels without a GPU: in a simulator, and compiled for each supported capability."""

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
    cuda_plain,
    cuda_schedule,
    cuda_unpack,
)
from littlebit.fast.kernels.cuda_schedule import LaunchConfig, Tiling

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
DTYPES = ("half", "bfloat", "single")
FRAME_SIZE = 0x11  # a kernel's attribute in a cubin: bytes of local memory, which hold spilled registers
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
    # Compile anew for this capability: device functions keep their code
    plain = cuda_plain.plain_latent, cuda_plain.plain_output
    for factory in (kernels.latent, kernels.output, *plain, cuda_unpack.unpack):
        factory.cache_clear()
    pdl = capability >= cuda_driver.PDL_CAPABILITY
    dtypes = DTYPES if capability == CAPABILITIES[-1] else ("bfloat",)
    for dtype, (wide, vectors) in itertools.product(dtypes, ((True, 1), (False, 4))):
        chosen = [kernels.latent(dtype, wide, wide, vectors, pdl), kernels.output(dtype, wide, vectors, 4, pdl)]
        if dtype == dtypes[-1] and not wide:
            prologues, sizes = ("norm", "silu", kernels.SplitKvPartials(8, 128)), (wide, wide, vectors, pdl, 6)
            chosen += [kernels.latent("single", *sizes, prologue) for prologue in prologues]
            chosen += [kernels.output("single", wide, vectors, 4, pdl, *each) for each in ((3, "bias"), (1, "add"))]
        for kernel in chosen:
            text, attributes = compiled(kernel, capability)
            assert text.count(b"mma.sync") == 3 * vectors
            assert (b"griddepcontrol.wait" in text) == pdl
            assert attributes[FRAME_SIZE] == 0
    for kernel in (cuda_plain.plain_latent("half"), cuda_plain.plain_output("half")):
        assert compiled(kernel, capability)[1][FRAME_SIZE] == 0
    for dtype, paths in (("half", 1), ("bfloat", 2)):
        text, attributes = compiled(cuda_unpack.unpack(dtype, paths, pdl), capability)
        assert b"st.global.v4" in text
        assert attributes[FRAME_SIZE] == 0


@pytest.mark.parametrize(("capability", "wgmma"), [((8, 0), False), ((9, 0), False), ((9, 0), True)])
def test_gemm_kernels_compile_without_spills(capability, wgmma, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    cuda_gemm.scale_vectors.cache_clear()
    cuda_gemm.gemm.cache_clear()
    pdl = capability >= cuda_driver.PDL_CAPABILITY
    large, small = cuda_schedule.tiles_for(100, wgmma)[0], cuda_schedule.tiles_for(16, wgmma)[0]
    chosen = [cuda_gemm.gemm(dtype, tile, 1, 2, pdl, wgmma) for dtype, tile in (("half", large), ("bfloat", small))]
    chosen += [cuda_gemm.gemm("single", large, 2, 1, pdl, wgmma, direct) for direct in (False, True)]
    for kernel in chosen:
        text, attributes = compiled(kernel, capability)
        assert (b"wgmma.mma_async" if wgmma else b"mma.sync.aligned.m16n8k16") in text
        assert attributes[FRAME_SIZE] == 0
    if not wgmma:
        for scaled in (("half", False, 2, 1), ("single", True, 0, 8)):
            assert compiled(cuda_gemm.scale_vectors(*scaled, pdl), capability)[1][FRAME_SIZE] == 0


@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("rows", [5, 16, 17, 33, 64, 65, 1000])
def test_gemm_tiles_fit_shared_memory_and_are_filled(rows, wgmma):
    limit = (227 if wgmma else 99) << 10
    for (d_out, d_in), ranks in itertools.product(SHAPES, ((1,), (600,), (300, 310), (6336,))):
        shape = cuda_schedule.LayerShape(d_in, (d_out,), (ranks,))
        config = cuda_schedule.gemm_config(shape, rows, 132, wgmma)
        assert 1 <= config.split_k <= max(1, cuda_schedule.steps_of(d_in))
        for tile in (config.latent, config.output):
            assert max(tile.shared_bytes(len(ranks)), tile.shared_bytes(1, True)) <= limit
            assert tile.threads % tile.rows == 0
            assert tile.vectors < 2 * max(rows, 16)
        assert config.latent.fits_wgmma or not wgmma or rows <= 32


@pytest.mark.parametrize("ranks", [(64,), (184,), (300, 310), (1096,), (6336,)])
def test_a_layer_is_faster_unpacked_from_some_number_of_rows_on(ranks):
    for d_out, d_in in SHAPES:
        shape = cuda_schedule.LayerShape(d_in, (d_out,), (ranks,))
        faster = [cuda_schedule.is_faster_unpacked(shape, 1 << log) for log in range(17)]
        assert faster == sorted(faster)
        assert not any(faster[:6])
        assert all(faster[11:]) or d_in < 100


def compiled(kernel, capability):
    """Compile a kernel; return its PTX and, from its cubin, its attributes by number."""
    from cuda.core import Program, ProgramOptions  # pyright: ignore[reportAttributeAccessIssue]

    text, _ = cuda_driver.compiled.__wrapped__(kernel, capability)
    options = ProgramOptions(arch=f"sm_{capability[0]}{capability[1]}{'a' if b'wgmma' in text else ''}")
    return text, attributes_of(bytes(Program(text.decode(), "ptx", options).compile("cubin").code))


def attributes_of(cubin):
    """Read the attributes of the only kernel in a cubin, from its section .nv.info."""
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
def test_launch_configs_fit_shared_memory(rows, multiprocessors, shared_bytes):
    device = cuda_schedule.Device("any", multiprocessors, shared_bytes)
    vectors = cuda_schedule.vectors_of(rows)
    for (d_out, d_in), ranks in itertools.product(SHAPES, ((1,), (17,), (600,), (300, 310), (6336,))):
        shape = cuda_schedule.LayerShape(d_in, (d_out, d_out), (ranks, ranks[:1]))
        config = cuda_schedule.launch_config(shape, rows, device)
        if config is None:  # long rows: bit planes of four vectors, and words of signs
            assert vectors == 4 or shared_bytes == 99 << 10
            continue
        assert config.split_k <= max(1, d_in // 256)
        assert cuda_schedule.latent_shared_bytes(config.latent, vectors, d_in, config.split_k) <= shared_bytes
        assert cuda_schedule.output_shared_bytes(config.output, vectors, shape) <= shared_bytes
        for tiling in (config.latent, config.output):
            assert 32 <= tiling.threads <= 512
            assert tiling.row_tiles >= 1


def test_a_kernel_is_compiled_once_and_kept(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(cuda_driver, "ptx_of", lambda kernel, of: made.append(of) or b".visible .entry some_name(")
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "cache"))
    compiled_now = cuda_driver.compiled.__wrapped__
    one, other = (cuda_plain.plain_output(dtype) for dtype in ("half", "single"))
    for _ in range(2):
        assert compiled_now(one, (9, 0)) == (b".visible .entry some_name(", b"some_name")
    assert made == [(9, 0)]
    compiled_now(other, (9, 0))
    compiled_now(one, (8, 0))
    assert made == [(9, 0), (9, 0), (8, 0)]
    monkeypatch.setattr(cuda_driver, "source_digest", lambda: "changed")
    compiled_now(one, (9, 0))
    (tmp_path / "file").touch()
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path / "file"))  # no folder can be made in a file
    assert compiled_now(one, (9, 0))[1] == b"some_name"
    assert len(made) == 5


def test_measured_configs_are_for_existing_layers_and_fit_their_gpu():
    limit = 227 << 10
    known = cuda_schedule.measured_configs()["NVIDIA H100 80GB HBM3"]
    for d_out, d_in in ((4096, 4096), (28672, 8192)):
        assert f"{d_out}x{d_in}:{rank_for_bits(d_out, d_in, 0.1, 1)}" in known
    for name, config in known.items():
        d_outs, d_in, ranks = re.split("[x:]", name)
        ranks = tuple(tuple(map(int, each.split("+"))) for each in ranks.split(","))
        shape = cuda_schedule.LayerShape(int(d_in), tuple(map(int, d_outs.split(","))), ranks)
        assert str(shape) == name
        assert cuda_schedule.latent_shared_bytes(config.latent, 1, shape.d_in, config.split_k) <= limit
        assert cuda_schedule.output_shared_bytes(config.output, 1, shape) <= limit


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Return the path where `tune` saves configurations, in an empty cache folder."""
    monkeypatch.setenv("LITTLEBIT_CACHE", str(tmp_path))
    cuda_schedule.measured_configs.cache_clear()
    yield tmp_path / "cuda_schedules.json"
    cuda_schedule.measured_configs.cache_clear()


def test_tuned_configs_are_saved_and_used(own_table):
    shape = cuda_schedule.LayerShape(512, (512, 64), ((40,), (33, 17)))
    chosen = LaunchConfig(2, Tiling(1, 1, 2), Tiling(2, 0, 1))
    device = cuda_schedule.Device("NVIDIA H100 80GB HBM3", 132, 227 << 10)
    before = cuda_schedule.launch_config(shape, 1, device)
    assert before != chosen
    for name, rows in ((str(shape), 1), (f"{shape}*4", 3)):
        tune.keep([{"sizes": name, "schedule": chosen}], device.name)
        assert cuda_schedule.launch_config(shape, rows, device) == chosen
    assert cuda_schedule.launch_config(shape, 2, device) == before
    assert cuda_schedule.launch_config(shape, 1, device._replace(name="another")) == before
    assert f"28672x8192:{rank_for_bits(28672, 8192, 0.1, 1)}" in cuda_schedule.measured_configs()[device.name]
    assert own_table.read_text().count("\n") == 6
    assert [path.name for path in own_table.parent.iterdir()] == [own_table.name]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"GPU": [1]}', '{"GPU": {"1x1:1": [1, [1, 0, 1]]}}', '{"GPU": {"1x1:1": [1, [9, 9, 1], [1, 0, 1]]}}'],
)
def test_a_damaged_table_is_ignored_and_not_overwritten(text, own_table, monkeypatch):
    messages = []
    monkeypatch.setattr(cuda_schedule.log, "warning", lambda message, *of: messages.append(message % of))
    own_table.write_text(text)
    assert "NVIDIA H100 80GB HBM3" in cuda_schedule.measured_configs()
    assert f"{own_table} must hold a table of launch configurations" in messages[0]
    with pytest.raises(ValueError, match="remove it, and run `littlebit tune` again"):
        tune.keep([], "GPU")
    assert own_table.read_text() == text


def test_tune_without_a_gpu_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "tuning needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_measured_config_is_used_for_its_gpu_and_number_of_vectors_only():
    device = cuda_schedule.Device("NVIDIA H100 80GB HBM3", 132, 227 << 10)
    known = cuda_schedule.measured_configs()[device.name]
    rank = rank_for_bits(28672, 8192, 0.55, 1)
    shape = cuda_schedule.LayerShape(8192, (28672,), ((rank,),))
    config = known[f"28672x8192:{rank}"]
    estimate = cuda_schedule.estimated_config(shape, 132)
    assert config != estimate
    assert cuda_schedule.launch_config(shape, 1, device) == config
    assert cuda_schedule.launch_config(shape, 1, device._replace(name="another")) == estimate
    of_two = cuda_schedule.launch_config(shape, 2, device)
    assert of_two
    assert of_two.split_k == estimate.split_k
