"""The CUDA kernels, without a GPU: run in a simulator, and compiled for the GPUs that they are meant for."""

import itertools
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from littlebit.fast.kernels import cuda as kernels
from numba import cuda, types

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0))
ELEMENTS = {"half": types.float16, "bfloat": types.uint16, "single": types.float32}
FRAME_SIZE = 0x11  # attribute of a kernel in a cubin: bytes of local memory, where registers are spilled to


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
    kernels.latent.cache_clear()  # device functions keep what they were compiled for
    kernels.output.cache_clear()
    kinds = ELEMENTS if capability == CAPABILITIES[-1] else ("bfloat",)
    for kind, wide, paths in itertools.product(kinds, (False, True), (1, 2)):
        if kind != "bfloat" and paths == 2:
            continue
        for kernel, signature in (
            (kernels.latent(kind, wide, paths), latent_signature(ELEMENTS[kind])),
            (kernels.output(kind, wide, paths, 4), output_signature(ELEMENTS[kind])),
        ):
            assert compiled(kernel, signature, capability)[FRAME_SIZE] == 0


def arrays(*elements):
    return [types.Array(element, 1, "C") for element in elements]


def latent_signature(element):
    half, word = types.float16, types.uint32
    sizes = [types.int64] * 4
    tensors = arrays(element, half, half, word, word)
    return types.void(*tensors, *sizes, *arrays(types.float32), types.int64, types.UniTuple(types.int64, 3))


def output_signature(element):
    half, word = types.float16, types.uint32
    tensors = arrays(types.float32, half, half, word, word, half, half)
    logs = types.UniTuple(types.int64, 3)
    return types.void(*tensors, *[types.int64] * 4, *arrays(element), types.int64, logs)


def compiled(kernel, signature, capability):
    """Compile to PTX and on to a cubin; the kernel's attributes, by number."""
    from cuda.core import Program, ProgramOptions

    ptx, _ = cuda.compile(kernel.py_func, signature, cc=capability, output="ptx", device=False, abi="numba")
    text = ptx if isinstance(ptx, str) else ptx.decode()
    assert text.count("mma.sync") == 32
    options = ProgramOptions(arch=f"sm_{capability[0]}{capability[1]}")
    return attributes_of(bytes(Program(text, "ptx", options).compile("cubin").code))


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


def test_plans_fit_what_they_are_for():
    for (d_out, d_in), rank, multiprocessors in itertools.product(
        ((16, 17), (576, 1536), (4096, 4096), (28672, 8192), (8192, 28672)), (17, 600, 6336), (16, 132)
    ):
        plan = kernels.plan_for(d_out, d_in, [rank], multiprocessors)
        assert plan.parts <= -(-d_in // 512)
        assert all(number & (number - 1) == 0 for number in plan)  # the kernels shift by their logarithms
        assert plan.latent_warps % plan.latent_sharing == plan.output_warps % plan.output_sharing == 0


def test_narrow_words_are_left_to_others():
    from littlebit.fast.bench import random_path

    generator = torch.Generator().manual_seed(0)
    assert kernels.takes([random_path(40, 50, 33, generator)])
    assert not kernels.takes([random_path(40, 50, 16, generator)])
    assert not kernels.takes([random_path(40, 50, 33, generator)] * 3)
