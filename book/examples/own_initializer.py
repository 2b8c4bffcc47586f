"""Initialise a model by a function of your own, and compare it with the initialisers that come with the package.

    python book/examples/own_initializer.py

The example rotates the factors of the truncated SVD at random before it takes signs. Each rank then carries a part of
every singular direction, so that the errors of the signs average out: two lines more than Dual-SVID, and closer.
"""

import littlebit.fast as lb
import torch
from torch import Tensor


def my_init(weight: Tensor, rank: int) -> lb.Factors:
    """Factorise a (..., d_out, d_in) weight into one path of the given rank."""
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[..., None, :rank].sqrt()  # (..., 1, rank)
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    u = (u[..., :rank] * root) @ rotation  # (..., d_out, rank)
    v = (vt[..., :rank, :].mT * root) @ rotation  # (..., d_in, rank)
    h, ell_u = lb.rank_one(u.abs())  # |U'| ~ h ell_u^T
    g, ell_v = lb.rank_one(v.abs())
    return lb.Factors(u, v, h, ell_u * ell_v, g)


for init in ("dual-svid", my_init, "itq", "admm"):
    model = lb.load_model("tiny")
    results = lb.quantize_(model, lb.Config(bits=1.0, paths=1, init=init), progress=False)
    errors = [layer.error for layer in results.values()]
    name = init if isinstance(init, str) else init.__name__
    print(f"{name:10} mean relative error of the weights {sum(errors) / len(errors):.3f}")
