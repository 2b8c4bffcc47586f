"""Compile CUDA kernels to PTX, cache them on disk, and launch them through the CUDA driver.

Numba compiles the kernels. The driver loads and launches them, which costs a few microseconds of Python and allows
programmatic dependent launch: arguments are addresses and numbers.
"""

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
from .cuda_elements import RECIPES, SIGNATURES
from .cuda_gemv import latent
from .cuda_schedule import Device

log = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # the first compute capability that has all instructions
PDL_CAPABILITY = (9, 0)  # the first one with programmatic dependent launch
VERSIONS = ("plain", "tensor", "pdl")  # of the GEMV, simple to fast: see cuda_gemv.py
PTX = "kernel.ptx"


class Array(NamedTuple):
    """A kernel's view of a tensor.

    Attributes
    ----------
    address : int
        On the device.
    size : int
        Number of elements.
    """

    address: int
    size: int

    def __len__(self) -> int:
        return self.size


def array(tensor: Tensor) -> Array:
    """Return the kernel's view of a contiguous tensor."""
    return Array(tensor.data_ptr(), tensor.numel())


def kernel_layout(tensor: Tensor) -> Tensor:
    """Copy a tensor, if need be, to what kernels read: contiguous, 16-byte aligned, int32 words or float16 scales."""
    if tensor.dtype in (torch.uint8, torch.int16):
        tensor = tensor.to(torch.int32) & (0xFF if tensor.dtype == torch.uint8 else 0xFFFF)
    elif tensor.is_floating_point():
        tensor = tensor.to(torch.float16)
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@cache
def device_properties(index: int) -> Device:
    """Return the properties of GPU `index`."""
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def unusable(index: int) -> str | None:
    """Return why the kernels cannot run on GPU `index`, or None if they can; compiles one to find out."""
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        return f"the kernels need compute capability {least}, and this GPU has {capability[0]}.{capability[1]}"
    with torch.cuda.device(index):
        load_kernel(latent("half", True, True, 1, capability >= PDL_CAPABILITY), index)
    return None


# ---- Compiling


@cache
def compiled(kernel: Any, capability: tuple[int, int]) -> tuple[bytes, bytes]:
    """Return a kernel's PTX and its name there, from the cache folder if possible, for compiling takes seconds."""
    recipe = f"{RECIPES[kernel]} {SIGNATURES[kernel]} {capability} {source_digest()}"
    try:
        folder = cache_path("ptx", hashlib.sha256(recipe.encode()).hexdigest()[:32])
        text = (build_once(folder, lambda part: write_ptx(part, kernel, capability)) / PTX).read_bytes()
    except OSError as error:
        log.info("littlebit: CUDA kernels are compiled for this run alone, for the cache folder fails: %s", error)
        text = ptx_of(kernel, capability)
    found = re.search(rb"\.entry\s+(\w+)\(", text)
    assert found
    return text, found[1]


@cache
def source_digest() -> str:
    """Compute a digest of everything that PTX depends on: the kernels' modules and the compiler's versions."""
    files = sorted(Path(__file__).parent.glob("cuda*.py"))
    versions = [metadata.version(name) for name in ("numba", "numba-cuda", "llvmlite")]
    text = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(text + repr([*versions, sys.prefix]).encode()).hexdigest()


def write_ptx(folder: Path, kernel: Any, capability: tuple[int, int]) -> None:
    """Write a kernel's PTX into a folder."""
    (folder / PTX).write_bytes(ptx_of(kernel, capability))


def ptx_of(kernel: Any, capability: tuple[int, int]) -> bytes:
    """Compile a kernel to PTX."""
    ptx, _ = cuda.compile(kernel.py_func, SIGNATURES[kernel], cc=capability, output="ptx", device=False, abi="numba")
    text = ptx if isinstance(ptx, bytes) else ptx.encode()
    if b"wgmma" in text:  # exists only in the architecture-specific target
        text = re.sub(rb"\.target sm_(\d+)\b", rb".target sm_\1a", text)
    return text


# ---- Launching


@cache
def load_kernel(kernel: Any, index: int) -> Any:
    """Load a kernel on GPU `index`, the current one, and allow it all of a block's shared memory."""
    from cuda.bindings import driver

    library, name = load_library(kernel, torch.cuda.get_device_capability(index))
    function = checked(driver.cuLibraryGetKernel(library, name))
    device, names = checked(driver.cuDeviceGet(index)), driver.CUfunction_attribute
    fixed = checked(driver.cuKernelGetAttribute(names.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function, device))
    most = names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuKernelSetAttribute(most, device_properties(index).shared_bytes - fixed, function, device))
    return driver.CUfunction(int(function))


@cache
def load_library(kernel: Any, capability: tuple[int, int]) -> tuple[Any, bytes]:
    """Load a kernel's PTX into the driver, for all GPUs of a capability; return the library and the kernel's name."""
    from cuda.bindings import driver

    text, name = compiled(kernel, capability)
    return checked(driver.cuLibraryLoadData(text, None, None, 0, None, None, 0)), name


def checked(answer: Any) -> Any:
    """Return the value in a driver call's answer.

    Raises
    ------
    RuntimeError
        If the call failed, with the driver's name of the error.
    """
    code, *values = answer
    if int(code):
        raise RuntimeError(f"the CUDA driver failed: {code.name}")
    return values[0] if values else None


def start(stream: int, pdl: bool, kernel: Any, grid: tuple[int, int, int], threads: int, size: int, args: Any) -> None:
    """Launch a kernel on a stream of the current device.

    Parameters
    ----------
    stream : int
        The stream's handle.
    pdl : bool
        Whether it may start before the kernel before it has ended.
    kernel : kernel from a `kernel_factory`
    grid : three int
    threads : int
        Of a block.
    size : int
        Bytes of dynamic shared memory of a block.
    args : sequence of Array, int, float, or tuples of them
    """
    from cuda.bindings import driver

    values = np.array([argument_bits(arg) for arg in flatten(args)], np.uint64)
    pointers = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = size, stream
    if pdl:
        config.attrs, config.numAttrs = [pdl_attribute()], 1
    function = load_kernel(kernel, torch.cuda.current_device())
    checked(driver.cuLaunchKernelEx(config, function, pointers.ctypes.data, 0))


def flatten(args: Iterable[Any]) -> Iterator[Any]:
    """Yield arguments, with tuples as their entries, which is how a kernel gets them."""
    for arg in args:
        yield from arg if type(arg) is tuple else (arg,)


def argument_bits(arg: Any) -> int:
    """Return an argument's bits: an address, an integer, or a float32."""
    if isinstance(arg, Array):
        return arg.address
    return int(np.float32(arg).view(np.uint32)) if isinstance(arg, float) else arg


@cache
def pdl_attribute() -> Any:
    """Return the launch attribute for programmatic dependent launch."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
