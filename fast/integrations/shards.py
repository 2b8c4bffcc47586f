"""Divide a packed layer among processes, as tensor parallelism divides a dense one.

| layer | divided | each process computes |
|---|---|---|
| column-parallel | rows of U, and h | its outputs, of all inputs |
| row-parallel | columns of V^T, and g | all outputs, of its inputs, to be added up |

W = diag(h) U diag(ell) V^T diag(g), so every share is again a packed layer, of the same rank.
"""

from torch import Tensor

from ..packing import pack_signs, unpack_signs


def output_share(name: str, tensor: Tensor, start: int, size: int) -> Tensor:
    """Take the share of one of a path's tensors that computes `size` outputs from `start` on.

    Parameters
    ----------
    name : str
        Name of the tensor in PackedFactors.
    tensor : Tensor
    start, size : int
    """
    return tensor[start : start + size] if name in ("u_words", "h") else tensor


def input_share(name: str, tensor: Tensor, d_in: int, start: int, size: int) -> Tensor:
    """Take the share of one of a path's tensors that reads `size` inputs from `start` on; signs of V are packed anew.

    Parameters
    ----------
    name : str
        Name of the tensor in PackedFactors.
    tensor : Tensor
    d_in, start, size : int
        Inputs of the whole layer; first input, and number of inputs, of the share.

    Examples
    --------
    >>> import torch
    >>> words = pack_signs(torch.tensor([[1.0, -1.0, -1.0, 1.0]]))
    >>> unpack_signs(input_share("v_words", words, 4, 2, 2), 2).tolist()
    [[-1.0, 1.0]]
    """
    if size == d_in or name not in ("v_words", "g"):
        return tensor
    if name == "g":
        return tensor[start : start + size]
    return pack_signs(unpack_signs(tensor, d_in)[:, start : start + size])
