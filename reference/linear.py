"""Apply a factorized layer, forward and backward, without forming its dense weight (LittleBit, arXiv 2506.13771)."""

from collections.abc import Sequence

import numpy as np

from .arrays import Array, check_floats
from .factors import Factors
from .packing import PackedFactors, unpack_factors
from .signs import named_rule


def linear(x: Array, paths: Sequence[Factors], bias: Array | None = None) -> Array:
    """Compute the output of a LittleBit layer: the sum of its paths, plus the bias.

    y = sum over paths of ((((x * g) V_sign) * ell) U_sign^T) * h + bias

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of Factors
    bias : (d_out,) float array, optional

    Returns
    -------
    (..., d_out) float array. Each row of x takes rank * (d_in + d_out) additions a path; a dense layer takes
    d_in * d_out multiply-adds.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, or paths differ in size.
    TypeError
        If x does not hold floating-point numbers or is no array, or paths is not a list.

    Examples
    --------
    >>> from littlebit.reference import dual_svid
    >>> path = dual_svid(np.array([[1.0, -2.0], [-2.0, 4.0]]), rank=1)
    >>> linear(np.array([1.0, 1.0]), [path]).round(6)
    array([-1.,  2.])
    """
    check_input(x, paths, Factors, bias)
    y = path_linear(x, paths[0])
    for path in paths[1:]:
        y = y + path_linear(x, path)
    return y if bias is None else y + bias


def path_linear(x: Array, path: Factors) -> Array:
    """Compute the output of one path: ((((x * g) V_sign) * ell) U_sign^T) * h."""
    t = (x * path.g) @ path.v_sign  # (..., rank)
    return (t * path.ell) @ path.u_sign.T * path.h  # (..., d_out)


def linear_vjp(
    x: Array, paths: Sequence[Factors], grad: Array, rule: str = "smooth_sign"
) -> tuple[Array, list[Factors], Array]:
    """Compute the gradients of a loss with respect to a layer's input and all its parameters.

    This is the vector-Jacobian product (vjp) of `linear`. For each path, with one row for every row of x, V and U the
    signs of v and u:

        a = x * g,  s = a V,  t = s * ell,  z = t U^T,  y = sum over paths of z * h, plus the bias

    The chain rule goes from right to left. Write dq for dL/dq; dy is given. Scales and bias act on every row, so their
    gradients sum over rows:

        dbias = sum dy,           from y = ... + bias
        dh    = sum dy * z,       dz = dy * h,       from y = z * h
        dU    = dz^T t,           dt = dz U,         from z = t U^T
        dell  = sum dt * s,       ds = dt * ell,     from t = s * ell
        dV    = a^T ds,           da = ds V^T,       from s = a V
        dg    = sum da * x,       dx = sum over paths of da * g,       from a = x * g
        du    = rule of (u, dU),  dv = rule of (v, dV),       from U = sign(u), V = sign(v)

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of Factors
    grad : (..., d_out) float array
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
        If x does not hold floating-point numbers or is no array, or paths is not a list.

    Examples
    --------
    >>> one = np.ones(1)
    >>> path = Factors(u=np.array([[-0.3]]), v=np.array([[0.7]]), h=2 * one, ell=3 * one, g=one)
    >>> grad_x, (grad_path,), grad_bias = linear_vjp(np.array([[5.0]]), [path], np.array([[1.0]]), "straight_through")
    >>> grad_x, grad_bias
    (array([[-6.]]), array([1.]))
    >>> grad_path.u, grad_path.v, grad_path.h, grad_path.ell, grad_path.g
    (array([[30.]]), array([[-30.]]), array([-15.]), array([-10.]), array([-30.]))
    """
    check_input(x, paths, Factors)
    check_gradient(x, paths, grad)
    rows = x.reshape(-1, x.shape[-1])  # (n, d_in)
    dy = grad.reshape(-1, grad.shape[-1])  # (n, d_out)
    parts = [path_vjp(rows, path, dy, rule) for path in paths]
    grad_x = parts[0][0]
    for part, _ in parts[1:]:
        grad_x = grad_x + part
    return grad_x.reshape(x.shape), [grad_path for _, grad_path in parts], dy.sum(axis=0)


def path_vjp(x: Array, path: Factors, dy: Array, rule: str) -> tuple[Array, Factors]:
    """Compute the gradients of one path for rows x (n, d_in) and dy (n, d_out), as `linear_vjp` derives them."""
    latent_vjp = named_rule(rule)
    u_sign, v_sign = path.u_sign, path.v_sign
    a = x * path.g  # (n, d_in)
    s = a @ v_sign  # (n, rank)
    t = s * path.ell
    z = t @ u_sign.T  # (n, d_out)
    dz = dy * path.h
    dt = dz @ u_sign  # (n, rank)
    ds = dt * path.ell
    da = ds @ v_sign.T  # (n, d_in)
    grad_path = Factors(
        u=latent_vjp(path.u, dz.T @ t),
        v=latent_vjp(path.v, a.T @ ds),
        h=(dy * z).sum(axis=0),
        ell=(dt * s).sum(axis=0),
        g=(da * x).sum(axis=0),
    )
    return da * path.g, grad_path


def packed_linear(x: Array, paths: Sequence[PackedFactors], bias: Array | None = None) -> Array:
    """Compute the output of a LittleBit layer from packed words, accumulated in float32.

    The signs are unpacked first. `littlebit.fast` multiplies packed words without unpacking them.

    Parameters
    ----------
    x : (..., d_in) float array
    paths : sequence of PackedFactors
    bias : (d_out,) float array, optional

    Returns
    -------
    (..., d_out) float32 array.

    Raises
    ------
    ValueError
        If x's last axis is not d_in, paths differ in size, or the words do not fit the scales.
    TypeError
        If x does not hold floating-point numbers or is no array, or paths is not a list.
    """
    check_input(x, paths, PackedFactors, bias)
    y = linear(x.astype(np.float32), [unpack_factors(path) for path in paths])
    return y if bias is None else y + bias.astype(np.float32)


def check_input(x: Array, paths: Sequence, kind: type, bias: Array | None = None) -> None:
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


def check_gradient(x: Array, paths: Sequence[Factors], grad: Array) -> None:
    """Raise unless `grad` holds floating-point numbers in the shape of the output."""
    check_floats("the gradient", grad)
    shape = (*x.shape[:-1], paths[0].h.shape[-1])
    if tuple(grad.shape) != shape:
        raise ValueError(f"the gradient must have the output's shape {shape}, but its shape is {tuple(grad.shape)}")
