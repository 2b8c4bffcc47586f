"""Test the decoder's CUDA kernels without a GPU: run them in a simulator, and compile them for each capability."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from littlebit.fast.kernels import cuda_decode as kernels, cuda_driver, cuda_latent_attention
from littlebit.fast.kernels.cuda_decode import AttentionConfig
from test_cuda import CAPABILITIES, FRAME_SIZE, compiled

REGISTERS = 0x2F  # a kernel's attribute in a cubin: registers of a thread
ALL_REGISTERS = 65536  # registers of a multiprocessor
ATTENTION = (
    AttentionConfig("single", 128, 1, 16, False),
    AttentionConfig("half", 128, 1, 16, False),
    AttentionConfig("single", 128, 1, 16, False, combine=False),
    AttentionConfig("single", 128, 8, 8, False, combine=False),
    AttentionConfig("single", 128, 8, 8, False),
    AttentionConfig("single", 128, 4, 8, True),
    AttentionConfig("single", 64, 3, 8, False),
    AttentionConfig("single", 64, 1, 8, True),
    AttentionConfig("single", 256, 2, 8, False),
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
def test_kernels_compile_without_spills_and_fit_the_registers(capability, monkeypatch):
    pytest.importorskip("cuda.core")
    monkeypatch.setattr(
        "numba.cuda.dispatcher.get_current_device", lambda: SimpleNamespace(compute_capability=capability)
    )
    early, newest = capability >= cuda_driver.PDL_CAPABILITY, capability == CAPABILITIES[-1]
    factories = kernels.embed, kernels.add, kernels.rms_norm, kernels.swiglu, kernels.logits
    factories += (
        kernels.attend,
        cuda_latent_attention.store_latents,
        cuda_latent_attention.attend_latents,
        cuda_latent_attention.up_project_values,
    )
    for factory in factories:  # device functions stay compiled for the first capability
        factory.cache_clear()
    plain = [(kernels.embed(table), kernels.THREADS) for table in (kernels.TABLES if newest else ["half"])]
    plain += [(factory("half"), kernels.THREADS) for factory in (kernels.add, kernels.rms_norm)]
    plain += [(kernels.swiglu("half"), kernels.THREADS)]
    plain += [(kernels.logits("half", *of), kernels.THREADS) for of in (("8", 1), ("4", 4))]
    latent = [cuda_latent_attention.store_latents(each, early) for each in cuda_latent_attention.CACHE_FORMATS]
    tiles = TILES if newest else [config._replace(tokens=32, grouped=False) for config in TILES]
    plain += [(cuda_latent_attention.attend_latents(config, early), config.threads) for config in tiles]
    latent += [
        cuda_latent_attention.up_project_values("single", *of, early) for of in ((64, True), (128, False), (256, True))
    ]
    plain += [(kernel, cuda_latent_attention.THREADS) for kernel in latent]
    for config in (
        ATTENTION if newest else [config._replace(group=min(config.group, 2), warps=8) for config in ATTENTION[::3]]
    ):
        plain.append((kernels.attend(config, early), config.threads))
    for kernel, threads in plain:
        text, attributes = compiled(kernel, capability)
        assert attributes[FRAME_SIZE] == 0
        assert attributes[REGISTERS] * threads <= ALL_REGISTERS
    assert (b"griddepcontrol.wait" in text) == early
    assert b"atom.acq_rel.gpu" in text
