"""Define what LittleBit is compared with: layers of other methods that `train_` trains, and ablated LittleBit layers.

Each class is a linear layer of one weight whose signs come from latents; `stored_bits` counts everything that a file of
it must hold, masks and scales included.
"""

import math
from typing import Any

import torch
from littlebit.fast.admm import root_mean_square
from littlebit.fast.bits import SCALE_BITS, layer_bits
from littlebit.fast.dual_svid import svid
from littlebit.fast.factors import Factors
from littlebit.fast.models.initializers import dual_svid_init
from littlebit.fast.models.layers import LatentModule, LittleBitLinear
from littlebit.fast.signs import named_rule
from torch import Tensor, nn
from torch.nn import functional

SWEEPS = 10
MOST_GROUP = 400  # With groups this long, their scales take about as many bits as OneBit's in SmolLM2.


class SignLinear(LatentModule):
    """Hold the latents of a (d_out, d_in) sign matrix, which begin as the weight itself."""

    latents = ("latent",)

    def __init__(self, weight: Tensor):
        super().__init__()
        self.latent = nn.Parameter(weight.detach().clone())

    def signs(self) -> Tensor:
        """Take the signs of the latents, (d_out, d_in)."""
        return named_rule(self.rule)(self.latent)

    def weight(self) -> Tensor:
        """Compute the float32 weight, (d_out, d_in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        return functional.linear(x, self.weight().to(x.dtype))


class OneBitLinear(SignLinear):
    """Scale the rows and columns of a sign matrix, W ~ diag(h) sign(W) diag(g) (OneBit, arXiv 2402.11295)."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        _, h, g = svid(weight.detach())
        self.h, self.g = nn.Parameter(h), nn.Parameter(g)

    def weight(self) -> Tensor:
        """Compute the float32 weight, (d_out, d_in)."""
        return self.h[:, None] * self.signs() * self.g

    def stored_bits(self) -> int:
        """Count a bit for each weight, and the scales."""
        return self.latent.numel() + SCALE_BITS * (len(self.h) + len(self.g))


class PrunedLinear(SignLinear):
    """Keep the signs of the n largest of every m weights of a row, with scales of rows and columns, as STBLLM prunes.

    STBLLM (arXiv 2408.01803) adds finer codes for salient weights, which would take more bits.
    """

    n, m = 1, 8
    kept: Tensor

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        groups = weight.abs().view(len(weight), -1, self.m)
        kept = torch.zeros_like(groups).scatter(-1, groups.topk(self.n).indices, 1.0).view_as(weight)
        h, g = magnitudes(weight, kept)
        self.h, self.g = nn.Parameter(h), nn.Parameter(g)
        self.register_buffer("kept", kept)

    def weight(self) -> Tensor:
        """Compute the float32 weight, (d_out, d_in), with zeros where a weight was pruned."""
        return self.kept * self.h[:, None] * self.signs() * self.g

    def stored_bits(self) -> int:
        """Count the signs that are left, a code for each mask of m weights, and the scales."""
        group = self.n + math.ceil(math.log2(math.comb(self.m, self.n)))
        return self.latent.numel() // self.m * group + SCALE_BITS * (len(self.h) + len(self.g))


class GroupLinear(SignLinear):
    """Scale each group of consecutive signs of a row by its mean magnitude, as round-to-nearest does at one bit."""

    def __init__(self, weight: Tensor):
        super().__init__(weight)
        d_in = weight.shape[1]
        self.size = max(size for size in range(1, MOST_GROUP + 1) if d_in % size == 0)
        self.scale = nn.Parameter(weight.detach().view(len(weight), -1, self.size).abs().mean(-1))

    def weight(self) -> Tensor:
        """Compute the float32 weight, (d_out, d_in)."""
        signs = self.signs()
        return (signs.view(len(signs), -1, self.size) * self.scale[..., None]).view_as(signs)

    def stored_bits(self) -> int:
        """Count a bit for each weight, and the scales."""
        return self.latent.numel() + SCALE_BITS * self.scale.numel()


class UnitLatentScale(LatentModule):
    """Compute one LittleBit path whose latent scale is fixed at one; its mean goes into the rows' scales."""

    latents = ("u", "v")

    def __init__(self, layer: LittleBitLinear):
        super().__init__()
        (path,) = layer.factors()
        h = path.h * path.ell.square().mean().sqrt()
        self.u, self.v, self.h, self.g = (nn.Parameter(each.detach().clone()) for each in (path.u, path.v, h, path.g))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        sign = named_rule(self.rule)
        a, b = (self.g[:, None] * sign(self.v)).mT, self.h[:, None] * sign(self.u)
        return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def stored_bits(self) -> int:
        """Count the bits of a path without its latent scale."""
        (d_out, rank), (d_in, _) = self.u.shape, self.v.shape
        return layer_bits(d_out, d_in, (rank,)) - SCALE_BITS * rank


def magnitudes(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Fit h g^T to the magnitudes of the kept weights by least squares, one after the other.

    Parameters
    ----------
    weight : (d_out, d_in) tensor
    kept : (d_out, d_in) tensor of zeros and ones

    Returns
    -------
    (d_out,) h and (d_in,) g.
    """
    sizes, tiny = weight.detach().abs() * kept, torch.finfo(weight.dtype).tiny
    h, g = torch.ones_like(sizes[:, 0]), torch.ones_like(sizes[0])
    for _ in range(SWEEPS):
        h = sizes @ g / (kept @ (g * g)).clamp(min=tiny)
        g = sizes.mT @ h / (kept.mT @ (h * h)).clamp(min=tiny)
    return h, g


def random_init(weight: Tensor, rank: int, generator: torch.Generator) -> Factors:
    """Draw latents as large as Dual-SVID's, and take scales that give the product the weight's norm."""
    start = dual_svid_init(weight, rank, generator)
    u, v = (
        torch.randn(latents.shape, generator=generator).to(latents) * root_mean_square(latents)[..., None, None]
        for latents in (start.u, start.v)
    )
    drawn = Factors(u, v, *(torch.ones_like(scale) for scale in (start.h, start.ell, start.g)))
    ratio = torch.linalg.matrix_norm(weight) / torch.linalg.matrix_norm(drawn.to_dense())
    return drawn._replace(ell=drawn.ell * ratio[..., None])


#: Layers of other methods by name, made from a weight.
LAYERS: dict[str, Any] = {"onebit": OneBitLinear, "pruned 1:8": PrunedLinear, "group scales": GroupLinear}
