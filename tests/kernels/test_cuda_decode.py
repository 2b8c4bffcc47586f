"""The decoder's CUDA kernels, without a GPU: run in a simulator, and compiled for the GPUs that they are meant for."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from littlebit.fast.kernels import cuda_decode as kernels, cuda_driver, cuda_latent_attention
from littlebit.fast.kernels.cuda_decode import Attention
from test_cuda import CAPABILITIES, FRAME_SIZE, compiled

REGISTERS = 0x2F  # attribute of a kernel in a cubin: of a thread
ALL_REGISTERS = 65536  # of a multiprocessor
ATTENTION = (
    Attention("single", "half", 128, 1, 16, False),
    Attention("half", "half", 128, 1, 16, False),
    Attention("single", "half", 128, 1, 16, False, whole=False),
    Attention("single", "half", 128, 8, 8, False, whole=False),
    Attention("single", "half", 128, 8, 8, False),
    Attention("single", "half", 128, 4, 8, True),
    Attention("single", "bfloat", 64, 3, 8, False),
    Attention("single", "half", 64, 1, 8, True),
    Attention("single", "half", 256, 2, 8, False),
)
TILES = (
    cuda_latent_attention.LatentTile("single", "half", 128, 64, True),
    cuda_latent_attention.LatentTile("single", "byte", 64, 64, False),
    cuda_latent_attention.LatentTile("half", "half", 256, 32, True),
)


def test_properties_in_the_simulator():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "simulated_decode.py"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spills_and_with_the_registers_that_there_are(capability, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    early, newest = capability >= cuda_driver.PDL_CAPABILITY, capability == CAPABILITIES[-1]
    factories = kernels.embed, kernels.added, kernels.normed, kernels.gated, kernels.logits
    factories += (
        kernels.attend,
        cuda_latent_attention.latents,
        cuda_latent_attention.attend_latents,
        cuda_latent_attention.expand_latents,
    )
    for factory in factories:  # device functions keep what they were compiled for
        factory.cache_clear()
    plain = [(kernels.embed(kind), kernels.EIGHTS) for kind in (kernels.TABLES if newest else ["half"])]
    plain += [(factory("half"), kernels.EIGHTS) for factory in (kernels.added, kernels.normed)]
    plain += [(kernels.gated("half", "silu"), kernels.EIGHTS)]
    plain += [(kernels.logits("half", *of), kernels.EIGHTS) for of in (("8", 1), ("4", 4))]
    latent = [cuda_latent_attention.latents(kept, early) for kept in cuda_latent_attention.KEPT]
    tiles = TILES if newest else [made._replace(tokens=32, grouped=False) for made in TILES]
    plain += [(cuda_latent_attention.attend_latents(made, early), made.threads) for made in tiles]
    latent += [
        cuda_latent_attention.expand_latents("single", *of, early) for of in ((64, True), (128, False), (256, True))
    ]
    plain += [(kernel, cuda_latent_attention.THREADS) for kernel in latent]
    for made in ATTENTION if newest else [made._replace(group=min(made.group, 2), warps=8) for made in ATTENTION[::3]]:
        plain.append((kernels.attend(made, early), made.threads))
    for kernel, threads in plain:
        text, attributes = compiled(kernel, capability)
        assert attributes[FRAME_SIZE] == 0
        assert attributes[REGISTERS] * threads <= ALL_REGISTERS
    assert (b"griddepcontrol.wait" in text) == early
    assert b"atom.acq_rel.gpu" in text
