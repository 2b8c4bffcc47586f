"""Apply a factorized layer, forward and backward, without forming its dense weight (LittleBit, arXiv 2506.13771)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .arrays import check_floats
from .factors import Factors
from .kernels import dispatch
from .packing import PackedFactors
from .signs import named_rule


def linear(x: Tensor, paths: Sequence[Factors], bias: Tensor | None = None, rule: str = "smooth_sign") -> Tensor:
    """Compute the output of a LittleBit layer: the sum of its paths, plus the bias.

    y = sum over paths of ((((x * g) V_sign) * ell) U_sign^T) * h + bias

    All paths are folded into one pair of matrices, y = B (A x), so the scales cost nothing per row of x.

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of Factors
    bias : (d_out,) float tensor, optional
    rule : str
        The gradient that autograd gives a sign: a name in `signs.RULES`. It does not change the output.

    Returns
    -------
    (..., d_out) tensor of x's dtype. Each row of x takes rank * (d_in + d_out) multiply-adds a path; a dense layer
    takes d_in * d_out.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, paths differ in size, or there is no such rule.
    TypeError
        If x does not hold floating-point numbers or is no tensor, or paths is not a list.

    Examples
    --------
    >>> from littlebit.fast import dual_svid
    >>> path = dual_svid(torch.tensor([[1.0, -2.0], [-2.0, 4.0]]), rank=1)
    >>> linear(torch.tensor([1.0, 1.0]), [path]).round(decimals=4)
    tensor([-1.,  2.])
    """
    check_input(x, paths, Factors, bias)
    a, b = folded(paths, rule)
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype), bias)


def folded(paths: Sequence[Factors], rule: str = "smooth_sign") -> tuple[Tensor, Tensor]:
    """Fold the scales and all paths into one pair of matrices, for y = B (A x).

    A, (R, d_in), stacks [V_sign * g]^T of all paths. B, (d_out, R), has [h * U_sign * ell] side by side. R is the sum
    of the ranks.
    """
    signs = named_rule(rule)
    a = torch.cat([(path.g[..., :, None] * signs(path.v)).mT for path in paths], dim=-2)
    b = torch.cat([path.h[..., :, None] * signs(path.u) * path.ell[..., None, :] for path in paths], dim=-1)
    return a, b


def linear_vjp(
    x: Tensor, paths: Sequence[Factors], grad: Tensor, rule: str = "smooth_sign"
) -> tuple[Tensor, list[Factors], Tensor]:
    """Compute the gradients of a loss with respect to a layer's input and all its parameters.

    This is the vector-Jacobian product (vjp) of `linear`. For each path, with one row for every row of x, V and U the
    signs of v and u:

        a = x * g,  s = a V,  t = s * ell,  z = t U^T,  y = sum over paths of z * h, plus the bias

    The chain rule goes from right to left; autograd applies it to `linear`. Write dq for dL/dq; dy is given. Scales and
    bias act on every row, so their gradients sum over rows:

        dbias = sum dy,           from y = ... + bias
        dh    = sum dy * z,       dz = dy * h,       from y = z * h
        dU    = dz^T t,           dt = dz U,         from z = t U^T
        dell  = sum dt * s,       ds = dt * ell,     from t = s * ell
        dV    = a^T ds,           da = ds V^T,       from s = a V
        dg    = sum da * x,       dx = sum over paths of da * g,       from a = x * g
        du    = rule of (u, dU),  dv = rule of (v, dV),       from U = sign(u), V = sign(v)

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of Factors
    grad : (..., d_out) float tensor
        Gradient of the loss with respect to the output.
    rule : str
        The gradient of a sign: a name in `signs.RULES`.

    Returns
    -------
    grad_x : (..., d_in); grad_paths : list of Factors, one for each path; grad_bias : (d_out,).

    Raises
    ------
    ValueError
        If x's last axis is not d_in, paths differ in size, `grad` is not of the output's shape, or there is no such
        rule.
    TypeError
        If x does not hold floating-point numbers or is no tensor, or paths is not a list.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> path = Factors(u=torch.tensor([[-0.3]]), v=torch.tensor([[0.7]]), h=2 * one, ell=3 * one, g=one)
    >>> x, grad = torch.tensor([[5.0]]), torch.tensor([[1.0]])
    >>> grad_x, (grad_path,), grad_bias = linear_vjp(x, [path], grad, "straight_through")
    >>> grad_x, grad_bias
    (tensor([[-6.]]), tensor([1.]))
    >>> grad_path.u, grad_path.v, grad_path.h, grad_path.ell, grad_path.g
    (tensor([[30.]]), tensor([[-30.]]), tensor([-15.]), tensor([-10.]), tensor([-30.]))
    """
    check_input(x, paths, Factors)
    check_gradient(x, paths, grad)
    x = x.detach().requires_grad_()
    paths = [Factors(*(tensor.detach().requires_grad_() for tensor in path)) for path in paths]
    bias = torch.zeros_like(paths[0].h, requires_grad=True)
    with torch.enable_grad():
        y = linear(x, paths, bias, rule)
    grad_x, grad_bias, *rest = torch.autograd.grad(y, [x, bias, *(tensor for path in paths for tensor in path)], grad)
    width = len(Factors._fields)
    return grad_x, [Factors(*rest[at : at + width]) for at in range(0, len(rest), width)], grad_bias


def packed_linear(x: Tensor, paths: Sequence[PackedFactors], bias: Tensor | None = None) -> Tensor:
    """Compute the output of a LittleBit layer from packed words, accumulated in float32.

    The kernels of `kernels.dispatch`, for CPUs and for CUDA, read the packed words.

    Parameters
    ----------
    x : (..., d_in) float tensor
    paths : sequence of PackedFactors
    bias : (d_out,) float tensor, optional

    Returns
    -------
    (..., d_out) tensor of x's dtype.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, paths differ in size, x is on another device than the words, or the words do not
        fit the scales.
    TypeError
        If x does not hold floating-point numbers or is no tensor, or paths is not a list.
    """
    check_input(x, paths, PackedFactors, bias)
    y = dispatch.packed_linear(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), paths)  # (rows, d_out) float32
    if bias is not None:
        y += bias
    y = y.to(x.dtype)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def check_input(x: Tensor, paths: Sequence, kind: type, bias: Tensor | None = None) -> None:
    """Raise unless x and the bias fit the paths, which must be a list of `kind`, and hold floating-point numbers."""
    if isinstance(paths, Factors | PackedFactors):
        raise TypeError(f"paths must be a list of {kind.__name__}, got one {type(paths).__name__}: write [path]")
    if not len(paths) or not all(isinstance(path, kind) for path in paths):
        given = ", ".join(sorted({type(path).__name__ for path in paths})) or "none"
        raise TypeError(f"paths must be a list of at least one {kind.__name__}, got {given}")
    check_floats("the input", x)
    d_out, d_in = paths[0].h.shape[-1], paths[0].g.shape[-1]
    for path in paths:
        check_floats("a scale", path.g)
        if path.h.shape[-1] != d_out or path.g.shape[-1] != d_in:
            raise ValueError(
                f"all paths must have the sizes of the first, {d_out} x {d_in}, "
                f"but one is {path.h.shape[-1]} x {path.g.shape[-1]}"
            )
    if not x.ndim or x.shape[-1] != d_in:
        raise ValueError(f"the input's last axis must be d_in = {d_in}, but its shape is {tuple(x.shape)}")
    if bias is not None:
        check_floats("the bias", bias)
        if tuple(bias.shape) != (d_out,):
            raise ValueError(f"the bias must have the shape {(d_out,)}, but its shape is {tuple(bias.shape)}")


def check_gradient(x: Tensor, paths: Sequence[Factors], grad: Tensor) -> None:
    """Raise unless `grad` holds floating-point numbers in the shape of the output."""
    check_floats("the gradient", grad)
    shape = (*x.shape[:-1], paths[0].h.shape[-1])
    if tuple(grad.shape) != shape:
        raise ValueError(f"the gradient must have the output's shape {shape}, but its shape is {tuple(grad.shape)}")
