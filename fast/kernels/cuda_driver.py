"""Compile, cache and launch CUDA kernels through the driver."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

import hashlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from ..files.cache import build_once, cache_path
from .cuda_gemv import latent
from .cuda_plain import RECIPES, SIGNATURES
from .cuda_schedule import Device

log = logging.getLogger(__name__)


OLDEST = (8, 0)  # compute capability that has the instructions


EARLY = (9, 0)  # that has programmatic dependent launch


VERSIONS = ("plain", "tensor", "early")  # the ladder


PTX = "kernel.ptx"


class Array(NamedTuple):
    """Where a tensor begins on a device, and how many elements it has."""

    address: int
    size: int

    def __len__(self) -> int:
        return self.size


def array(tensor: Tensor) -> Array:
    """The array of a contiguous tensor."""
    return Array(tensor.data_ptr(), tensor.numel())


def readable(tensor: Tensor) -> Tensor:
    """A tensor as the kernels read it: row after row, 16 bytes at a time, words of 32 bits."""
    if tensor.dtype in (torch.uint8, torch.int16):
        tensor = tensor.to(torch.int32) & (0xFF if tensor.dtype == torch.uint8 else 0xFFFF)
    elif tensor.is_floating_point():
        tensor = tensor.to(torch.float16)
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@cache
def described(index: int) -> Device:
    """A GPU's properties."""
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def unusable(index: int) -> str | None:
    """Why the kernels do not run on a GPU, or None if they do."""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return f"its compute capability is {capability[0]}.{capability[1]}, and they need {OLDEST[0]}.{OLDEST[1]}"
    with torch.cuda.device(index):
        loaded(latent("half", True, True, 1, capability >= EARLY), index)
    return None


@cache
def compiled(kernel: Any, capability: tuple[int, int]) -> tuple[bytes, bytes]:
    """PTX of a kernel, and the name that it has there; kept in the cache folder, for it takes Numba seconds."""
    named = f"{RECIPES[kernel]} {SIGNATURES[kernel]} {capability} {sources()}"
    try:
        folder = cache_path("ptx", hashlib.sha256(named.encode()).hexdigest()[:32])
        text = (build_once(folder, lambda part: write_ptx(part, kernel, capability)) / PTX).read_bytes()
    except OSError as error:
        log.info("littlebit: the cache folder cannot be used, so kernels are compiled for this run alone: %s", error)
        text = ptx_of(kernel, capability)
    found = re.search(rb"\.entry\s+(\w+)\(", text)
    assert found
    return text, found[1]


@cache
def sources() -> str:
    """A digest of what makes PTX of a recipe: these modules, and the compiler of this environment."""
    files = sorted(Path(__file__).parent.glob("cuda*.py"))
    versions = [metadata.version(name) for name in ("numba", "numba-cuda", "llvmlite")]
    text = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text + repr([*versions, sys.prefix]).encode()).hexdigest()


def write_ptx(folder: Path, kernel: Any, capability: tuple[int, int]) -> None:
    """Put a kernel's PTX into a folder."""
    (folder / PTX).write_bytes(ptx_of(kernel, capability))


def ptx_of(kernel: Any, capability: tuple[int, int]) -> bytes:
    """PTX that Numba makes of a kernel."""
    ptx, _ = cuda.compile(kernel.py_func, SIGNATURES[kernel], cc=capability, output="ptx", device=False, abi="numba")
    text = ptx if isinstance(ptx, bytes) else ptx.encode()
    if b"wgmma" in text:  # only for this very capability
        text = re.sub(rb"\.target sm_(\d+)\b", rb".target sm_\1a", text)
    return text


@cache
def loaded(kernel: Any, index: int) -> Any:
    """A kernel as the driver starts it on a device, which is the current one."""
    from cuda.bindings import driver

    library, name = library_of(kernel, torch.cuda.get_device_capability(index))
    function = checked(driver.cuLibraryGetKernel(library, name))
    device, names = checked(driver.cuDeviceGet(index)), driver.CUfunction_attribute
    fixed = checked(driver.cuKernelGetAttribute(names.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function, device))
    most = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(most, described(index).shared_bytes - fixed, function, device))
    return driver.CUfunction(int(function))


@cache
def library_of(kernel: Any, capability: tuple[int, int]) -> tuple[Any, bytes]:
    """A kernel's library in the driver, for all devices of a capability, and its name there."""
    from cuda.bindings import driver

    text, name = compiled(kernel, capability)
    return checked(driver.cuLibraryLoadData(text, None, None, 0, None, None, 0)), name


def checked(answer: Any) -> Any:
    """What a call of the driver returns.

    Raises
    ------
    RuntimeError
        With the driver's name of the error.
    """
    code, *values = answer
    if int(code):
        raise RuntimeError(f"the CUDA driver failed: {code.name}")
    return values[0] if values else None


def start(
    stream: int, early: bool, kernel: Any, grid: tuple[int, int, int], threads: int, size: int, args: Any
) -> None:
    """Start a kernel on a stream of the current device."""
    from cuda.bindings import driver

    values = np.array([number_of(arg) for arg in flat(args)], np.uint64)
    pointers = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
    launching = driver.CUlaunchConfig()
    launching.gridDimX, launching.gridDimY, launching.gridDimZ = grid
    launching.blockDimX, launching.blockDimY, launching.blockDimZ = threads, 1, 1
    launching.sharedMemBytes, launching.hStream = size, stream
    if early:
        launching.attrs, launching.numAttrs = [early_launch()], 1
    checked(driver.cuLaunchKernelEx(launching, loaded(kernel, torch.cuda.current_device()), pointers.ctypes.data, 0))


def flat(args: Iterable[Any]) -> Iterator[Any]:
    """Arguments, and the entries of those that are tuples, which is how a kernel gets them."""
    for arg in args:
        yield from arg if type(arg) is tuple else (arg,)


def number_of(arg: Any) -> int:
    """An argument's bits: an address, an integer, or a float32."""
    if isinstance(arg, Array):
        return arg.address
    return int(np.float32(arg).view(np.uint32)) if isinstance(arg, float) else arg


@cache
def early_launch() -> Any:
    """The launch attribute that lets a kernel start before the one before it has ended."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
