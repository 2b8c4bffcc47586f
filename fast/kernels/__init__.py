"""Kernels that compute with packed signs, and the one place that chooses among them."""

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PackedFactors, check_words, row_bits
from . import cpu


def drop_stale_code() -> None:
    """Delete compiled kernels that were made from other sources.

    Numba looks at the file of a function to see whether its cached code is good, but not at those of the functions
    that it calls, which that code contains.
    """
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    place = Path(cpu.layer.stats.cache_path or sources[0].parent)
    note = place / "littlebit-kernels.sha256"
    with contextlib.suppress(OSError):  # a cache that cannot be written cannot be stale for long
        if note.exists() and note.read_text() == digest:
            return
        place.mkdir(parents=True, exist_ok=True)
        for path in place.glob("*.nb[ci]"):
            path.unlink(missing_ok=True)
        note.write_text(digest)


drop_stale_code()


def packed_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """Sum of the paths' outputs for each row of x, from packed words: on a CPU in Numba, elsewhere by unpacking.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor.

    Raises
    ------
    ValueError
        If words and x are on different devices, or the words do not fit the scales.
    """
    check_call(x, paths)
    if x.device.type != "cpu":
        return unpacked_linear(x, paths)
    needs_gradient = x.requires_grad and torch.is_grad_enabled()
    if type(x) is Tensor and not needs_gradient and not torch.compiler.is_compiling():
        return cpu.packed_linear(x, paths)  # the operator's own way there costs ten microseconds
    return torch.ops.littlebit.packed_linear(x, [tensor for path in paths for tensor in path])


def check_call(x: Tensor, paths: Sequence[PackedFactors]) -> None:
    """Raise ValueError if the words are on another device or do not fit the scales."""
    for path in paths:
        for words, count in (path.u_words, path.rank), (path.v_words, x.shape[-1]):
            if words.device != x.device:
                raise ValueError(
                    f"packed words and input must be on one device, but the words are on {words.device} and the input "
                    f"is on {x.device}: move the model or the input with .to(device)"
                )
            check_words(words, count)


def plan_for(x: Tensor, tensors: Sequence[Tensor], plan: cpu.Plan | None) -> cpu.Plan | None:
    """A checked plan for the tensors of a layer's paths: the given one if it still fits them, or a new one.

    None where a plan does not serve: under torch.compile and its like, on other devices, for inputs that need a
    gradient, and for words that the kernels do not read as they are.

    Raises
    ------
    ValueError
        If the words are on another device than x or do not fit the scales.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or not x.is_cpu:
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    if plan is not None and plan.fits(tensors):
        return plan
    check_call(x, [PackedFactors(*each) for each in batched(tensors)])
    plan = cpu.Plan(tensors)
    return plan if plan.fits(tensors) else None


# The same as an operator, which torch.compile and its like can put into their graphs.
library = torch.library.Library("littlebit", "DEF")
library.define("packed_linear(Tensor x, Tensor[] paths) -> Tensor")


@torch.library.impl(library, "packed_linear", "CPU")
def packed_linear_on_cpu(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The operator: x (rows, d_in), and the tensors of all paths one after the other."""
    return cpu.packed_linear(x, [PackedFactors(*each) for each in batched(tensors)])


@torch.library.register_fake("littlebit::packed_linear", lib=library)
def packed_linear_shape(x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """An empty tensor of the operator's output shape and dtype."""
    (first, *_) = batched(tensors)
    return x.new_empty((x.shape[0], PackedFactors(*first).h.shape[0]), dtype=torch.float32)


def keep_for_gradient(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor]], output: Tensor) -> None:
    """Keep the packed tensors, which are all that the gradient needs, and x's dtype."""
    x, tensors = inputs
    ctx.save_for_backward(*tensors)
    ctx.dtype = x.dtype


def packed_linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, list[None]]:
    """Gradient of x, dx = A^T (B^T dy), with signs unpacked while this lasts; words and scales have none."""
    tensors = ctx.saved_tensors
    a, b = unpacked([PackedFactors(*each) for each in batched(tensors)])
    return ((grad @ b) @ a).to(ctx.dtype), [None] * len(tensors)


torch.library.register_autograd(
    "littlebit::packed_linear", packed_linear_gradient, setup_context=keep_for_gradient, lib=library
)


def batched(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tensors of each path."""
    return [tensors[at : at + cpu.FIELDS] for at in range(0, len(tensors), cpu.FIELDS)]


def unpacked_linear(x: Tensor, paths: Sequence[PackedFactors]) -> Tensor:
    """`packed_linear` on any device, by two matrix products with unpacked signs; waits for no device.

    All paths are one pair of factors, y = B (A x), with scales folded in float32 (see `linear.folded`). A, B and A x
    are then rounded to x's dtype if it is float16 or bfloat16, in which torch multiplies. B is divided by its largest
    magnitude first where that exceeds one, since products of float16 scales need not fit float16.

    Parameters
    ----------
    x : (rows, d_in) float tensor
    paths : sequence of PackedFactors on x's device

    Returns
    -------
    (rows, d_out) float32 tensor; A and B take R * (d_in + d_out) elements while the call lasts, for a total rank R.
    """
    dtype = x.dtype if x.dtype in (torch.float16, torch.bfloat16) else torch.float32
    a, b = unpacked(paths)
    largest = b.abs().amax().clamp(min=1)
    t = functional.linear(x.to(dtype), a.to(dtype))  # (rows, R)
    return functional.linear(t, (b / largest).to(dtype)).float() * largest


def unpacked(paths: Sequence[PackedFactors]) -> tuple[Tensor, Tensor]:
    """All paths folded into one pair in float32 (see `linear.folded`): A, (R, d_in), and B, (d_out, R)."""
    a = torch.cat([path.g * signs(path.v_words, len(path.g)) for path in paths])
    b = torch.cat([path.h[:, None] * signs(path.u_words, path.rank) * path.ell for path in paths], dim=1)
    return a, b


def signs(words: Tensor, count: int) -> Tensor:
    """The first `count` signs of each row of words as float32, with no look at the pad bits."""
    return 1 - 2 * row_bits(words)[..., :count].float()
